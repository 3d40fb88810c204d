"""The CUDA kernels on a GPU: every width, zero point, group and type against float64, on ragged shapes, however launched.

Outputs are poisoned with NaN; the same input twice gives the same bits; launches overlap in long replays of a graph and
must still give what a single launch gives. Builds are made side by side.
"""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.kernels.tile_weights import dense64

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda_dense import Dense, dequantize
from aerogel.kernels.gemm.cuda_few import Config, Few, defines, fits
from aerogel.kernels.gemm.cuda_few_plan import Plan
from aerogel.kernels.gemm.cuda_tune import random_numbers, random_weight
from aerogel.kernels.gemm.cuda_weight import TileWeight, tensors_of
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative Frobenius error against float64: the rounding of the output, everything before it being float32 or exact."""
REGISTERS = Config(ring=False, row_tiles=2, k_warps=4)
RINGS = [
    Config(ring=True, row_tiles=2, k_warps=2, stages=2),
    Config(ring=True, row_tiles=1, row_warps=2, k_warps=2, stages=2, x_resident=True),
    Config(ring=True, row_tiles=1, k_warps=2, stages=2, cluster=2),
    Config(ring=True, row_tiles=1, k_warps=2, stages=2, share=2),
    Config(ring=True, row_tiles=2, k_warps=2, stages=3, share=2, x_resident=True),
    Config(ring=True, row_tiles=1, k_warps=4, stages=2, share=2, x_resident=True),
    Config(ring=True, row_tiles=1, k_warps=2, stages=2, x_in_stage=True),
]
# (group_size, zero, scale dtype): each group and each kind of zero point and of scale at least once.
KINDS: list[tuple[int, str, torch.dtype]] = [
    (128, "none", torch.bfloat16),
    (32, "integer", torch.float16),
    (48, "float", torch.float32),
    (0, "integer", torch.bfloat16),
    (16, "none", torch.float16),
    (256, "float", torch.bfloat16),
    (64, "none", torch.float32),
]
SHAPES = [(1, 16), (37, 200), (33, 256), (130, 1100)]
TOKENS = (1, 2, 3, 7, 8, 9, 16)


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def configs() -> list[Config]:
    return [REGISTERS, *(RINGS if capability() >= (9, 0) else [])]


def weight_of(N: int, K: int, bits: int, kind: tuple[int, str, torch.dtype]) -> TileWeight:
    """Codes at random, scales of one sign and zero points inside or between the codes."""
    size, zero, dtype = kind
    generator = torch.Generator("cuda").manual_seed(N + 31 * K + bits)
    codes = torch.randint(0, 1 << bits, (N, K), device="cuda", generator=generator, dtype=torch.uint8)
    G = -(-K // size) if size else 1
    scale = (0.5 + torch.rand(N, G, device="cuda", generator=generator)).to(dtype)
    held = torch.randint(0, 1 << bits, (N, G), device="cuda", generator=generator)
    by_kind = {"none": None, "integer": held.to(torch.uint8), "float": (held + 0.375).to(dtype)}
    zero_NG = by_kind[zero]
    return TileWeight(
        codes=tiles.pack_tiles(codes, bits),
        scale=tiles.pack_rows_of_tiles(scale),
        zero=None if zero_NG is None else tiles.pack_rows_of_tiles(zero_NG),
        table=None,
        pick=None,
        group_size=size,
        N=N,
        K=K,
    )


def check(weight: TileWeight, dense: torch.Tensor, config: Config, M: int, dtype: torch.dtype, bias: bool = False) -> None:
    """Runs, compares with `dense` in float64, runs again and compares bits."""
    x = torch.randn(M, weight.K, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).to(dtype)
    b = torch.randn(weight.N, device="cuda").to(dtype) if bias else None
    plan = Plan(weight, config, M, dtype)
    found = []
    for _ in range(2):
        y = torch.full((M, weight.N), torch.nan, dtype=dtype, device="cuda")
        plan(x, b, y)
        found.append(y)
    exact = x.double() @ dense.T
    wanted = exact if b is None else exact + b.double()
    error = ((found[0].double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
    worst = int((found[0].double() - wanted).abs().nan_to_num(torch.inf).argmax())
    # One output alone may nearly cancel; many do not.
    bound = BOUND[dtype] if wanted.numel() >= 32 else 0.02
    what = f"{weight.bits} bits g{weight.group_size} [{M}, {weight.N}, {weight.K}] {config}"
    assert error <= bound, f"{what}: {error:.2e}, worst at {divmod(worst, weight.N)}"
    assert torch.equal(found[0], found[1]), f"{what}: two runs differ"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All builds of the parametrised tests, side by side; where the tests themselves run side by side, each makes its own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    from aerogel.kernels.cuda.sources import compile_ahead

    wanted = []
    for bits, (place, kind) in itertools.product(range(1, 9), enumerate(KINDS)):
        weight = weight_of(37, 200, bits, kind)
        dtype = (torch.bfloat16, torch.float16)[(bits + place) % 2]
        wanted += [(f"{config.kernel}.cu", defines(weight, config, M, dtype)) for config in configs() for M in (8, 16)]
    compile_ahead(wanted, capability(), workers=16)


@pytest.mark.parametrize("kind", list(enumerate(KINDS)), ids=lambda kind: f"g{kind[1][0]}-{kind[1][1]}")
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_against_float64(bits: int, kind: tuple[int, tuple[int, str, torch.dtype]]) -> None:
    dtype = (torch.bfloat16, torch.float16)[(bits + kind[0]) % 2]
    for N, K in SHAPES:
        weight = weight_of(N, K, bits, kind[1])
        dense = dense64(weight)
        assert (dequantize(weight, dtype).double() - dense).norm() <= BOUND[dtype] * dense.norm()
        for place, config in enumerate(configs()):
            for M in TOKENS[place % 2 :: 2] if N > 1 else (1, 9):
                check(weight, dense, config, M, dtype, bias=M in (2, 9))


@pytest.mark.parametrize("size", [0, 48, 128])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_integer_zero_points_of_four_bits(dtype: torch.dtype, size: int) -> None:
    """They leave with the power of two that decoding puts under a code: those of both types, and one beyond all codes."""
    weight = weight_of(130, 1100, 4, (size, "integer", dtype))
    assert weight.zero is not None
    weight.zero[1::2] = 16
    dense = dense64(weight)
    for config, M in itertools.product(configs()[::3], (1, 8, 16)):
        check(weight, dense, config, M, dtype)


@pytest.mark.skipif(not torch.cuda.is_available() or capability() < (9, 0), reason="rings need compute capability 9.0")
@pytest.mark.parametrize("k_warps", [2, 3])
@pytest.mark.parametrize("N", [130, 4500])
def test_partial_sums_in_two_turns(N: int, k_warps: int) -> None:
    """Of an even and an odd number of slices, of one row block and of several one after the other."""
    weight = weight_of(N, 1100, 4, (64, "integer", torch.bfloat16))
    dense = dense64(weight)
    for row_warps, M in itertools.product((1, 2), (5, 16)):
        ring = Config(ring=True, row_tiles=1, row_warps=row_warps, k_warps=k_warps, stages=2, half_sums=True)
        check(weight, dense, ring, M, torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
def test_tables(bits: int, scope: str) -> None:
    for dtype, (N, K) in itertools.product((torch.bfloat16, torch.float16), [(37, 200), (64, 512)]):
        plain = weight_of(N, K, bits, (32, "none", torch.float32))
        R, G = plain.scale.shape[:2]
        count = {"tensor": 1, "row": R * 16, "group": 5}[scope]
        table = torch.randn(count, 1 << bits, device="cuda").to(dtype)
        pick = torch.randint(0, count, (R, G, 16), device="cuda", dtype=torch.uint8) if scope == "group" else None
        weight = TileWeight(codes=plain.codes, scale=plain.scale, zero=None, table=table, pick=pick, group_size=32, N=N, K=K)
        weight.check()
        dense = dense64(weight)
        assert (dequantize(weight, dtype).double() - dense).norm() <= BOUND[dtype] * dense.norm()
        for config in configs()[:2]:
            for M in (1, 9):
                check(weight, dense, config, M, dtype)


@pytest.mark.parametrize("name", ["table", "rows", "groups"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_tables_over_several_row_blocks(name: str, dtype: torch.dtype) -> None:
    """A block's later row blocks want other tables of rows, which lie there as pairs, so often, or one by one."""
    facts = torch.cuda.get_device_properties(0)
    for N in (200, 80 * facts.multi_processor_count):
        weight = random_numbers(N, 640, name, 0 if name == "rows" else 64, "cuda")
        weight = replace(weight, table=None if weight.table is None else weight.table.to(dtype))
        dense = dense64(weight)
        tall = [replace(config, row_tiles=1) for config in configs()]  # five row blocks of a block of threads
        beside = [replace(config, beside=True) for config in (*configs(), *tall) if config.ring]
        laid = zip((*configs(), *beside), itertools.cycle((0, 1, 2)))
        cuts = [replace(config, copies=copies) for config, copies in laid] if name == "rows" else configs()
        for config, M in itertools.product(cuts, (3, 16)):
            if fits(weight, config, M, capability(), facts.multi_processor_count):
                check(weight, dense, config, M, dtype)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_configurations_that_tuning_considers(bits: int) -> None:
    facts = torch.cuda.get_device_properties(0)
    weight = random_weight(1040, 2176, bits, 64, "cuda", zero="integer")
    for config in [
        Config(ring=False, row_tiles=1, k_warps=16),
        Config(ring=True, row_tiles=7, k_warps=4, stages=3),
        Config(ring=True, row_tiles=2, row_warps=7, k_warps=1, stages=4),
        Config(ring=True, row_tiles=3, row_warps=2, k_warps=4, stages=2, cluster=4, x_resident=True),
        Config(ring=True, row_tiles=7, k_warps=8, stages=2),
        Config(ring=True, row_tiles=5, row_warps=2, k_warps=4, stages=2, share=2),
        Config(ring=True, row_tiles=1, k_warps=16, stages=2, seats=2),
        Config(ring=True, row_tiles=2, k_warps=7, stages=2, x_in_stage=True),
    ]:
        if fits(weight, config, 16, capability(), facts.multi_processor_count):
            for M in (1, 16):
                check(weight, dense64(weight), config, M, torch.bfloat16)


