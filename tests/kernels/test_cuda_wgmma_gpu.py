"""The many-token kernel on a Hopper GPU: every width, group, zero point, table, type and cut against float64.

Shapes are ragged, outputs poisoned, the same bits come twice and after overlapped launches; inf and NaN stay in their tokens;
more than 2^31 outputs are addressed.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tests.kernels.tile_weights import dense64

from aerogel.kernels.cuda import sources
from aerogel.kernels.gemm.cuda_tune import random_numbers
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import SOURCE, Config, choose_config, deepest, defines
from aerogel.kernels.gemm.cuda_wgmma_plan import Parts, Plan
from aerogel.kernels.gemm.cuda_wgmma_rounds import in_rounds
from aerogel.pack import tiles

pytestmark = pytest.mark.gpu

HOPPER = (9, 0)
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative Frobenius error: the weight, its scale and the output are each rounded once to the activations' type."""
SMALL = Config(tokens=32, x_stages=4, w_stages=2)

CONFIGS = [
    SMALL,
    Config(tokens=64, warpgroups=3, batch=2, w_tiles=2, x_stages=4, w_stages=2),
    Config(tokens=32, blocks=2, split=3, x_stages=4, w_stages=2),
    Config(tokens=64, share=2, split=2, x_stages=4, w_stages=2, batch=8),
    Config(tokens=48, resident=2, batch=2, x_stages=3, w_stages=2),
    Config(tokens=256, lead=2, x_stages=4, w_stages=2),
]


VARIANTS = [
    (128, "none", torch.bfloat16),
    (32, "integer", torch.float16),
    (48, "float", torch.float32),
    (0, "integer", torch.bfloat16),
    (16, "none", torch.float32),
    (256, "float", torch.bfloat16),
]
"""Group size, zero point and scale type."""


