"""L-Mul: its equation bit by bit, the errors that are known of it, and what an attention makes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.tiny import IDS, error, logits

from aerogel.errors import BadInput
from aerogel.quantize.emulate.lmul import emulating, lmul, lmul_matmul, offset_exponent, rounded


def by_the_equation(x: float, y: float, m: int) -> float:
    """The paper's formula, with the carry of integer addition."""
    (mx, ex), (my, ey) = math.frexp(abs(x)), math.frexp(abs(y))
    total, exponent = 2 * mx - 1 + 2 * my - 1 + 2.0 ** -offset_exponent(m), ex + ey - 2
    carry = int(total)
    return math.copysign(2.0 ** (exponent + carry) * (1 + total - carry), x * y)


@pytest.mark.parametrize("mantissa", [1, 2, 3, 4, 5, 8, 10])
def test_it_is_the_equation(mantissa: int) -> None:
    x, y = rounded(torch.randn(500), mantissa), rounded(torch.randn(500) * 100, mantissa)
    wanted = [by_the_equation(a, b, mantissa) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert lmul(x, y, mantissa).tolist() == wanted
    literal = [(1 + 2 * math.frexp(abs(a))[0] - 1 + 2 * math.frexp(abs(b))[0] - 1) for a, b in zip(x, y, strict=True)]
    scale = [2.0 ** (math.frexp(abs(a))[1] + math.frexp(abs(b))[1] - 2) for a, b in zip(x, y, strict=True)]
    plain = lmul(x, y, mantissa, carry=False).abs()
    found = torch.tensor([s * (v + 2.0 ** -offset_exponent(mantissa)) for s, v in zip(scale, literal, strict=True)])
    torch.testing.assert_close(plain, found)


ERRORS = [(3, True, 0.057), (4, True, 0.053), (7, True, 0.027), (10, True, 0.027), (7, False, 0.062)]


@pytest.mark.parametrize(("mantissa", "carry", "wanted"), ERRORS)
def test_mean_error_of_normal_products(mantissa: int, carry: bool, wanted: float) -> None:
    x, y = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
    exact = x.double() * y.double()
    found = lmul(x, y, mantissa, carry=carry)
    assert float(((found - exact).abs() / exact.abs()).mean()) == pytest.approx(wanted, rel=0.05)


def test_zeros_signs_and_the_ends_of_the_range() -> None:
    assert lmul(torch.tensor([0.0, -0.0, 3.0]), torch.tensor([5.0, 2.0, 0.0])).tolist() == [0, 0, 0]
    assert lmul(torch.tensor(1e-30), torch.tensor(1e-30)).item() == 0
    assert lmul(torch.tensor(-1e30), torch.tensor(1e30)).item() == -torch.inf
    assert lmul(torch.tensor(torch.inf), torch.tensor(-2.0)).item() == -torch.inf
    assert lmul(torch.tensor(torch.nan), torch.tensor(1.0)).isnan()
    assert lmul(torch.tensor(-2.0), torch.tensor(-2.0), 23).item() == 4 * (1 + 2**-4)
    with pytest.raises(BadInput, match="mantissa"):
        rounded(torch.ones(1), 0)


def test_rounding_to_few_digits_is_that_of_hardware() -> None:
    x = torch.randn(4000)
    assert torch.equal(rounded(x, 7), x.bfloat16().float())
    inside = x[(x.abs() > 2**-6) & (x.abs() < 400)]
    assert torch.equal(rounded(inside, 3), inside.to(torch.float8_e4m3fn).float())
    assert rounded(torch.tensor(torch.inf), 3).item() == torch.inf


def test_products_add_up_and_batches_are_batches() -> None:
    x, w = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16)
    found = lmul_matmul(x, w, 4)
    wanted = torch.stack([lmul(x[..., i : i + 1, :], w, 4).sum(-1) for i in range(5)], -2)
    torch.testing.assert_close(found, wanted)
    assert error(lmul_matmul(x[0, 0], w[0, 0], 10), x[0, 0] @ w[0, 0].T) < 0.06


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_attention_emulated_is_near_and_comes_back(name: str) -> None:
    model: Any = zoo.build(name)
    exact = logits(model)
    with emulating(model, 10):
        found = logits(model)
        assert 0 < error(found, exact) < 0.1
    with emulating(model, 2):
        assert error(logits(model), exact) > error(found, exact)
    assert torch.equal(logits(model), exact)
    with torch.no_grad(), emulating(model, 10):
        short = model(IDS[:, :5]).logits
    assert error(short, found[:, :5]) < 1e-5  # causal: what comes later does not count


def test_what_cannot_be_emulated_is_refused() -> None:
    with pytest.raises(BadInput, match="Linear"), emulating(torch.nn.Linear(2, 2)):
        pass
    sinks: Any = zoo.build("gpt_oss")
    with pytest.raises(BadInput, match="s_aux"), emulating(sinks):
        logits(sinks)