def test_inf_and_nan_reach_their_token_and_no_other() -> None:
    weight = weight_of(37, 200, 4, KINDS[0])
    for config in configs():
        x = torch.randn(4, 200, device="cuda").bfloat16()
        clean = torch.empty(4, 37, device="cuda", dtype=torch.bfloat16)
        plan = Plan(weight, config, 4, torch.bfloat16)
        plan(x, None, clean)
        for bad in (torch.inf, torch.nan):
            spoiled, y = x.clone(), torch.zeros_like(clean)
            spoiled[2, 199] = bad
            plan(spoiled, None, y)
            assert not torch.isfinite(y[2]).any()
            assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def operator(weight: TileWeight) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aerogel.tiles_linear(
            x, weight.codes, weight.scale, weight.zero, weight.table, weight.pick, bias, weight.group_size, weight.N
        )
        return found

    return call


@pytest.mark.parametrize("M", [0, 1, 5, 16, 17, 40, 97, 300])
def test_the_operator_takes_any_number_of_tokens_and_any_strides(M: int) -> None:
    weight = weight_of(130, 200, 4, KINDS[1])
    call = operator(weight)
    wide = torch.randn(M, 403, device="cuda").bfloat16()
    for x in (wide[:, 1:201], wide[:, 3:203], torch.randn(200, M, device="cuda").bfloat16().T):
        bias = torch.randn(130, device="cuda")
        y = call(x, bias)
        wanted = x.double() @ dense64(weight).T + bias.double()
        assert y.shape == (M, 130)
        assert M == 0 or (y.double() - wanted).norm() / wanted.norm() < 2 * BOUND[torch.bfloat16]


