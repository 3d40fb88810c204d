"""What stands beside a weight is added as defined, by the compiled loops and the CUDA kernel, inside a matmul and after one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside import choose, cpu, cuda, ref
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm.cpu import Native, linear
from aerogel.kernels.gemm.cpu_lookup import NativeLookup
from aerogel.kernels.gemm.cpu_own import NativeOwn
from aerogel.kernels.gemm.cpu_tables import NativeTables
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.quantize.codes import quantized
from aerogel.quantize.columns import Columns
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid
from aerogel.quantize.outliers import Outliers
from aerogel.quantize.planes import PlaneGrid

needs_library = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def beside_of(N: int, K: int, kinds: str, value: torch.dtype, share: float = 0.1, device: str = "cpu") -> Beside:
    """Random outliers (one row without any, one with all) and columns, the first and the last among them."""
    random = torch.Generator().manual_seed(N + K)
    w_NK = torch.randn(N, K, generator=random)
    mask_NK = torch.rand(N, K, generator=random) < share
    mask_NK[0] = False
    mask_NK[-1] = True
    outliers, columns = Outliers.of(w_NK, mask_NK), Columns.of(w_NK, torch.tensor(sorted({0, K // 2, K - 1})))
    first = (outliers.start_N1, outliers.column_E, outliers.value_E.to(value)) if "o" in kinds else (None, None, None)
    last = (columns.index_C, columns.value_NC.to(value)) if "c" in kinds else (None, None)
    return Beside(*(None if tensor is None else tensor.to(device) for tensor in (*first, *last)))


def close(found_MN: Tensor, wanted_MN: Tensor) -> None:
    assert found_MN.shape == wanted_MN.shape
    error = (found_MN.double() - wanted_MN.double()).norm() / wanted_MN.double().norm()
    assert error <= TOLERANCE[found_MN.dtype], float(error)


@needs_library
@pytest.mark.parametrize("kinds", ["o", "c", "oc"])
@pytest.mark.parametrize("value", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 2, 4, 5, 16, 17, 40])
def test_the_compiled_loop_is_the_definition(kinds: str, value: torch.dtype, dtype: torch.dtype, M: int) -> None:
    for N, K in ((1, 1), (33, 50), (300, 96)):
        beside = beside_of(N, K, kinds, value)
        random = torch.Generator().manual_seed(M)
        x_MK, y_MN = torch.randn(M, K, generator=random).to(dtype), torch.randn(M, N, generator=random).to(dtype)
        assert cpu.fits(N, beside)
        found = choose.add(y_MN, x_MK, beside)
        close(found, ref.add(y_MN.float(), x_MK.float(), beside))
        assert torch.equal(cpu.add(y_MN.clone(), x_MK, beside), found)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numerics", ["exact", "int8", "int8-token"])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("M", [1, 3, 16, 33])
def test_inside_a_matmul_on_every_path(dtype: torch.dtype, numerics: str, bits: int, M: int) -> None:
    """The same as the product followed by the addition, to one more rounding; the same bits with any number of threads."""
    N, K = 72, 160
    random = torch.Generator().manual_seed(bits)
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (N, K), dtype=torch.int8, generator=random)
    beside = beside_of(N, K, "oc", torch.bfloat16)
    assert beside.index_C is not None
    values[:, beside.index_C.long()] = 0
    codes = Codes(values_NK=values, scale_NG=torch.rand(N, 5, generator=random), grid=IntGrid(bits=bits, group_size=32))
    problem = Problem(format="pack-quantized", grid=codes.grid, N=N, K=K, dtype=dtype)
    layout = Native.pack(codes, problem)
    x_MK = torch.randn(M, K, generator=random).to(dtype)
    x_MK[:, beside.index_C.long()] *= 100
    quiet_MK = x_MK if numerics == "exact" else x_MK.index_fill(1, beside.index_C.long(), 0)
    for path in library.paths():
        rest: Any = layout["codes"], layout["scale"], None, None, N, 32, library.NUMERICS[numerics], library.PATHS.index(path)
        found = [linear(x_MK, *rest, threads=threads, beside=beside) for threads in (1, 2, 5)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), path
        close(found[0], ref.add(linear(quiet_MK, *rest).float(), x_MK.float(), beside))


@needs_library
@pytest.mark.skipif(
    library.missing() is not None or library.best("exact") not in library.BFLOAT16_PATHS,
    reason="no path of this machine multiplies bfloat16",
)
@pytest.mark.parametrize("share", [0.003, 0.01, 0.1, 0.7])
@pytest.mark.parametrize(("N", "K"), [(72, 160), (1, 64), (40, 65), (129, 1000), (16, 40000)])
def test_tiles_add_what_rows_add(share: float, N: int, K: int) -> None:
    """To one more rounding, on every path and with any number of threads; a path that cannot read tiles reads rows."""
    beside = beside_of(N, K, "o", torch.bfloat16, share)
    values = torch.zeros(N, K, dtype=torch.int8)
    codes = Codes(values_NK=values, scale_NG=torch.ones(N, 1), grid=IntGrid(bits=4))
    layout = Native.pack(codes, Problem(format="pack-quantized", grid=codes.grid, N=N, K=K))
    tiled = replace(beside, tiles=cpu.tiles_of(beside, N, K, torch.bfloat16))
    assert tiled.tiles is not None and set(tiled.operands()) == set(beside.operands()) | {"beside_tiles"}
    for M in (1, 2, 3, 4, 5):
        x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
        wanted = ref.add(torch.zeros(M, N), x_MK.float(), beside)
        for path in library.paths():
            rest: Any = layout["codes"], layout["scale"], None, None, N, 0, 0, library.PATHS.index(path)
            found = [linear(x_MK, *rest, threads=threads, beside=tiled) for threads in (1, 3)]
            assert torch.equal(found[0], found[1]), path
            close(found[0], wanted)
            if path not in library.BFLOAT16_PATHS or M > 4:
                assert torch.equal(found[0], linear(x_MK, *rest, beside=beside))


@needs_library
@pytest.mark.skipif(
    library.missing() is not None or library.best("exact") not in library.BFLOAT16_PATHS,
    reason="no path of this machine multiplies bfloat16",
)
def test_tiles_are_made_of_what_can_be_sorted_and_read() -> None:
    beside = beside_of(48, 640, "o", torch.bfloat16, 0.01)
    assert beside.column_E is not None
    assert cpu.tiles_of(beside, 48, 640, torch.float32) is None
    assert cpu.tiles_of(beside_of(48, 640, "o", torch.float16), 48, 640, torch.bfloat16) is None
    assert cpu.tiles_of(beside_of(48, 640, "oc", torch.bfloat16), 48, 640, torch.bfloat16) is None
    with pytest.raises(BadInput, match="ascend"):
        cpu.tiles_of(replace(beside, column_E=beside.column_E.flip(0)), 48, 640, torch.bfloat16)
    with pytest.raises(BadInput, match="inside the weight"):
        cpu.tiles_of(beside, 48, 639, torch.bfloat16)
    tiles = cpu.tiles_of(beside, 48, 640, torch.bfloat16)
    assert tiles is not None
    made = cpu.struct_of(torch.zeros(2, 48), torch.zeros(2, 640), torch.zeros(2, 48), replace(beside, tiles=tiles[:-64]))
    with pytest.raises(BadInput, match="shape"):
        library.check(library.library().aerogel_native_beside(made), "outliers")


@needs_library
def test_sizes_that_do_not_belong_together_are_refused() -> None:
    beside = beside_of(48, 64, "oc", torch.bfloat16)
    assert not cpu.fits(47, beside)
    y_MN, x_MK = torch.randn(2, 48), torch.randn(2, 64)
    made = cpu.struct_of(y_MN, x_MK, y_MN, beside)
    made.outliers += 1
    with pytest.raises(Exception, match="shape"):
        library.check(library.library().aerogel_native_beside(made), "outliers")


@needs_library
@pytest.mark.parametrize("kinds", ["o", "c", "oc"])
@pytest.mark.parametrize(
    ("grid", "kernel"),
    [
        (Bitmod(group_size=24), NativeTables),
        (Float(kind="e4m3"), NativeTables),
        (Nf4(group_size=32), NativeLookup),
        (KMeans(rounds=3), NativeOwn),
        (PlaneGrid(bits=3, group_size=32), NativeOwn),
        (PlaneGrid(bits=6, group_size=32), NativeOwn),
    ],
    ids=str,
)
def test_after_every_product_of_tables(kinds: str, grid: Any, kernel: Any) -> None:
    """The product of the codes and then the addition, for few tokens and for many."""
    N, K = 72, 160
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    codes, beside = quantized(grid, weight_NK, grid.fit(weight_NK)), beside_of(N, K, kinds, torch.bfloat16)
    problem = Problem(format="any", grid=grid, N=N, K=K, dtype=torch.bfloat16)
    layout = kernel.pack(codes, problem)
    assert kernel.adds_beside
    for M in (1, 3, 16, 40):
        x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
        plain_MN = kernel.run(x_MK, layout, problem)
        found_MN = kernel.run(x_MK, layout | beside.operands(), problem)
        close(found_MN, ref.add(plain_MN.float(), x_MK.float(), beside))
        assert not torch.equal(found_MN, plain_MN)


@needs_library
def test_what_stands_beside_tables_does_not_meet_rounded_inputs() -> None:
    """Inputs in FP8: kept columns are no part of them, outliers and columns see them as they are."""
    grid = Fp8Grid()
    weight_NK = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    codes, beside = quantized(grid, weight_NK, grid.fit(weight_NK)), beside_of(48, 64, "oc", torch.bfloat16)
    problem = Problem(format="float-quantized", grid=grid, N=48, K=64, dtype=torch.bfloat16, activations="fp8")
    layout = NativeTables.pack(codes, problem)
    x_MK = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert beside.index_C is not None
    x_MK[:, beside.index_C.long()] *= 100
    quiet_MK = x_MK.index_fill(1, beside.index_C.long(), 0)
    wanted_MN = ref.add(NativeTables.run(quiet_MK, layout, problem).float(), x_MK.float(), beside)
    close(NativeTables.run(x_MK, layout | beside.operands(), problem), wanted_MN)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("cut", cuda.SLICES, ids=str)
def test_the_cuda_source_compiles(cut: tuple[int, int], capability: tuple[int, int]) -> None:
    try:
        compiler = nvrtc.compiler()
    except ImportError as error:
        pytest.skip(str(error))
    kinds = torch.bfloat16, torch.float16, torch.int32 if cut == (1, 1) else torch.int16
    found = cuda.macros(cut, 4 // cut[1], *kinds)
    assert compiler.compile(cuda.SOURCE, sources.sources_of(cuda.SOURCE), found, capability)[:4] == b"\x7fELF"


def test_blocks_take_as_many_tokens_as_fit() -> None:
    """Few tokens take no more room than they need, long inputs leave room for fewer, and too long ones are refused."""
    assert [cuda.slice_of(M, 4096, (9, 0)) for M in (1, 2, 3, 5, 9, 64)] == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (4, 4)]
    assert cuda.slice_of(64, 8192, (9, 0)) == (4, 2) and cuda.slice_of(64, 4096, (8, 6)) == (4, 2)
    assert cuda.slice_of(1, 200_000, (9, 0)) is None and not cuda.holds(200_000, torch.bfloat16, (9, 0))
    assert [cuda.rows_of(N, 1, 132) for N in (28672, 4096, 2048)] == [4, 2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", ["o", "oc"])
@pytest.mark.parametrize("value", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cuda_kernel_is_the_definition(kinds: str, value: torch.dtype, dtype: torch.dtype) -> None:
    """Rows without outliers and full ones, any number of tokens, wide columns, the same bits again; an infinite input where no
    outlier meets it changes nothing."""
    for N, K in ((1, 1), (33, 50), (300, 1000), (40, 70000)):
        beside = beside_of(N, K, kinds, value, share=0.02, device="cuda")
        kept = None if beside.kept_NC is None else beside.kept_NC.abs()
        magnitudes = replace(beside, value_E=beside.value_E.abs(), kept_NC=kept)  # type: ignore[union-attr]
        for M in (1, 2, 3, 4, 5, 8, 16, 17, 40, 129):
            random = torch.Generator().manual_seed(M)
            x_MK, y_MN = (torch.randn(M, width, generator=random).to(dtype).cuda() for width in (K, N))
            assert cuda.takes(y_MN, x_MK, beside)
            found = choose.add(y_MN, x_MK, beside)
            # Each kind is rounded once, at the size of what is added, whatever cancels.
            error = (found.float() - ref.add(y_MN.float(), x_MK.float(), beside)).norm()
            size = ref.add(y_MN.float().abs(), x_MK.float().abs(), magnitudes).norm()
            assert error <= len(kinds) * TOLERANCE[dtype] * size, (N, K, M, float(error / size))
            assert torch.equal(choose.add(y_MN, x_MK, beside), found)
    beside = beside_of(8, 64, "o", value, device="cuda")
    beside = replace(beside, start_N1=torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32, device="cuda"))
    for M in (2, 9):
        x_MK, y_MN = torch.full((M, 64), torch.inf, dtype=dtype, device="cuda"), torch.zeros(M, 8, dtype=dtype, device="cuda")
        assert choose.add(y_MN, x_MK, beside)[:, 1:].eq(0).all()
