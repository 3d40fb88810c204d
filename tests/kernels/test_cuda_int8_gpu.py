"""8-bit activations on a GPU: exactly the reference's integers, float results in the last bit, NaN and infinity kept."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tests.kernels.test_cuda_int8 import KINDS, weight_of
from tests.kernels.tile_weights import dense64
from torch import Tensor

from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm import cuda_fp8, cuda_int8
from aerogel.kernels.gemm.cuda_made import ACTS, Gated, Made, Normed
from aerogel.kernels.gemm.cuda_quantize import E4M3, INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import Config, deepest
from aerogel.kernels.gemm.ref import Reference, quantize_fp8, quantize_int8
from aerogel.kernels.problem import Problem
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

pytestmark = pytest.mark.gpu
ORDER = torch.tensor([16 * s + 2 * (j // 4) + j % 4 // 2 + 8 * (j % 2) for s in range(512) for j in range(16)])


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")


def there(weight: TileWeight) -> TileWeight:
    held = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "table", "pick")}
    moved = {name: None if tensor is None else tensor.cuda() for name, tensor in held.items()}
    return TileWeight(**moved, group_size=weight.group_size, N=weight.N, K=weight.K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [1, 16, 100, 4096, 5000])
def test_the_quantizer_rounds_as_the_reference(K: int, dtype: torch.dtype) -> None:
    x = (torch.randn(37, K) * torch.logspace(-3, 3, 37)[:, None]).to(dtype).cuda()
    x[5] = 0
    codes, scale = (part.cuda() for part in quantize_int8(x.cpu().float()))  # a GPU divides by numbers with their inverse
    columns = -(-K // 128) * 128
    for permuted in (False, True):
        found, s = Quantizer(dtype=dtype, device=x.device, output=INT8, columns=columns, permuted=permuted)(x)
        wanted = torch.nn.functional.pad(codes, (0, columns - K))
        assert torch.equal(s, scale[:, 0])
        assert torch.equal(found, wanted[:, ORDER[:columns].cuda()] if permuted else wanted)
    rounded, _ = Quantizer(dtype=dtype, device=x.device, output=ROUNDED, columns=columns)(x)
    assert torch.equal(rounded[:, :K], (codes.float() * scale).to(dtype)) and not rounded[:, K:].any()
    eight, s8 = Quantizer(dtype=dtype, device=x.device, output=E4M3, columns=columns)(x)
    wanted8, scale8 = (part.cuda() for part in quantize_fp8(x.cpu().float()))
    assert torch.equal(s8, scale8[:, 0]) and torch.equal(eight[:, :K].float(), wanted8.float())
    fixed = torch.tensor([0.5], device="cuda")
    given, s = Quantizer(dtype=dtype, device=x.device, output=INT8, columns=columns)(x, fixed)
    assert bool((s == 0.5).all()) and torch.equal(given[:, :K], (x.float() / 0.5).round().clamp(-127, 127).to(torch.int8))


def made_of(kind: str, M: int, K: int, dtype: torch.dtype) -> Made:
    x, both = torch.randn(M, K, device="cuda").to(dtype), torch.randn(M, 2 * K, device="cuda").to(dtype)
    if kind in ACTS:
        return Gated(both[:, :K], both[:, K:], kind)
    return Normed(x, torch.rand(K, device="cuda").to(torch.float32 if kind == "wide" else dtype), 1e-5, kind == "first")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["first", "last", "wide", *ACTS])
def test_what_a_norm_or_a_gate_makes_is_rounded_there(kind: str, dtype: torch.dtype) -> None:
    """The codes are those of the made numbers, but for a few whose 16 bits came out one unit off."""
    for K in (8, 104, 4096, 5000, 14336, 40000):
        made, columns = made_of(kind, 37, K, dtype), -(-K // 128) * 128
        assert made.in_pieces()
        quantizer = Quantizer(dtype=dtype, device=made.x.device, output=INT8, columns=columns, permuted=True)
        for fixed in (None, torch.tensor([0.02], device="cuda")):
            (codes, scale), apart = quantizer(made, fixed), quantizer(made.settled(), fixed)
            off = (codes.int() - apart[0].int()).abs()
            assert off.max() <= 1 and off.float().mean() <= 0.02 and (scale / apart[1] - 1).abs().max() <= 0.01, (K, fixed)
    made = made_of(kind, 37, 104, dtype)
    made.x[3, 5] = torch.inf
    made.x[7, 0] = torch.nan
    finite = Quantizer(dtype=dtype, device=made.x.device, output=INT8, columns=128, permuted=True)(made)[1].isfinite()
    assert not finite[7] and finite.sum() >= 35


def test_what_does_not_lie_in_pieces_is_made_first() -> None:
    wide = torch.randn(37, 205, device="cuda").bfloat16()
    quantizer = Quantizer(dtype=wide.dtype, device=wide.device, output=INT8, columns=128, permuted=True)
    for made in (Normed(wide[:, 1:101], wide[0, :100], 1e-5, True), Gated(wide[:, :100], wide[:, 100:200], "silu")):
        assert not made.in_pieces()
        for found, apart in zip(quantizer(made), quantizer(made.settled()), strict=True):
            assert torch.equal(found, apart)


@pytest.mark.parametrize("kind", ["first", "silu"])
def test_a_matmul_of_what_is_made(kind: str) -> None:
    weight = there(weight_of(4, 128, False, 320, 1024))
    r = cuda_int8.row_scale(weight)
    given = (weight.codes, weight.scale, None, r, torch.randn(320, device="cuda").bfloat16(), 128, 320)
    for M in (5, 300, 5000):  # rounded to 16 bits, and to bytes
        made = made_of(kind, M, 1024, torch.bfloat16)
        y = cuda_int8.tiles_linear_int8(made, *given)
        wanted = cuda_int8.tiles_linear_int8(made.settled(), *given)
        assert ((y.float() - wanted.float()).norm() / wanted.float().norm()).item() <= 5e-3, M
        fp8 = (torch.randn(320, 1024, device="cuda").to(torch.float8_e4m3fn), torch.rand(320, device="cuda"), None)
        y, wanted = cuda_fp8.fp8_linear(made, *fp8), cuda_fp8.fp8_linear(made.settled(), *fp8)
        assert ((y.float() - wanted.float()).norm() / wanted.float().norm()).item() <= 1e-2, M


def check(weight: TileWeight, M: int, dtype: torch.dtype, config: Config | None = None, bias: bool = False) -> None:
    """Against the integer reference: every float operation in the same order, so every bit must agree."""
    r = cuda_int8.row_scale(weight)
    x = torch.randn(M, weight.K, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).to(dtype)
    b = torch.randn(weight.N, device="cuda").to(dtype) if bias else None
    config = config or cuda_int8.cut(weight, *cuda_int8.CUTS[M % len(cuda_int8.CUTS)])
    runner = cuda_int8.many_tokens(weight, r, M, dtype, config)
    assert runner is not None
    found = []
    for _ in range(2):
        y = torch.full((M + 1, weight.N), torch.nan, dtype=dtype, device="cuda")
        runner(x, b, y[:M])
        assert y[M].isnan().all(), f"{config} writes past the last token"
        found.append(y[:M])
    codes, scale = (part.cuda() for part in quantize_int8(x.cpu().float()))
    sums = codes.double() @ cuda_int8.two_step(weight, r).double().T
    exact = sums * (r[: weight.N].double() * scale.double()) + (0 if b is None else b.double())
    what = f"{weight.bits} bits g{weight.group_size} [{M}, {weight.N}, {weight.K}] {dtype} {config}"
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    off = (found[0].double() - exact).abs()
    assert bool((off <= step * exact.abs() * 1.01 + 1e-6 * exact.abs().max()).all()), f"{what}: off by {off.max()}"
    assert torch.equal(found[0], found[1]), f"{what}: two runs differ"


@pytest.mark.parametrize(("bits", "size", "zero"), [*KINDS, (4, 0, True)])
def test_every_width_gives_the_references_integers(bits: int, size: int, zero: bool) -> None:
    for N, K, M in ((200, 700, 65), (33, 128, 300)):
        check(there(weight_of(bits, size, zero, N, K)), M, (torch.bfloat16, torch.float16)[bits % 2], bias=M == 65)


@pytest.mark.parametrize("numbers", cuda_int8.CUTS)
def test_every_cut_on_ragged_shapes(numbers: tuple[int, int, int, int]) -> None:
    for (N, K), M in itertools.product([(1, 512), (1000, 2049)], [17, 777]):
        weight = there(weight_of(4, 128, False, N, K))
        check(weight, M, torch.bfloat16, cuda_int8.cut(weight, *numbers))


SPLIT = (
    (16, 2, 1, 1, 6, 2),
    (32, 1, 1, 2, 5, 2),
    (48, 3, 1, 1, 2, 2),
    (64, 2, 1, 2, 3, 2),
    (64, 2, 2, 1, 4, 4),
    (96, 4, 1, 1, 2, 2),
    (128, 2, 1, 1, 3, 4),
)
"""Cuts whose blocks share K: tokens, warpgroups, blocks, resident, split and batch."""


@pytest.mark.parametrize("numbers", SPLIT)
def test_blocks_that_share_columns_add_integers(numbers: tuple[int, ...]) -> None:
    """Their sums are as exact as those of one block, so every bit is the same."""
    names = ("tokens", "warpgroups", "blocks", "resident", "split", "batch")
    for bits, size, N, K, dtype in ((8, 0, 1000, 2049, torch.bfloat16), (4, 128, 33, 1100, torch.float16)):
        weight = there(weight_of(bits, size, False, N, K))
        r = cuda_int8.row_scale(weight)
        wanted: dict[int, Tensor] = {}
        for split in (1, numbers[4]):
            given = dict(zip(names, numbers, strict=True)) | {"split": split}
            config = deepest(replace(weight, in_bytes=True), Config(**given))
            assert config is not None
            for M in (9, numbers[0], 2 * numbers[0] + 7):
                check(weight, M, dtype, config, bias=True)
                y = torch.empty(M, N, device="cuda", dtype=dtype)
                x = torch.randn(M, K, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).to(dtype)
                runner = cuda_int8.many_tokens(weight, r, M, dtype, config)
                assert runner is not None
                runner(x, None, y)
                assert torch.equal(wanted.setdefault(M, y), y), (config, M)


def test_few_tokens_many_tokens_and_the_operator_agree_with_the_specification() -> None:
    for grid, name in ((IntGrid(bits=4, group_size=128), "pack-quantized"), (IntGrid(bits=8), "int-quantized")):
        w = torch.randn(320, 1024, device="cuda") * 0.05
        codes = quantized(grid, w, grid.fit(w))
        problem = Problem(format=name, grid=grid, N=320, K=1024, dtype=torch.bfloat16, device="cuda", activations="int8")
        chosen, kernel = choose(problem)
        assert chosen == "cuda-int8"
        layout = kernel.pack(codes, problem)
        back = kernel.unpack(layout, problem)
        assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.scale_NG, codes.scale_NG)
        for M in (0, 1, 7, 16, 64, 97, 300, 9000):
            x, bias = torch.randn(M, 1024, device="cuda").bfloat16(), torch.randn(320, device="cuda").bfloat16()
            y = kernel.run(x, layout, problem, bias)
            wanted = Reference.run(x.float(), problem.stored.encode(codes), problem, bias)
            assert y.shape == wanted.shape
            assert M == 0 or ((y.float() - wanted).norm() / wanted.norm()).item() < 1.2e-2, (grid, M)


def test_fp8_agrees_with_the_specification() -> None:
    for strategy in ("channel", "tensor"):
        grid = Fp8Grid(strategy=strategy, scale_dtype=torch.bfloat16)
        w = torch.randn(320, 1024, device="cuda") * 0.05
        codes = quantized(grid, w, grid.fit(w))
        problem = Problem(
            format="float-quantized", grid=grid, N=320, K=1024, dtype=torch.bfloat16, device="cuda", activations="fp8"
        )
        chosen, kernel = choose(problem)
        assert chosen == "cuda-fp8"
        layout = kernel.pack(codes, problem)
        for M in (1, 16, 65, 300):
            x, bias = torch.randn(M, 1024, device="cuda").bfloat16(), torch.randn(320, device="cuda").bfloat16()
            wanted = Reference.run(x.float(), problem.stored.encode(codes), problem, bias)
            error = (kernel.run(x, layout, problem, bias).float() - wanted).norm() / wanted.norm()
            assert error.item() < 1.2e-2, (strategy, M)


def test_damage_stays_in_its_token() -> None:
    weight = there(weight_of(4, 128, False, 300, 704))
    x = torch.randn(100, 704, device="cuda").bfloat16()
    x[3, 5], x[17, 699], x[39, 0] = torch.inf, torch.nan, -torch.inf
    y = torch.empty(100, 300, device="cuda", dtype=torch.bfloat16)
    config = cuda_int8.cut(weight, *cuda_int8.CUTS[0])
    r = cuda_int8.row_scale(weight)  # a plan keeps nothing alive
    runner = cuda_int8.many_tokens(weight, r, 100, torch.bfloat16, config)
    assert runner is not None
    runner(x, None, y)
    bad = torch.zeros(100, dtype=torch.bool, device="cuda")
    bad[[3, 17, 39]] = True
    assert torch.equal(~y.isfinite().any(1), bad) and y[~bad].isfinite().all()


def test_compile_and_capture() -> None:
    weight = there(weight_of(4, 128, False, 256, 512))
    r = cuda_int8.row_scale(weight)

    def call(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aerogel.tiles_linear_int8(x, weight.codes, weight.scale, None, r, None, 128, 256)
        return y

    for M in (16, 16384):
        x = torch.randn(M, 512, device="cuda").bfloat16()
        wanted = torch.relu(call(x)) + 1
        found = torch.compile(lambda x: torch.relu(call(x)) + 1, fullgraph=True, dynamic=False)(x)
        torch.testing.assert_close(found, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.relu(call(x)) + 1
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)
    exact = x.double() @ dense64(weight).T
    assert ((call(x).double() - exact).norm() / exact.norm()).item() < 2e-2


@pytest.mark.parametrize("name", ["int-quantized", "pack-quantized", "float-quantized"])
def test_a_stored_scale_of_all_inputs(name: str) -> None:
    grid = {
        "int-quantized": IntGrid(bits=8),
        "pack-quantized": IntGrid(bits=4, group_size=128),
        "float-quantized": Fp8Grid(scale_dtype=torch.bfloat16),
    }[name]
    kind = "fp8-static" if name == "float-quantized" else "int8-static"
    w = torch.randn(320, 1024, device="cuda") * 0.05
    codes = quantized(grid, w, grid.fit(w))
    problem = Problem(format=name, grid=grid, N=320, K=1024, dtype=torch.bfloat16, device="cuda", activations=kind)
    chosen, kernel = choose(problem)
    assert chosen == ("cuda-fp8" if kind == "fp8-static" else "cuda-int8")
    scale = torch.tensor([3.0 / (448 if kind == "fp8-static" else 127)], device="cuda")  # what exceeds 3 is cut off
    layout, stored = (
        {**tensors, "input_scale": scale} for tensors in (kernel.pack(codes, problem), problem.stored.encode(codes))
    )
    for M in (1, 16, 65, 300, 2000):
        x = torch.randn(M, 1024, device="cuda").bfloat16()
        wanted = Reference.run(x.float(), stored, problem)
        assert ((kernel.run(x, layout, problem).float() - wanted).norm() / wanted.norm()).item() < 1.2e-2, M