def test_dense_path_equals_few() -> None:
    weight = weight_of(130, 1100, 3, KINDS[2])
    x = torch.randn(16, 1100, device="cuda").bfloat16()
    few, dense = (torch.full((16, 130), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    Few.plan(weight, 16, x.dtype)(x, None, few)
    Dense.plan(weight, 16, x.dtype)(x, None, dense)
    wanted = x.double() @ dense64(weight).T
    assert (few.double() - wanted).norm() <= (dense.double() - wanted).norm() * 1.2


@pytest.mark.parametrize("M", [1, 9])
def test_long_replays_of_overlapping_launches(M: int) -> None:
    """A chain where each launch reads what the last one wrote, 64 deep, replayed 1000 times, with other weights between."""
    N = K = 1024
    weights = [random_weight(N, K, 4, 128, "cuda", seed=seed) for seed in range(4)]
    for config in configs():
        if not fits(weights[0], config, M, capability(), 132):
            continue
        plans = [Plan(weight, config, M, torch.bfloat16) for weight in weights]
        x = torch.randn(M, K, device="cuda").bfloat16()
        buffers = [torch.empty(M, N, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        def chain(plans: list[Plan] = plans, x: torch.Tensor = x, buffers: list[torch.Tensor] = buffers) -> torch.Tensor:
            held = x
            for step in range(64):
                plans[step % 4](held, None, buffers[step % 2])
                held = buffers[step % 2]
            return held

        wanted = None
        for _ in range(2):
            torch.cuda.synchronize()
            wanted = chain().clone()
        assert wanted is not None and bool(torch.isfinite(wanted).all()) and bool(wanted.any())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        wrong = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(1000):
            for buffer in buffers:
                buffer.fill_(torch.nan)
            graph.replay()
            wrong += (buffers[1] != wanted).any()
        assert wrong.item() == 0, f"{wrong.item()} of 1000 replays differ with {config}"


def test_compile_and_capture() -> None:
    weight = weight_of(130, 200, 4, KINDS[0])
    call = operator(weight)
    x = torch.randn(3, 200, device="cuda").bfloat16()
    wanted = torch.relu(call(x)) + 1
    torch.testing.assert_close(torch.compile(lambda x: torch.relu(call(x)) + 1, fullgraph=True)(x), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.relu(call(x)) + 1
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, torch.relu(call(x)) + 1)
    checks = torch.library.opcheck(
        torch.ops.aerogel.tiles_linear.default,
        (x, weight.codes, weight.scale, None, None, None, None, weight.group_size, weight.N),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "grid", [IntGrid(bits=4, group_size=32, symmetric=False), IntGrid(bits=8), Fp8Grid(), Fp8Grid(strategy="block")]
)
def test_the_kernel_serves_problems_and_inverts_its_layout(grid: IntGrid | Fp8Grid) -> None:
    dense = torch.randn(160, 256, device="cuda")
    codes = quantized(grid, dense, grid.fit(dense))
    name = "pack-quantized" if isinstance(grid, IntGrid) else "float-quantized"
    problem = Problem(format=name, grid=grid, N=160, K=256, dtype=torch.bfloat16, device="cuda")
    chosen, kernel = choose(problem)
    assert chosen == "cuda"
    layout = kernel.pack(codes, problem)
    back: Codes = kernel.unpack(layout, problem)
    assert torch.equal(back.values_NK.view(torch.uint8), codes.values_NK.view(torch.uint8))
    assert torch.equal(back.scale_NG, codes.scale_NG)
    x = torch.randn(7, 256, device="cuda").bfloat16()
    wanted = x.double() @ codes.decode().double().T
    assert (kernel.run(x, layout, problem).double() - wanted).norm() / wanted.norm() < BOUND[torch.bfloat16]


@pytest.mark.xdist_group("large")
def test_indices_beyond_two_to_the_31() -> None:
    """More than 2^31 bytes of codes in one weight; the last rows are right."""
    N, K = 1 << 17, 1 << 15
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free device memory")
    weight = random_weight(N, K, 4, 128, "cuda")
    assert weight.codes.nbytes >= 1 << 31
    x = torch.randn(2, K, device="cuda").bfloat16()
    last = TileWeight(
        codes=weight.codes[-4:].contiguous(), scale=weight.scale[-4:].contiguous(), zero=None, table=None, pick=None,
        group_size=128, N=64, K=K,
    )  # fmt: skip
    wanted = x.double() @ dense64(last).T
    for config in configs():
        y = torch.full((2, N), torch.nan, dtype=x.dtype, device="cuda")
        Plan(weight, config, 2, x.dtype)(x, None, y)
        assert torch.isfinite(y).all() and (y[:, -64:].double() - wanted).norm() / wanted.norm() < BOUND[x.dtype]


def test_layouts_of_the_class_and_the_function_agree() -> None:
    grid = IntGrid(bits=5, group_size=32, symmetric=False)
    dense = torch.randn(48, 96, device="cuda")
    codes = quantized(grid, dense, grid.fit(dense))
    layout = tensors_of(codes)
    weight = TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=layout["tile_zero"], table=None, pick=None,
        group_size=32, N=48, K=96,
    )  # fmt: skip
    torch.testing.assert_close(dense64(weight).float(), codes.decode())
    assert cuda.choose(weight, 1, torch.bfloat16, capability()) is Few


def test_matmuls_without_a_toolkit(tmp_path: Path) -> None:
    """With every trace of a toolkit hidden and nothing compiled yet, kernels for few and many tokens compile and run;
    the compiler is the one beside torch."""
    if not Path(nvrtc.candidates()[0]).is_absolute():
        pytest.skip("NVRTC comes from the system here, not from a wheel")
    hidden = {"CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDACXX", "LD_LIBRARY_PATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": "/nowhere", "AEROGEL_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = """
import torch
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_tune import random_weight

weight = random_weight(200, 712, 4, 128, "cuda")
for M in (3, 70):
    x_MK, y_MN = torch.randn(M, 712, device="cuda").bfloat16(), torch.empty(M, 200, device="cuda", dtype=torch.bfloat16)
    cuda.choose(weight, M, x_MK.dtype, torch.cuda.get_device_capability()).plan(weight, M, x_MK.dtype)(x_MK, None, y_MN)
    wanted = (x_MK @ dequantize(weight, torch.bfloat16).T).float()
    assert (y_MN.float() - wanted).norm() < 1e-2 * wanted.norm()
print({line.split()[-1] for line in open("/proc/self/maps") if "nvrtc" in line})
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    beside = str(Path(nvrtc.candidates()[0]).resolve().parent)
    mapped = ast.literal_eval(result.stdout)
    assert mapped and all(path.startswith(beside) for path in mapped), mapped
    assert len(list(tmp_path.rglob("*.cubin"))) >= 3
