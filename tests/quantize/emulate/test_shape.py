"""Generalized Gaussians: the shape that was drawn is found, histograms match, and a smaller shape costs fewer bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.emulate.shape import deepshape, entropy_report, fit_shape, quantile


def drawn(shape: float, count: int = 100_000) -> Tensor:
    random = torch.Generator().manual_seed(0)
    p = torch.rand(count, generator=random, dtype=torch.float64)
    sign = torch.where(torch.rand(count, generator=random) < 0.5, -1.0, 1.0)
    return (quantile(p, shape) * sign).float()


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.0, 1.5, 2.0, 2.5])
def test_the_fit_finds_the_shape_that_was_drawn(shape: float) -> None:
    w = drawn(shape)
    assert float(w.square().mean()) == pytest.approx(1, rel=0.05)
    assert fit_shape(w) == pytest.approx(shape, abs=0.03)
    assert fit_shape(w * 1e-4) == fit_shape(w)


def test_known_distributions() -> None:
    torch.manual_seed(0)
    assert fit_shape(torch.randn(200_000)) == pytest.approx(2, abs=0.03)
    assert fit_shape(torch.distributions.Laplace(0.0, 1.0).sample((200_000,))) == pytest.approx(1, abs=0.03)
    p = torch.tensor([0.0, 0.5, 0.6827, 0.9545], dtype=torch.float64)
    torch.testing.assert_close(quantile(p, 2.0), torch.tensor([0.0, 0.6745, 1.0, 2.0], dtype=torch.float64), atol=2e-3, rtol=0)


def test_matching_keeps_ranks_signs_and_variance_and_gives_the_shape() -> None:
    w = torch.randn(100, 300, generator=torch.Generator().manual_seed(0)) * 0.02
    found = deepshape(w, 0.8)
    assert found.shape == w.shape and fit_shape(found) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(found.sign(), w.sign())
    assert torch.equal(found.abs().flatten().argsort(stable=True), w.abs().flatten().argsort(stable=True))
    assert float(found.square().mean()) == pytest.approx(float(w.square().mean()), rel=1e-3)
    assert float((deepshape(w, 2.0) - w).norm() / w.norm()) < 0.02


def test_a_smaller_shape_costs_fewer_bits_at_the_same_step() -> None:
    w = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    reports = [entropy_report(deepshape(w, shape), 0.25) for shape in (2.0, 1.2, 0.7, 0.4)]
    for attribute in ("entropy_bits", "golomb_bits", "shape"):
        values = [getattr(report, attribute) for report in reports]
        assert values == sorted(values, reverse=True)
    # A normal variable of deviation 1 in steps of d has log2(sqrt(2 pi e) / d) bits, and the error of a uniform step.
    assert reports[0].entropy_bits == pytest.approx(2.047 + 2, abs=0.02)
    assert reports[0].error == pytest.approx(0.25**2 / 12, rel=0.03)
    assert all(report.golomb_bits > report.entropy_bits for report in reports)


def test_golomb_codes_are_counted() -> None:
    # 0, 1, -1, 2 become 0, 1, 2, 3: 1, 3, 3, 5 bits.
    assert entropy_report(torch.tensor([0.0, 1, -1, 2]), 1.0).golomb_bits == 3
    assert entropy_report(torch.tensor([0.0, 1, -1, 2]), 1.0).entropy_bits == 2


def test_refusals() -> None:
    for w in (torch.zeros(3), torch.tensor([torch.inf, 1])):
        with pytest.raises(BadInput, match="finite"):
            fit_shape(w)
    with pytest.raises(BadInput, match="nu"):
        deepshape(torch.randn(4), 5.0)
    with pytest.raises(BadInput, match="step"):
        entropy_report(torch.randn(4), 0.0)
