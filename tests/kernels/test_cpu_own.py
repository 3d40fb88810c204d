"""The CPU kernel for tables of each row on every path of this machine: codebooks and bit planes against the definition in
float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.test_planes import GRIDS as PLANES

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cpu_own import NativeOwn, linear, tables_of
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.pack import own_tables
from aerogel.quantize.codes import Codes, Grid, quantized
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.planes import PlaneGrid

BOOKS: list[Any] = [KMeans(rounds=5), KMeans(bits=3, rounds=5), KMeans(bits=2, rounds=5, scale_dtype=torch.float16)]
SUMS: list[Any] = [grid for grid in PLANES if grid.bits <= 4 and (grid.group_size is None or grid.group_size % 16 == 0)]
SUMS += [PlaneGrid(bits=4, group_size=48, offset="scale"), PlaneGrid(bits=1, group_size=64), PlaneGrid(bits=3, group_size=16)]
BLOCKS: list[Any] = [PlaneGrid(bits=bits, group_size=8, power_of_two=True, block_rows=128) for bits in (1, 2, 3, 4)]
BLOCKS += [PlaneGrid(bits=3, group_size=24, block_rows=4, offset="scale"), PlaneGrid(bits=4, group_size=16, block_rows=32)]
GRIDS = [*BOOKS, *SUMS, *BLOCKS, PlaneGrid(bits=2, group_size=128, power_of_two=True, block_rows=8, offset="float32")]
HALVES: list[Any] = [PlaneGrid(bits=5, group_size=8, power_of_two=True, block_rows=128), PlaneGrid(bits=8, offset="float32")]
HALVES += [PlaneGrid(bits=6, group_size=24, block_rows=4, offset="scale"), PlaneGrid(bits=7, group_size=32)]
"""Of more planes than are looked up at once."""
pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
ROUNDED = 2.5e-3
"""Numbers in bfloat16; 4e-3 more where the result is rounded to it."""


def codes_on(grid: Grid, N: int, K: int) -> Codes:
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K))
    return quantized(grid, w_NK, grid.fit(w_NK, search="mse"))


@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_path_against_float64(path: str, grid: Grid) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    number = library.PATHS.index(path)
    for N, K in ((1, 16), (7, 40), (37, 200), (66, 300)):
        codes = codes_on(grid, N, K)
        layout, dense = own_tables.tensors_of(codes), own_tables.numbers_of(codes).bfloat16().double()
        tables = tables_of(grid, K)
        group = min(grid.group_size or K, K)
        columns = torch.arange(K) // group
        rounded_NK = dense[torch.arange(N)[:, None], columns, codes.values_NK.long()]
        assert (rounded_NK - codes.decode().double()).norm() <= ROUNDED * codes.decode().double().norm()
        for M in (1, 2, 4, 5, 9, 16, 17, 36, 40):
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
            bias = torch.randn(N, generator=torch.Generator().manual_seed(N))
            product = x.double() @ rounded_NK.T
            found = linear(x, layout, bias, N, *tables, number, threads=1)
            scale = (x.double().abs() @ rounded_NK.abs().T).norm() / K**0.5  # one output may cancel
            error = (found.double() - (product + bias.double())).norm() / (scale + bias.double().norm() * M**0.5)
            assert error < 4e-3, f"[{M}, {N}, {K}]: {error:.1e}"
            assert torch.equal(found, linear(x, layout, bias, N, *tables, number, threads=3))


@pytest.mark.parametrize("grid", HALVES, ids=str)
def test_many_planes_are_two_halves(grid: PlaneGrid) -> None:
    for N, K in ((1, 16), (37, 200), (66, 300)):
        codes, problem = codes_on(grid, N, K), Problem(format="any", grid=grid, N=N, K=K, dtype=torch.bfloat16)
        assert NativeOwn.refuses(problem) is None
        both, columns = own_tables.halved(codes), own_tables.laid(grid, K)[1]
        halves_N2h = both.decode().double().reshape(N, 2, columns // 2)[..., :K]
        assert torch.allclose(halves_N2h.sum(1), codes.decode().double(), rtol=0, atol=1e-5)
        layout = NativeOwn.pack(codes, problem)
        for M in (1, 4, 9, 17):
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
            scale = sum((x.double().abs() @ half_NK.abs().T).norm() for half_NK in halves_N2h.unbind(1)) / K**0.5
            error = (NativeOwn.run(x, layout, problem).double() - x.double() @ codes.decode().double().T).norm() / scale
            assert error < 4e-3, f"[{M}, {N}, {K}]: {error:.1e}"


@pytest.mark.parametrize("grid", [*GRIDS, *HALVES], ids=str)
def test_the_layout_inverts(grid: Grid) -> None:
    for N, K in ((1, 16), (13, 130), (130, 200)):
        codes = codes_on(grid, N, K)
        back = own_tables.codes_of(own_tables.tensors_of(codes), grid, N, K)
        assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.decode(), codes.decode())


@pytest.mark.parametrize("path", library.PATHS)
def test_the_dispatcher_and_the_layer_use_it(path: str) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    with library.only(path):
        for grid in (KMeans(rounds=3), PlaneGrid(bits=3, group_size=32, offset="scale"), BLOCKS[2]):
            codes = codes_on(grid, 50, 96)
            layer = Linear.from_codes(codes, dtype=torch.bfloat16)
            lookup = isinstance(grid, KMeans) and path not in library.BFLOAT16_PATHS
            assert layer.kernel_name == ("cpu-lookup" if lookup else "cpu-own-tables")
            x = torch.randn(5, 96).bfloat16()
            wanted = x.double() @ codes.decode().double().T
            assert (layer(x).double() - wanted).norm() < 4e-3 * wanted.norm()
            assert torch.equal(layer.dequantize(), codes.decode().bfloat16())
            for changed in ({"dtype": torch.float32}, {"device": "cuda"}, {"activations": "int8"}):
                fields: Any = {"format": "any", "grid": grid, "N": 50, "K": 96, "dtype": torch.bfloat16, **changed}
                assert NativeOwn.refuses(Problem(**fields)) is not None
            plain = Problem(format="any", grid=grid, N=50, K=96)
            assert choose(plain)[0] == ("cpu-lookup" if isinstance(grid, KMeans) else "cpu-planes")


def test_what_does_not_belong_together_is_refused() -> None:
    layout, x = own_tables.tensors_of(codes_on(PlaneGrid(bits=3, group_size=32), 40, 256)), torch.randn(2, 256).bfloat16()

    def refused(match: str, group: int = 32, shared: int = 0, **changed: Any) -> None:
        with pytest.raises(BadInput, match=match):
            linear(changed.pop("x", x), {**layout, **changed}, None, 40, group, shared)

    refused("codes have another size", codes=layout["codes"][:-1].contiguous())
    refused("tables have another size", table=layout["table"][:-1].contiguous())
    refused("codes have another size", x=torch.randn(2, 100).bfloat16())
    refused("number type", x=x.float())
    refused("group size", group=24)
    refused("group size", shared=128)
    refused("group size", group=0, shared=6)
    refused("tables have another size", group=0, shared=8)
    refused("contiguous", codes=layout["codes"].transpose(0, 1))
    room = torch.empty(layout["codes"].nbytes + 64, dtype=torch.uint8)[1:]
    shifted = room[: layout["codes"].nbytes].view(layout["codes"].shape)
    refused("multiple of 64 bytes", codes=shifted.copy_(layout["codes"]))
    with pytest.raises(BadInput, match="for each output"):
        own_tables.tensors_of(codes_on(Nf4(), 8, 64))


def test_what_is_infinite_or_no_number_is_seen() -> None:
    layout = own_tables.tensors_of(codes_on(PlaneGrid(bits=3, group_size=32), 20, 128))
    for bad in (float("inf"), float("nan")):
        x = torch.randn(3, 128).bfloat16()
        x[1, 40] = bad
        assert torch.isfinite(linear(x, layout, None, 20, 32)).all(1).tolist() == [True, False, True]
