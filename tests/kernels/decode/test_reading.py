"""Reading a prompt with parts replaced gives the model's own answer, and the replaced parts are really ours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.kernels.decode.cases import distance
from tests.zoo import ZOO, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aerogel.kernels.decode import ops, reading
from aerogel.kernels.decode.later import Later
from aerogel.kernels.decode.reading import Awaiting, Parts, parts_of
from aerogel.kernels.gemm import cuda_fp8, cuda_int8
from aerogel.kernels.gemm.cuda_made import Normed

REPLACED = {
    "llama": {"rms_norm": 5, "gate": 2, "rotate": 4},
    "qwen3": {"rms_norm": 9, "gate": 2, "rotate": 4},
    "gemma2": {"rms_norm": 9, "gate": 2, "rotate": 4},
}
"""Operators of ours in a prompt of two blocks."""


class Counting(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """Counts the operators of ours."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aerogel":
            self.seen[func._schema.name.removeprefix("aerogel::")] += 1
        return func(*args, **(kwargs or {}))


def read(model: Any, ids: Tensor, parts: Parts) -> tuple[Tensor, Counter[str]]:
    with torch.no_grad(), parts.replaced(), Counting() as counting:
        return model(ids).logits, counting.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_logits_are_the_models_own(name: str) -> None:
    model, ids = build(name), torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, none = read(model, ids, Parts())
    found, seen = read(model, ids, parts_of(model))
    assert distance(found, expected) < 1e-5
    assert not none
    assert seen == REPLACED.get(name, seen)
    assert torch.equal(read(model, ids, Parts())[0], expected), "the model is as it was"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_what_waits_for_a_linear_is_computed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every linear rounded its input; these take the computed one."""
    monkeypatch.setattr(nn.Linear, "kernel_name", reading.ROUNDING[0], raising=False)
    monkeypatch.setattr(reading, "Linear", nn.Linear)
    monkeypatch.setattr(reading, "FEW_TOKENS", 9)
    model = build(name)
    for ids in (torch.randint(3, 100, (2, 9)), torch.randint(3, 100, (1, 9))):  # what waits, and what is too short to
        expected, _ = read(model, ids, Parts())
        found, seen = read(model, ids, parts_of(model))
        assert distance(found, expected) < 1e-5 and seen == REPLACED[name]


def test_a_matmul_of_8_bits_takes_what_is_not_computed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Any, ...]] = []
    for module, name in ((cuda_int8, "tiles_linear_int8"), (cuda_fp8, "fp8_linear")):
        monkeypatch.setattr(module, name, lambda *given: taken.append(given) or torch.zeros(6, 5))
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    made = Normed(x.reshape(-1, 8), weight, 1e-5, True)
    later = Later.of(made, x.shape)
    assert later.shape == (2, 3, 8) and later.dtype == torch.float32 and later.device == x.device
    rows = later.reshape(-1, 8).to(torch.float32).contiguous()
    rest = (torch.zeros(1), torch.zeros(1), None, torch.zeros(1), None, 0, 5, None)
    assert isinstance(rows, Later) and rows.shape == (6, 8)
    assert torch.ops.aerogel.tiles_linear_int8.default(rows, *rest).shape == (6, 5)
    assert taken[0][0] is made and len(taken[0]) == 9
    assert torch.ops.aerogel.fp8_linear.default(rows, torch.zeros(1), torch.zeros(1), None).shape == (6, 5)
    assert taken[1][0] is made and len(taken[1]) == 4
    wanted = ops.rms_norm(x, weight, 1e-5, True)
    with Counting() as counting:
        assert torch.equal(later + 0, wanted) and torch.equal(torch.cat([rows, rows]), wanted.reshape(-1, 8).repeat(2, 1))
        assert type(later.reshape(6, 2, 4)) is Tensor and torch.equal(later[:, -1:], wanted[:, -1:])
    assert counting.seen == {"rms_norm": 1}, "computed once"


def test_roundings_in_16_bits_are_the_models_own() -> None:
    for name in ("llama", "gemma2"):
        model: Any = build(name).bfloat16()
        for module in model.modules():
            if "Norm" in type(module).__name__:
                nn.init.normal_(module.weight, 1)
        ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
        expected, (found, seen) = read(model, ids, Parts())[0], read(model, ids, parts_of(model))
        assert seen == REPLACED[name]
        assert distance(found, expected) < 4e-3


def test_parts_go_back_when_reading_fails() -> None:
    model: Any = build("llama")
    parts = parts_of(model)
    with pytest.raises(IndexError), parts.replaced():
        model(torch.full((1, 3), 10**6))
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_not_such_a_norm_stays() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    assert not parts_of(nn.Sequential(Shifted(), nn.LayerNorm(8), nn.ReLU(), nn.Embedding(4, 8))).forwards


def test_an_activation_waits_for_its_product_only() -> None:
    act = nn.SiLU()
    (forward,) = parts_of(nn.Sequential(act)).forwards.values()
    g, u = torch.randn(2, 3, 8)
    wanted = nn.functional.silu(g)
    with Counting() as counting:
        waiting: Any = forward(g)
        assert isinstance(waiting, Awaiting) and waiting.shape == g.shape and waiting.dtype == g.dtype
        for product in (waiting * u, u * waiting, torch.mul(waiting, u), waiting.mul(u)):
            assert type(product) is Tensor and distance(product, ops.gate(g, u, "silu")) < 1e-6
    assert counting.seen == {"gate": 4}
    with Counting() as counting:
        for found, sure in ((waiting * 2, wanted * 2), (waiting + u, wanted + u), (waiting * u[:1], wanted * u[:1])):
            assert type(found) is Tensor and torch.equal(found, sure)
        assert torch.equal(waiting * waiting, wanted * wanted)
        assert torch.equal(nn.functional.linear(waiting, u[:, :8]), nn.functional.linear(wanted, u[:, :8]))
    assert not counting.seen