@pytest.fixture(scope="module")
def hopper() -> None:
    """Skips on other devices; compiles what the tests will ask for side by side."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    wanted = [
        (SOURCE, defines(weight, small_for(weight), dtype_of(bits + place)))
        for bits in range(1, 9)
        for place, kind in enumerate(VARIANTS)
        for weight in [weight_of(200, 700, bits, *kind)]
    ]
    sources.compile_ahead(wanted, HOPPER, workers=16)


def dtype_of(number: int) -> torch.dtype:
    return (torch.bfloat16, torch.float16)[number % 2]


def small_for(weight: TileWeight) -> Config:
    return deepest(weight, SMALL) or SMALL


def weight_of(N: int, K: int, bits: int, size: int, zero: str, dtype: torch.dtype, seed: int = 0) -> TileWeight:
    """Random codes; scales of one sign; zero points among the codes, or between them."""
    generator = torch.Generator("cuda").manual_seed(N + 31 * K + bits + seed)
    codes = torch.randint(0, 1 << bits, (N, K), device="cuda", generator=generator, dtype=torch.uint8)
    G = -(-K // size) if size else 1
    scale = (0.5 + torch.rand(N, G, device="cuda", generator=generator)).to(dtype) / 8
    held = torch.randint(0, 1 << bits, (N, G), device="cuda", generator=generator)
    zeros = {"none": None, "integer": held.to(torch.uint8), "float": (held + 0.375).to(dtype)}[zero]
    return TileWeight(
        codes=tiles.pack_tiles(codes, bits),
        scale=tiles.pack_rows_of_tiles(scale),
        zero=None if zeros is None else tiles.pack_rows_of_tiles(zeros),
        table=None,
        pick=None,
        group_size=size,
        N=N,
        K=K,
    )


def check(weight: TileWeight, config: Config, M: int, dtype: torch.dtype, bias: bool = False) -> None:
    """Against float64, twice, with NaN where nothing may be written."""
    x = torch.randn(M, weight.K, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).to(dtype)
    b = torch.randn(weight.N, device="cuda").to(dtype) if bias else None
    plan = Plan(weight, config, M, dtype)
    assert plan.function.attribute("local_bytes") == 0, config
    found = []
    for _ in range(2):
        y = torch.full((M + 1, weight.N), torch.nan, dtype=dtype, device="cuda")
        plan(x, b, y[:M])
        assert y[M].isnan().all(), f"{config} writes past the last token"
        found.append(y[:M])
    wanted = x.double() @ dense64(weight).T + (0 if b is None else b.double())
    error = ((found[0].double() - wanted).norm() / wanted.norm()).item()
    worst = divmod(int((found[0].double() - wanted).abs().nan_to_num(torch.inf).argmax()), weight.N)
    what = f"{weight.bits} bits g{weight.group_size} [{M}, {weight.N}, {weight.K}] {dtype} {config}"
    assert error <= BOUND[dtype] * (1 if wanted.numel() >= 32 else 4), f"{what}: {error:.2e}, worst at {worst}"
    assert torch.equal(found[0], found[1]), f"{what}: two runs differ"


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_against_float64(hopper: None, bits: int) -> None:
    for place, (size, zero, scale) in enumerate(VARIANTS):
        for N, K, M in ((200, 700, 40), (33, 128, 17)):
            weight = weight_of(N, K, bits, size, zero, scale)
            check(weight, small_for(weight), M, dtype_of(bits + place), bias=M == 40)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cut_on_ragged_shapes(hopper: None, config: Config) -> None:
    for (N, K), M in itertools.product([(1, 512), (520, 1032), (1000, 2049)], [17, 300]):
        check(weight_of(N, K, 4, 128, "none", torch.bfloat16), config, M, torch.bfloat16, bias=M == 17)


def test_the_configurations_that_the_rule_chooses(hopper: None) -> None:
    for N, K, M in ((4096, 1024, 16), (4096, 2048, 100), (1536, 576, 700), (576, 1536, 2000), (49152, 576, 33)):
        weight = weight_of(N, K, 4, 64, "integer", torch.bfloat16)
        config = choose_config(weight, M, torch.cuda.get_device_properties(0).multi_processor_count)
        assert config is not None
        check(weight, config, M, torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
def test_tables(hopper: None, bits: int, scope: str) -> None:
    if bits == 8 and scope == "row":
        pytest.skip("one table of 256 entries for each row does not fit; refused")
    for dtype, size in itertools.product((torch.bfloat16, torch.float16), (32, 0)):
        plain = weight_of(100, 700, bits, size, "none", torch.float32)
        R, G = plain.scale.shape[:2]
        count = {"tensor": 1, "row": R * 16, "group": 4}[scope]
        pick = torch.randint(0, 4, (R, G, 16), device="cuda", dtype=torch.uint8) if scope == "group" else None
        table = torch.randn(count, 1 << bits, device="cuda").to(torch.float16)
        held = {name: getattr(plain, name) for name in ("codes", "scale", "zero", "group_size", "N", "K")}
        check(TileWeight(table=table, pick=pick, **held), SMALL, 40, dtype)


@pytest.mark.parametrize("name", ["table", "rows", "groups"])
def test_tables_over_several_row_blocks(hopper: None, name: str) -> None:
    """A block's later row blocks want other tables of rows, which lie there as pairs, so often, or one by one."""
    for N, dtype in ((200, torch.float16), (300 * 64, torch.bfloat16)):
        weight = random_numbers(N, 384, name, 0 if name == "rows" else 64, "cuda")
        assert weight.table is not None
        weight = replace(weight, table=weight.table.to(dtype))
        for config, copies in itertools.product((SMALL, CONFIGS[1], CONFIGS[2]), (0, 1, 2) if name == "rows" else (1,)):
            cut = deepest(weight, replace(config, copies=copies))
            if cut is not None:
                check(weight, cut, 40, dtype)


def chain(plans: list[Plan], start: torch.Tensor, steps: list[torch.Tensor], apart: bool = False) -> None:
    """Each layer eats the one before it; now and then another kernel stands between."""
    for place, step in enumerate(steps):
        plans[place % len(plans)](steps[place - 1] if place else start, None, step)
        if place % 7 == 3:
            step.clamp_(-4, 4)
        if apart:
            torch.cuda.synchronize()


def test_overlapped_replays_give_the_bits_of_single_launches(hopper: None) -> None:
    weights = [weight_of(1024, 1024, 4, 128, "none", torch.bfloat16, seed) for seed in range(4)]
    for config in (CONFIGS[0], CONFIGS[2], CONFIGS[3], Config(tokens=32, resident=2, batch=4, x_stages=4, w_stages=3)):
        plans = [Plan(weight, config, 48, torch.bfloat16) for weight in weights]
        start = torch.randn(48, 1024, device="cuda").bfloat16()
        steps = [torch.empty_like(start) for _ in range(20)]

        chain(plans, start, steps, apart=True)
        wanted = [step.clone() for step in steps]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(plans, start, steps)
        for _ in range(50):
            for step in steps:
                step.fill_(torch.nan)
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(steps, wanted, strict=True)), config


