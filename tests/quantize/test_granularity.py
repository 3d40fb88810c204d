"""FineQuant's rule: a scale per output where the range is everybody's, groups where a few weights set it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer
from aerogel.quantize.granularity import Granularity, candidates, mean_range
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.rtn import RoundToNearest
from aerogel.recipes.schema import Recipe

RULE = Granularity(granularity="adaptive")


def normal(N: int = 64, K: int = 1024) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def with_loud_inputs(share: float = 0.004) -> Tensor:
    w_NK = normal()
    loud = torch.randperm(1024, generator=torch.Generator().manual_seed(1))[: int(share * 1024)]
    w_NK[:, loud] *= 12
    return w_NK


def test_candidates_are_the_smallest_times_powers_of_two() -> None:
    assert candidates(576, 64) == [256, 128, 64]
    assert candidates(1024, 32) == [512, 256, 128, 64, 32]
    assert candidates(100, 64) == [] and candidates(7, 1) == [2, 1]


@pytest.mark.parametrize("K", [1024, 4096, 1000])
def test_normal_weights_keep_one_scale_and_loud_inputs_get_groups(K: int) -> None:
    w_NK = normal(K=K)
    assert RULE.group_size(w_NK, 64) is None
    w_NK[:, 5::300] *= 12
    assert RULE.group_size(w_NK, 64) == 64
    assert RULE.group_size(w_NK, 128) == 128


@pytest.mark.parametrize(("scale_bits", "wanted"), [(8, 32), (16, 64), (32, 256)])
def test_what_it_is_worth_depends_on_what_scales_cost(scale_bits: int, wanted: int) -> None:
    """A range a few percent shorter is worth a scale of 8 bits where it is not worth one of 32."""
    worth = Granularity(granularity="worth")
    w_NK = normal(K=4096)
    assert worth.group_size(w_NK, 8, scale_bits) == pytest.approx(wanted, rel=0.51)
    found = [worth.group_size(w_NK, 8, bits) or 4096 for bits in (8, 16, 32, 64)]
    assert found == sorted(found)
    assert (worth.group_size(with_loud_inputs(0.02), 8) or 1024) < (worth.group_size(normal(), 8) or 1024)


def test_no_other_size_is_better_at_its_bits_for_normal_weights() -> None:
    """Error times 4^bits, what a format loses after its size is taken into account, is least at the size that is chosen."""
    w_NK = normal(N=128, K=2048)
    lost = {}
    for size in candidates(2048, 16):
        grid = IntGrid(bits=4, group_size=size)
        q_NK = RoundToNearest(grid=grid, clip="none")(Layer(name="any", weight_NK=w_NK)).weight_NK
        lost[size] = float(((q_NK - w_NK).norm() / w_NK.norm()) ** 2) * 4 ** (16 / size)
    chosen = Granularity(granularity="worth").group_size(w_NK, 16)
    assert chosen is not None and lost[chosen] < 1.02 * min(lost.values())


def test_it_does_not_depend_on_the_unit_and_takes_what_there_is() -> None:
    w_NK = with_loud_inputs()
    assert RULE.group_size(w_NK * 1e-6, 32) == RULE.group_size(w_NK, 32)
    assert RULE.group_size(torch.zeros(4, 256), 64) is None
    assert RULE.group_size(torch.ones(1, 1), 64) is None


def test_a_short_last_group_counts_for_its_share() -> None:
    w_NK = torch.tensor([[1.0, 2, 3, 10]])
    assert mean_range(w_NK, 3) == pytest.approx((3 * 3 + 10) / 4)
    assert mean_range(w_NK, 4) == 10 and mean_range(w_NK, 1) == 4


def test_bits_go_where_they_buy_error() -> None:
    """Of two matrices, groups for the one that needs them are nearly as good as for both, at half of their cost."""
    errors, bits = {}, {}
    for name in ("channel", "adaptive", "groups"):
        errors[name] = bits[name] = 0.0
        for w_NK in (normal(), with_loud_inputs()):
            size = {"channel": None, "groups": 64, "adaptive": RULE.group_size(w_NK, 64)}[name]
            grid = IntGrid(bits=4, group_size=size)
            q_NK = RoundToNearest(grid=grid)(Layer(name="any", weight_NK=w_NK)).weight_NK
            errors[name] += float(((q_NK - w_NK).norm() / w_NK.norm()) ** 2)
            bits[name] += 16 / (size or 1024) / 2
    assert bits["adaptive"] < 0.55 * bits["groups"]
    assert errors["adaptive"] < 0.6 * errors["channel"]


def test_refusals() -> None:
    with pytest.raises(BadInput, match="granularity_gain"):
        Granularity(granularity_gain=1.0)
    stage = {"method": "rtn", "bits": 4, "granularity": "adaptive"}
    with pytest.raises(BadInput, match="smallest group"):
        Recipe.load({"aerogel": 1, "stages": [{"quantize": stage}]})
    with pytest.raises(BadInput, match="granularity"):
        Recipe.load({"aerogel": 1, "stages": [{"quantize": {**stage, "group_size": 64, "granularity_gain": 0.0}}]})
    with pytest.raises(BadInput, match="granularity"):
        Recipe.load({"aerogel": 1, "stages": [{"quantize": {"method": "rtn", "format": "fp8", "granularity": "adaptive"}}]})
