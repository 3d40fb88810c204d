"""Rows of more bits: chosen over all layers by cost per weight, and solved to what more bits can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Stats
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.rows import MoreBits, Refining, Rows, choose_rows
from aerogel.quantize.rtn import RoundToNearest

MakeLayer = Callable[..., Layer]
LOSS = MoreBits(rows="loss", row_share=0.2, row_bits=8)
METHODS: dict[str, Any] = {
    "gptq": Gptq(grid=IntGrid(bits=4, group_size=32, scale_dtype=torch.float16)),
    "gptaq on nf4": Gptq(grid=Nf4(group_size=32, scale_dtype=torch.float16), gptaq=True),
    "zero points": RoundToNearest(grid=IntGrid(bits=4, group_size=32, symmetric=False)),
}


def test_the_dearest_rows_of_all_layers_are_chosen_by_cost_per_weight() -> None:
    cost = {"wide": torch.tensor([9.0, 1.0, 8.0]), "narrow": torch.tensor([5.0, 0.1, 3.0, 4.5])}
    rows = choose_rows(cost, {"wide": 20, "narrow": 10}, share=0.45)  # 100 weights, 45 of them
    assert {name: found.tolist() for name, found in rows.items()} == {"wide": [0], "narrow": [0, 3]}
    assert not sum(len(found) for found in choose_rows(cost, {"wide": 20, "narrow": 10}, share=0.05).values())


def test_a_global_choice_keeps_more_of_the_cost_than_equal_shares() -> None:
    torch.manual_seed(0)
    cost = {f"layer {i}": torch.rand(64).exp() * 10.0**i for i in range(4)}
    widths = dict.fromkeys(cost, 32)
    saved = sum(float(cost[name][rows].sum()) for name, rows in choose_rows(cost, widths, 0.25).items())
    equal = sum(float(found.topk(16).values.sum()) for found in cost.values())
    assert saved > 1.5 * equal


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_chosen_rows_are_like_rows_of_many_bits_and_others_do_not_change(method: Any, make_layer: MakeLayer) -> None:
    layer = make_layer()
    h_KK = layer.stats.second_moment_KK
    layer = layer.with_(stats=Stats(tokens=1024, second_moment_KK=h_KK, cross_moment_KK=0.01 * h_KK))
    rows_R = torch.tensor([3, 17, 40])
    others = torch.ones(48, dtype=torch.bool).index_fill(0, rows_R, False)
    base = method(layer)
    found = Refining(method=method, more=LOSS)(layer.with_(rows_R=rows_R))
    assert torch.equal(found.weight_NK[others], base.weight_NK[others])
    assert found.codes is not None and torch.equal(found.codes.decode()[others], base.weight_NK[others])
    target = layer.weight_NK * (1 + 0.01 * method.gptaq_alpha if getattr(method, "gptaq", False) else 1)

    def losses(solved: Layer) -> torch.Tensor:
        d_RK = (target - solved.weight_NK)[rows_R]
        return (d_RK @ h_KK * d_RK).sum(1)

    assert (losses(found) < losses(base) / 60).all()  # fifteen times finer is 225 times less, the whole range costs of it


def test_what_is_stored_is_read_and_checked(make_layer: MakeLayer) -> None:
    layer = make_layer().with_(rows_R=torch.tensor([1, 2, 9]))
    stage = Refining(method=METHODS["gptq"], more=LOSS)
    found = stage(layer)
    tensors = found.sidecars[0].tensors()
    assert {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} == Rows.shapes(192, 3, stage.extra)
    rows = Rows.read(tensors)
    assert rows is not None and found.codes is not None
    assert torch.equal(rows.put(found.codes.decode()), found.weight_NK)
    rows.check(48, 192, "w")
    for N, K in ((9, 192), (48, 191)):
        with pytest.raises(BadInput, match="rows beside w"):
            rows.check(N, K, "w")
    assert Rows.read({}) is None


def test_no_rows_no_sidecar(make_layer: MakeLayer) -> None:
    layer = make_layer().with_(rows_R=torch.zeros(0, dtype=torch.int64))
    found = Refining(method=METHODS["gptq"], more=LOSS)(layer)
    assert found.sidecars == () and torch.equal(found.weight_NK, METHODS["gptq"](layer).weight_NK)


def test_refusals(make_layer: MakeLayer) -> None:
    with pytest.raises(BadInput, match="2 to 8 more"):
        Refining(method=METHODS["gptq"], more=MoreBits(rows="loss", row_bits=5))
    with pytest.raises(BadInput, match="row_share"):
        MoreBits(rows="loss", row_share=0)
    with pytest.raises(RunFailed, match="nobody chose"):
        Refining(method=METHODS["gptq"], more=LOSS)(make_layer())