def test_inf_and_nan_stay_in_their_tokens(hopper: None) -> None:
    weight = weight_of(300, 700, 4, 128, "none", torch.bfloat16)
    x = torch.randn(40, 700, device="cuda").bfloat16()
    x[3, 5], x[17, 699], x[39, 0] = torch.inf, torch.nan, -torch.inf
    y = torch.empty(40, 300, device="cuda", dtype=torch.bfloat16)
    Plan(weight, SMALL, 40, torch.bfloat16)(x, None, y)
    wanted = x.double() @ dense64(weight).T
    assert torch.equal(y.isfinite(), wanted.isfinite()) and torch.equal(y.isnan(), wanted.isnan())
    clean = wanted.isfinite().all(1)
    assert (y[clean].double() - wanted[clean]).norm() <= BOUND[torch.bfloat16] * wanted[clean].norm()


def test_misaligned_and_strided_inputs(hopper: None) -> None:
    weight = weight_of(128, 640, 4, 128, "none", torch.bfloat16)
    plan = Plan(weight, SMALL, 20, torch.bfloat16)
    room = torch.randn(20 * 640 + 3, device="cuda").bfloat16()
    for x in (room[3:].view(20, 640), torch.randn(640, 20, device="cuda").bfloat16().T):
        y = torch.full((20, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
        plan(x, None, y)
        wanted = x.double() @ dense64(weight).T
        assert (y.double() - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()


def test_more_than_two_to_the_31_outputs(hopper: None) -> None:
    N, K, M = 139264, 128, 16384
    weight = weight_of(N, K, 4, 128, "none", torch.bfloat16)
    x = torch.randn(M, K, device="cuda").bfloat16()
    y = torch.full((M, N), torch.nan, device="cuda", dtype=torch.bfloat16)
    Plan(weight, Config(tokens=256, x_stages=4, w_stages=2, lead=2), M, torch.bfloat16)(x, None, y)
    assert not y.isnan().any()
    wanted = x[-50:].double() @ dense64(weight)[-1000:].T
    assert (y[-50:, -1000:].double() - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()


def test_a_layer_in_two_parts(hopper: None) -> None:
    weight = weight_of(1000, 1024, 4, 128, "integer", torch.bfloat16)
    x, bias = torch.randn(300, 1024, device="cuda").bfloat16(), torch.randn(1000, device="cuda").bfloat16()
    y = torch.full((300, 1000), torch.nan, device="cuda", dtype=torch.bfloat16)
    Parts(weight, [(640, CONFIGS[-1]), (360, CONFIGS[1])], 300, torch.bfloat16)(x, bias, y)
    wanted = x.double() @ dense64(weight).T + bias.double()
    assert (y.double() - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()


@pytest.mark.parametrize("kind", ["integers", "table", "rows", "groups", "nvfp4", "mxfp4"])
def test_rows_beyond_whole_rounds_are_a_launch_of_their_own(hopper: None, kind: str) -> None:
    """As many rows as fill the device one and a half times; each launch has the tables and factors of its own rows."""
    N = 384 * torch.cuda.get_device_properties(0).multi_processor_count
    if kind == "integers":
        weight = weight_of(N, 4096, 4, 128, "none", torch.bfloat16)
    else:
        weight = random_numbers(N, 4096, kind, {"rows": 0, "nvfp4": 16, "mxfp4": 32}.get(kind, 64), "cuda")
        weight = replace(weight, table=None if weight.table is None else weight.table.bfloat16())
    x, bias = torch.randn(100, 4096, device="cuda").bfloat16(), torch.randn(N, device="cuda").bfloat16()
    cut = deepest(weight, Config(tokens=128, blocks=2))
    assert cut is not None
    cuts = in_rounds(weight, cut, 100, torch.cuda.get_device_properties(0).multi_processor_count)
    assert [rows for rows, _ in cuts] == [N // 3 * 2, N // 3]
    y = torch.full((100, N), torch.nan, device="cuda", dtype=torch.bfloat16)
    Parts(weight, cuts, 100, torch.bfloat16)(x, bias, y)
    wanted = x.double() @ dense64(weight).T + bias.double()
    assert (y.double() - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()
