"""What sparse outliers promise: they are exact, codes fit what remains better, and GPTQ takes them as already right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Stats
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.outliers import Keep, Outliers
from aerogel.quantize.rtn import RoundToNearest
from aerogel.quantize.sidecars import Keeping

GRID = IntGrid(bits=4, group_size=None)


def heavy(N: int = 24, K: int = 80) -> Tensor:
    """Gaussian weights, and a few that are far out."""
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(N, K, generator=generator) * 0.02
    far = torch.randperm(N * K, generator=generator)[:12]
    w_NK.view(-1)[far] = torch.randn(12, generator=generator).sign() * 0.5
    return w_NK.bfloat16().float()


def outliers_of(layer: Layer) -> Outliers:
    (found,) = layer.sidecars
    assert isinstance(found, Outliers)
    return found


def with_statistics(w_NK: Tensor) -> Layer:
    x_TK = torch.randn(400, w_NK.shape[1], generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, w_NK.shape[1])
    return Layer(name="any", weight_NK=w_NK, stats=Stats(tokens=400, second_moment_KK=x_TK.T @ x_TK))


@pytest.mark.parametrize("method", [RoundToNearest(grid=GRID), Gptq(grid=GRID), Gptq(grid=GRID, refit=0, act_order=False)])
def test_outliers_are_exact_and_the_rest_is_better(method: RoundToNearest | Gptq) -> None:
    layer = with_statistics(heavy())
    plain = method(layer)
    kept = Keeping(method=method, keep=Keep(outliers="sigma", outlier_share=0.02))(layer)
    assert kept.codes is not None
    outliers = outliers_of(kept)
    places = outliers.places()
    assert len(places[0]) >= 12
    assert torch.equal(kept.weight_NK[places], layer.weight_NK[places])
    assert not kept.codes.decode()[places].any()
    assert torch.equal(outliers.put(kept.codes.decode()), kept.weight_NK)
    assert kept.loss is not None and plain.loss is not None
    # Twenty-five standard deviations in a row leave one or two codes for all others.
    assert kept.loss < plain.loss / 4


@pytest.mark.parametrize("method", [RoundToNearest(grid=KMeans(bits=3)), Gptq(grid=KMeans(bits=3))], ids=str)
def test_codebooks_have_a_zero_where_an_outlier_stands(method: RoundToNearest | Gptq) -> None:
    """SqueezeLLM's two halves together: the numbers of a codebook are fitted, and none of them is 0 by itself."""
    layer = with_statistics(heavy())
    plain, kept = method(layer), Keeping(method=method, keep=Keep(outliers="sigma", outlier_share=0.02))(layer)
    assert kept.codes is not None and torch.equal(outliers_of(kept).put(kept.codes.decode()), kept.weight_NK)
    assert kept.loss is not None and plain.loss is not None and kept.loss < 0.7 * plain.loss


def test_gptq_sees_outliers_as_right() -> None:
    """Solving with the outliers in the statistics' place is better than putting them back into a finished solution."""
    layer = with_statistics(heavy())
    keep = Keep(outliers="sigma", outlier_share=0.02)
    method = Gptq(grid=GRID, refit=0)
    inside = Keeping(method=method, keep=keep)(layer)
    after = method(layer)
    put = outliers_of(inside).put(after.weight_NK.clone())
    h_KK = layer.stats.second_moment_KK  # type: ignore[union-attr]
    lost = [float((((layer.weight_NK - w) @ h_KK) * (layer.weight_NK - w)).sum()) for w in (inside.weight_NK, put)]
    assert lost[0] < lost[1]


def test_outliers_are_taken_out_of_the_weight_that_gptaq_asks_for() -> None:
    """The inputs came out 30 % too small, so the dense outputs need every weight, kept ones too, larger by 1 / 0.7."""
    layer = with_statistics(heavy())
    h_KK = layer.stats.second_moment_KK  # type: ignore[union-attr]
    layer = replace(layer, stats=replace(layer.stats, cross_moment_KK=(1 / 0.7 - 1) * h_KK))  # type: ignore[type-var]
    keep = Keep(outliers="sigma", outlier_share=0.02)
    method = Gptq(grid=GRID, gptaq=True, gptaq_alpha=1.0, damping=1e-6)
    found = Keeping(method=method, keep=keep)(layer)
    kept_NK = outliers_of(found).put(torch.zeros_like(layer.weight_NK))
    wanted_NK = layer.weight_NK / 0.7
    torch.testing.assert_close(kept_NK[kept_NK != 0], wanted_NK[kept_NK != 0], rtol=1e-2, atol=0)
    plain = method(layer)
    assert found.loss is not None and plain.loss is not None and found.loss < 0.7 * plain.loss
    assert float((found.weight_NK - wanted_NK).norm()) < float((plain.weight_NK - wanted_NK).norm())


def test_sensitivity_keeps_what_the_output_needs() -> None:
    layer = with_statistics(heavy())
    rule = Keep(outliers="sensitivity", outlier_share=0.01)
    chosen = rule.choose(layer)
    assert int(chosen.sum()) == rule.count(24, 80)
    score = layer.weight_NK.square() * layer.stats.second_moment_KK.diagonal()  # type: ignore[union-attr]
    assert score[chosen].min() >= score[~chosen].max()
    by_size = Keep(outliers="sigma", outlier_sigma=0.1, outlier_share=0.01).choose(layer)
    assert not torch.equal(chosen, by_size)


def test_pruned_weights_are_no_outliers_and_stay_zero() -> None:
    w_NK = heavy()
    mask_NK = torch.rand(w_NK.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    layer = Layer(name="any", weight_NK=w_NK * mask_NK, mask_NK=mask_NK)
    result = Keeping(method=RoundToNearest(grid=GRID), keep=Keep(outliers="sigma", outlier_sigma=1.0))(layer)
    assert len(outliers_of(result).value_E) > 0
    assert not result.weight_NK[~mask_NK].any()
    assert torch.equal(result.mask_NK, mask_NK)  # type: ignore[arg-type]


@pytest.mark.parametrize("K", [1, 33, 1 << 15, (1 << 15) + 3])
def test_stored_form_round_trips(K: int) -> None:
    w_NK = torch.randn(3, K)
    mask_NK = torch.zeros(3, K, dtype=torch.bool)
    mask_NK[0, K - 1] = mask_NK[2, 0] = True
    found = Outliers.of(w_NK, mask_NK)
    found.check(3, K, "any")
    assert {n: (tuple(t.shape), t.dtype.itemsize) for n, t in found.tensors().items()} == {
        n: (shape, dtype.itemsize) for n, (shape, dtype) in Outliers.shapes(3, K, 2).items()
    }
    again = Outliers.read(found.tensors())
    assert again is not None
    dense = again.put(torch.zeros(3, K))
    torch.testing.assert_close(dense, w_NK * mask_NK, rtol=2**-8, atol=0)
    with pytest.raises(BadInput, match="damaged"):
        found.check(4, K, "any")


def test_the_narrow_type_is_the_exact_one() -> None:
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    assert Outliers.of(torch.tensor([[1 + 2**-10, 2.0]]), everywhere).value_E.dtype == torch.float16
    assert Outliers.of(torch.tensor([[1e5, 2.0]]), everywhere).value_E.dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(BadInput, match="outlier_share"):
        Keep(outlier_share=0.5)
    with pytest.raises(RunFailed):
        Keeping(method=RoundToNearest(grid=GRID), keep=Keep(outliers="sensitivity"))(Layer(name="a", weight_NK=heavy()))
