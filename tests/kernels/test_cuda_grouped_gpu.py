"""Grouped experts on a Hopper GPU: the routing against plain torch, products against float64, for loads of every kind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.kernels.expert_weights import experts_of, product, rounded_of, routing, wanted_of, with_rows
from tests.kernels.test_cuda_claims import layer_of
from tests.kernels.test_cuda_wgmma_gpu import BOUND, HOPPER, weight_of
from tests.kernels.tile_weights import dense64

from aerogel.kernels.cuda import sources
from aerogel.kernels.expert_linears import ExpertLinears
from aerogel.kernels.experts import replace_experts
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import SOURCE, Config, defines
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan
from aerogel.kernels.grouped import cuda_grouped
from aerogel.kernels.grouped.cuda_routes import RUNS, add_experts, most_runs, route_experts, run_tokens, spread_tokens
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.planes import PlaneGrid

pytestmark = pytest.mark.gpu
E, N, K = 5, 200, 712
ROWS = 208
"""Rows of an expert in whole row tiles."""


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")


def loads(pairs: int, experts: int) -> dict[str, torch.Tensor]:
    """Experts of so many pairs: at random, all with one, a few with most, and some with experts that do not exist."""
    draw = torch.Generator().manual_seed(pairs)
    even = torch.randint(experts, (pairs,), generator=draw)
    skewed = (experts * torch.rand(pairs, generator=draw) ** 4).long()
    nobody = torch.where(torch.rand(pairs, generator=draw) < 0.3, experts + even % 2, even)
    found = {"even": even, "one": torch.full((pairs,), experts - 1), "skewed": skewed, "nobody": nobody}
    return {name: expert.cuda() for name, expert in found.items()} | {"none": torch.full((pairs,), experts).cuda()}


@pytest.mark.parametrize(("pairs", "experts"), [(1, 1), (2, 8), (31, 128), (129, 3), (1000, 60), (20000, 300)])
def test_pairs_are_sorted_and_cut_into_runs(pairs: int, experts: int) -> None:
    for (name, expert), run in itertools.product(loads(pairs, experts).items(), (16, 160)):
        order, place, runs = (part.cpu() for part in route_experts(expert, experts, run))
        e = expert.cpu().clamp(max=experts)
        wanted = torch.sort(e, stable=True).indices
        assert torch.equal(order.long(), wanted), (name, run)
        places = torch.empty_like(wanted)
        places[wanted] = torch.arange(pairs)
        assert torch.equal(place.long(), torch.where(e < experts, places, -1)), (name, run)
        counts = torch.bincount(e, minlength=experts + 1)[:experts]
        starts = counts.cumsum(0) - counts
        rows = [
            [number, int(start) + at, min(int(start) + at + run, int(start + count)), -(-int(count) // run)]
            for number, (start, count) in enumerate(zip(starts, counts, strict=True))
            for at in range(0, int(count), run)
        ]
        assert runs[0, 0] == len(rows) <= most_runs(pairs, experts, run)
        assert runs[1 : 1 + len(rows)].tolist() == rows, (name, run)


def test_tokens_go_out_and_come_back() -> None:
    for dtype, columns, k in itertools.product((torch.bfloat16, torch.float16), (8, 100, 2880), (1, 4)):
        x = torch.randn(70, columns, device="cuda").to(dtype)
        for expert in loads(70 * k, E).values():
            order, place, _ = route_experts(expert, E, 16)
            rows = spread_tokens(x, order)
            assert torch.equal(rows[:, :columns], x[order.long() // k]) and not rows[:, columns:].any()
            weight = torch.randn(70, k, device="cuda")
            there = place.long() >= 0
            rows = torch.where((expert < E)[order.long(), None], rows, torch.nan)[:, :columns].contiguous()
            y = add_experts(rows, place, weight)
            pairs = torch.where(there[:, None], rows[place.long().clamp(min=0)].double(), 0)
            wanted = (pairs * weight.reshape(-1, 1)).reshape(70, k, columns).sum(1)
            assert y.dtype == dtype and (y.double() - wanted).norm() <= 4e-3 * wanted.norm()


def stacked(bits: int, size: int, zero: str, scale: torch.dtype) -> tuple[TileWeight, torch.Tensor]:
    """The weights of all experts, one below the other, and what they decode to, [E, N, K]."""
    whole = weight_of(E * ROWS, K, bits, size, zero, scale)
    held = {name: getattr(whole, name) for name in ("codes", "scale", "zero", "table", "pick", "group_size", "K")}
    return TileWeight(N=N, **held), dense64(whole).reshape(E, ROWS, K)[:, :N]


def check(weight: TileWeight, dense: torch.Tensor, config: Config, expert: torch.Tensor, dtype: torch.dtype) -> None:
    """Twice into poisoned outputs: every pair of an expert that exists, and no other row."""
    pairs, run = len(expert), config.tokens
    order, _, runs = route_experts(expert, E, run)
    x = torch.randn(pairs, K, device="cuda").to(dtype)
    bias = torch.randn(E, N, device="cuda").to(dtype)
    plan = Plan(weight, config, pairs, dtype, runs=most_runs(pairs, E, run))
    assert plan.function.attribute("local_bytes") == 0, config
    found = []
    for _ in range(2):
        y = torch.full((pairs + 1, N), torch.nan, dtype=dtype, device="cuda")
        plan.launch(x, None, bias, y[:pairs], runs=runs)
        found.append(y)
    e = expert[order.long()]
    there = e < E
    assert torch.equal(found[0].isnan().all(1), ~torch.cat([there, there.new_zeros(1)])), config
    wanted = torch.einsum("sk,snk->sn", x[there].double(), dense[e[there]]) + bias[e[there]].double()
    error = ((found[0][:pairs][there].double() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()
    assert error <= BOUND[dtype], f"{config}: {error:.2e}"
    assert torch.equal(found[0][:pairs][there], found[1][:pairs][there]), f"{config}: two runs differ"


@pytest.mark.parametrize("run", RUNS)
def test_every_cut_on_ragged_loads(run: int) -> None:
    weight, dense = stacked(4, 128, "none", torch.bfloat16)
    configs = cuda_grouped.cuts(weight, run) + (cuda_grouped.cuts(weight, run, split=3) if run <= 32 else [])
    macros = [defines(weight, config, torch.bfloat16) | {"INT8": 0, "EXPERTS": 1} for config in configs]
    sources.compile_ahead([(SOURCE, macro) for macro in macros], HOPPER, workers=4)
    for config, pairs in itertools.product(configs, (3, 700)):
        for expert in loads(pairs, E).values():
            check(weight, dense, config, expert, torch.bfloat16)


@pytest.mark.parametrize(
    ("bits", "size", "zero", "scale"),
    [(3, 32, "integer", torch.float16), (8, 0, "none", torch.bfloat16), (2, 16, "float", torch.float32)],
)
def test_widths_groups_and_zero_points(bits: int, size: int, zero: str, scale: torch.dtype) -> None:
    weight, dense = stacked(bits, size, zero, scale)
    config = cuda_grouped.choose_config(weight, 32, 9, 5, 132)
    assert config is not None
    for dtype in (torch.bfloat16, torch.float16):
        check(weight, dense, config, loads(90, E)["nobody"], dtype)


KERNELS: list[tuple[Any, str]] = [
    *((grid, "cuda") for grid in (Mx(), Nvfp4(), Nf4(), Bitmod(), KMeans(bits=3, rounds=2), KMeans(bits=4, rounds=2))),
    (IntGrid(bits=4, group_size=40, symmetric=False), "cuda-groups"),
    (PlaneGrid(bits=1, group_size=64), "cuda-plane"),
    (PlaneGrid(bits=3, group_size=32), "cuda-planes"),
    (PlaneGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16), "cuda-planes"),
    (PlaneGrid(bits=6, group_size=40), "cuda-planes"),
    (KMeans(bits=5, rounds=2), "triton"),
]
"""Numbers, and who multiplies experts of them."""


@pytest.mark.parametrize(("grid", "kernel"), KERNELS, ids=str)
def test_every_kind_of_numbers(grid: Any, kernel: str) -> None:
    layer = experts_of(grid, 6, 150, 256, torch.bfloat16, "cuda")
    assert layer.kernel_name == kernel
    expert, bias = routing(40, 3, 6, "cuda"), torch.randn(6, 150, device="cuda").bfloat16()
    x = torch.randn(40, 256, device="cuda").bfloat16()
    wanted = wanted_of(layer, x, expert, bias)
    assert (product(layer, x, expert, bias).double() - wanted).norm() <= 6e-3 * wanted.norm()


@pytest.mark.parametrize("activations", ["int8", "int8-static", "fp8", "fp8-static"])
def test_inputs_are_rounded_as_the_checkpoint_asks(activations: Any) -> None:
    grid: Any = IntGrid(bits=8) if activations.startswith("int8") else Fp8Grid()
    layer = experts_of(grid, 6, 150, 256, torch.bfloat16, "cuda", activations)
    assert layer.kernel_name == ("cuda-int8" if activations.startswith("int8") else "cuda-rounded")
    expert, x = routing(40, 3, 6, "cuda"), torch.randn(40, 256, device="cuda").bfloat16()
    y, wanted = product(layer, x, expert), rounded_of(layer, x, expert)
    assert (y.double() - wanted).norm() <= 6e-3 * wanted.norm()
    plain = wanted_of(layer, x, expert, None)
    assert (y.double() - plain).norm() > 6e-3 * plain.norm(), "inputs were not rounded"


@pytest.mark.parametrize("grid", [IntGrid(bits=8), IntGrid(bits=4, group_size=32)], ids=str)
@pytest.mark.parametrize(("tokens", "run"), [(200, 128), (340, 192), (1000, 256)])
def test_long_runs_are_multiplied_in_integers(grid: IntGrid, tokens: int, run: int) -> None:
    """As one weight is: exactly but for the last rounding, with groups to the second rounding of the weight; the same bits."""
    layer = experts_of(grid, 6, 150, 256, torch.bfloat16, "cuda", "int8")
    expert, x = routing(tokens, 3, 6, "cuda"), torch.randn(tokens, 256, device="cuda").bfloat16()
    assert run_tokens(3 * tokens, 6) == run
    y, wanted = product(layer, x, expert), rounded_of(layer, x, expert)
    plans = cuda_grouped._int8_plans.values()
    assert any(plan is not None and plan.config.tokens == run for plan in plans)
    assert (y.double() - wanted).norm() <= (6e-3 if grid.group_size is None else 1.5e-2) * wanted.norm()
    assert all(torch.equal(product(layer, x, expert), y) for _ in range(3))


def test_rows_of_more_bits_join_their_rows() -> None:
    layer = with_rows(experts_of(IntGrid(bits=4, group_size=32), 6, 150, 256, torch.bfloat16, "cuda"), 5)
    expert, x = routing(40, 3, 6, "cuda"), torch.randn(40, 256, device="cuda").bfloat16()
    wanted = wanted_of(layer, x, expert, None)
    assert (product(layer, x, expert).double() - wanted).norm() <= 6e-3 * wanted.norm()


def test_experts_that_are_linears_of_their_own() -> None:
    linears = [layer_of(kind, 144, 544, bias=False) for kind in ("nf4", "planes", "outliers")]
    layer = ExpertLinears([[one] for one in linears])
    expert, x = routing(8, 2, 3, "cuda"), torch.randn(8, 544, device="cuda").bfloat16()
    with torch.no_grad():
        y = layer(x, expert, layer.routes(expert))
        for s, e in enumerate(expert.tolist()):
            wanted = linears[e](x[s // 2][None])[0] if e < 3 else torch.zeros_like(y[s])
            assert (y[s] - wanted).float().norm() <= 6e-3 * wanted.float().norm(), (s, e)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_of_experts_equals_its_dense_self(weights: torch.dtype) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(num_local_experts=6, num_experts_per_tok=2, hidden_size=256, intermediate_size=384)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        packed, dense = MixtralExperts(config).bfloat16(), MixtralExperts(config).bfloat16()
    for name, parameter in list(dense.named_parameters()):
        layer = experts_of(IntGrid(bits=4, group_size=32), *parameter.shape, torch.bfloat16, "cuda")
        dense.register_parameter(name, torch.nn.Parameter(layer.dequantize(torch.bfloat16) / 16, requires_grad=False))
        for scale in (held for key, held in layer._tensors().items() if "scale" in key):
            scale /= 16  # a power of two: the same numbers, small enough for two products
        replace_experts(packed, name, layer)
    assert packed.gate_act == "silu"
    for M in (1, 7, 300):
        x = torch.randn(M, 256, device="cuda").bfloat16()
        index = torch.rand(M, 6, device="cuda").topk(2).indices
        share = torch.rand(M, 2, device="cuda").softmax(-1).to(weights)
        wanted = dense(x, index, share).float()
        with torch.no_grad():
            assert (packed(x, index, share).float() - wanted).norm() <= 1e-2 * wanted.norm(), M


def test_damage_stays_in_its_token() -> None:
    weight, dense = stacked(4, 128, "none", torch.bfloat16)
    expert = loads(40, E)["even"]
    order, _, runs = route_experts(expert, E, 16)
    x = torch.randn(40, K, device="cuda").bfloat16()
    x[3, 5], x[17, 700], x[39, 0] = torch.inf, torch.nan, -torch.inf
    config = cuda_grouped.choose_config(weight, 16, 5, 5, 132)
    assert config is not None
    y = torch.empty(40, N, device="cuda", dtype=torch.bfloat16)
    Plan(weight, config, 40, torch.bfloat16, runs=most_runs(40, E, 16)).launch(x, None, None, y, runs=runs)
    wanted = torch.einsum("sk,snk->sn", x.double(), dense[expert[order.long()]])
    assert torch.equal(y.isfinite(), wanted.isfinite()) and torch.equal(y.isnan(), wanted.isnan())


@pytest.mark.parametrize("M", [4, 64])
def test_replays_of_overlapping_launches(M: int) -> None:
    """Eight layers of experts, each of which reads what the last one wrote, in a graph replayed three hundred times."""
    grid, experts, each, columns = IntGrid(bits=4, group_size=32, scale_dtype=torch.bfloat16), 6, 2, 512
    layer, expert = experts_of(grid, experts, columns, columns, torch.bfloat16, "cuda"), routing(M, each, experts, "cuda")
    first, share = torch.randn(M, columns, device="cuda").bfloat16(), torch.full((M, each), 0.04, device="cuda")

    def chain() -> list[torch.Tensor]:
        held = [first]
        for _ in range(8):
            routes = layer.routes(expert)
            held.append(layer.add(layer(layer.spread(held[-1], routes), expert, routes), share, routes))
        return held[1:]

    with torch.no_grad():
        wanted = chain()
        assert all(y.isfinite().all() and y.any() for y in wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chain()
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(300):
        for y in found:
            y.fill_(torch.nan)
        graph.replay()
        wrong += torch.stack([(y != right).any() for y, right in zip(found, wanted, strict=True)]).any()
    assert wrong.item() == 0, f"{wrong.item()} of 300 replays differ"
