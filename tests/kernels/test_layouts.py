"""Layouts that checkpoints are stored in: what they say of themselves, rows cut out, weights stacked, memory shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.cuda_plane import CudaPlane
from aerogel.kernels.gemm.cuda_planes import CudaPlanes
from aerogel.kernels.linear import Linear, problem_of
from aerogel.kernels.problem import Kernel, Problem
from aerogel.pack.config import choose_format
from aerogel.pack.scheme import Scheme
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.planes import PlaneGrid

GRIDS: list[Any] = [
    IntGrid(bits=4, group_size=16, symmetric=False, scale_dtype=torch.bfloat16),
    IntGrid(bits=3, group_size=32, scale_dtype=torch.float16),
    IntGrid(bits=7, scale_dtype=torch.float32),
    Fp8Grid(scale_dtype=torch.float32),
    Fp8Grid(strategy="block", scale_dtype=torch.bfloat16),
]


@dataclass
class Rows:
    """A weight that is nothing but its codes."""

    codes: Codes
    layout: str | None = None

    @property
    def in_features(self) -> int:
        return self.codes.values_NK.shape[1]

    @property
    def out_features(self) -> int:
        return self.codes.values_NK.shape[0]

    def held(self) -> dict[str, Tensor]:
        raise AssertionError("not laid out yet")

    def stored_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        return {}

    def codes_of_rows(self, start: int, stop: int) -> Codes:
        return part(self.codes, start, stop)


def part(codes: Codes, start: int, stop: int) -> Codes:
    return codes.rows(slice(start, stop))


def drawn(grid: Any, N: int, K: int = 200) -> Codes:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
    return quantized(grid, weight, grid.fit(weight))


def problem(name: str, grid: Any, N: int, K: int = 200) -> tuple[type[Kernel], Problem]:
    kernel = layouts.owner(name)
    found = problem_of(Scheme(format=choose_format(grid).name, grid=grid, layout=name), N, K, torch.bfloat16)
    if kernel.refuses_layout(found):
        pytest.skip(f"{name} {kernel.refuses_layout(found)}")
    return kernel, found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", list(layouts.LAYOUTS))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("N", [1, 48, 300])
def test_shapes_are_those_that_packing_makes(name: str, grid: Any, N: int) -> None:
    kernel, found = problem(name, grid, N)
    made = kernel.pack(drawn(grid, N), found)
    assert kernel.shapes(found) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in made.items()}


@pytest.mark.parametrize("name", list(layouts.LAYOUTS))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packing_some_rows_at_a_time_is_packing_all(name: str, grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, found = problem(name, grid, 300)
    monkeypatch.setattr(layouts, "CODES_AT_ONCE", dict.fromkeys(("cpu", "cuda"), 128 * 200))
    codes = drawn(grid, 300)
    whole = kernel.pack(codes, found)
    same(layouts.packed(kernel, Rows(codes), found), whole)
    rows = layouts.cut(kernel, whole, 128, 256)
    same(rows, kernel.pack(part(codes, 128, 256), replace(found, N=128)))


@pytest.mark.parametrize("name", list(layouts.LAYOUTS))
@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_stacked_weights_are_the_weight_of_all_rows(name: str, grid: Any) -> None:
    kernel, found = problem(name, grid, 300)
    codes = drawn(grid, 300)
    parts = [part(codes, 0, 256), part(codes, 256, 300)]
    stacked = layouts.stacked(kernel, [Rows(item) for item in parts], found)
    assert stacked is not None
    same(stacked, kernel.pack(codes, found))
    uneven = [part(codes, 0, 44), part(codes, 44, 300)]
    assert layouts.stacked(kernel, [Rows(item) for item in uneven], found) is None, "44 rows end inside a tile"


OTHERS: list[tuple[type[Kernel], Any]] = [
    (Cuda, Nf4()),
    (Cuda, Mx()),
    (Cuda, Nvfp4()),
    (Cuda, Nvfp4(scale_dtype=torch.uint8)),
    (Cuda, Bitmod()),
    (Cuda, KMeans(bits=3, scale_dtype=torch.bfloat16)),
    (CudaPlanes, PlaneGrid(bits=3, group_size=32, offset="scale")),
    (CudaPlanes, PlaneGrid(bits=5, group_size=40, scale_dtype=torch.bfloat16)),
    (CudaPlanes, PlaneGrid(bits=3, group_size=8, block_rows=64)),
    (CudaPlane, PlaneGrid(bits=1, group_size=16)),
]


@pytest.mark.parametrize(("kernel", "grid"), OTHERS, ids=str)
def test_tables_and_planes_are_packed_some_rows_at_a_time(kernel: Any, grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "CODES_AT_ONCE", dict.fromkeys(("cpu", "cuda"), 128 * 200))
    packed: list[int] = []
    codes = drawn(grid, 300)
    found = Problem(format=choose_format(grid).name, grid=grid, N=300, K=200, dtype=torch.bfloat16, device="cuda")
    whole = kernel.pack(codes, found)
    plain = kernel.pack
    monkeypatch.setattr(kernel, "pack", lambda codes, found: packed.append(len(codes.values_NK)) or plain(codes, found))
    same(layouts.packed(kernel, Rows(codes), found), whole)
    parts = layouts.stacked(kernel, [Rows(part(codes, 0, 256)), Rows(part(codes, 256, 300))], found)
    assert parts is not None and packed == 2 * [128, 128, 44]
    same(parts, whole)


@pytest.mark.parametrize(("kernel", "grid"), [*OTHERS, *((Cuda, grid) for grid in GRIDS)], ids=str)
@pytest.mark.parametrize("N", [300, 96])
def test_an_outline_is_the_layout_without_its_numbers(kernel: Any, grid: Any, N: int) -> None:
    codes = drawn(grid, N)
    found = Problem(format=choose_format(grid).name, grid=grid, N=N, K=200, dtype=torch.bfloat16, device="cuda")
    outline = layouts.outline(kernel, found)
    assert {tensor.device.type for tensor in outline.values()} == {"meta"}
    wanted = kernel.pack(codes, found)
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in layout.items()} for layout in (outline, wanted)]
    assert kinds[0] == kinds[1]


def test_pieces_of_another_kind_are_packed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "CODES_AT_ONCE", dict.fromkeys(("cpu", "cuda"), 128 * 200))
    grid = Nvfp4(scale_dtype=torch.uint8)
    codes = drawn(grid, 300)
    codes.scale_NG[200:] -= 16  # two binades
    found = Problem(format=choose_format(grid).name, grid=grid, N=300, K=200, dtype=torch.bfloat16, device="cuda")
    assert layouts.stacked(Cuda, [Rows(codes)], found) is None
    same(layouts.packed(Cuda, Rows(codes), found), Cuda.pack(codes, found))


@pytest.mark.parametrize(("bits", "symmetric", "K", "reused"), [(4, True, 256, 2), (4, False, 256, 2), (8, True, 200, 1)])
def test_a_weight_can_change_its_layout_in_its_own_memory(
    bits: int, symmetric: bool, K: int, reused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = IntGrid(bits=bits, group_size=32, symmetric=symmetric, scale_dtype=torch.float16)
    kernel, found = problem("native-cuda", grid, 304, K)
    monkeypatch.setattr(layouts, "CODES_AT_ONCE", dict.fromkeys(("cpu", "cuda"), 64 * K))
    codes = drawn(grid, 304, K)
    layer = Linear(K, 304, Scheme(format=found.format, grid=grid))
    layer.fill({name: tensor.clone() for name, tensor in choose_format(grid).encode(codes).items()})
    before = {tensor.data_ptr() for tensor in layer.held().values()}
    made = layouts.packed(kernel, layer, found, overwrite=True)
    same(made, kernel.pack(codes, found))
    assert len(before & {tensor.data_ptr() for tensor in made.values()}) == reused


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (37, 200), (304, 96), (48, 33)])
def test_rearranged_words_are_packed_codes(bits: int, symmetric: bool, N: int, K: int) -> None:
    grid = IntGrid(bits=bits, group_size=32, symmetric=symmetric, scale_dtype=torch.float16)
    kernel, found = problem("native-cpu", grid, N, K)
    codes = drawn(grid, N, K)
    made = kernel.rearrange(choose_format(grid).encode(codes), found)
    assert made is not None
    same(made, kernel.pack(codes, found))


def test_tensors_that_follow_one_another_are_joined_without_a_copy() -> None:
    memory = torch.arange(64, dtype=torch.int16)
    parts = [memory[:24].view(3, 8), memory[24:40].view(2, 8), memory[40:].view(3, 8)]
    whole = layouts.joined(parts)
    assert torch.equal(whole, memory.view(8, 8)) and whole.data_ptr() == memory.data_ptr()
    assert layouts.joined(parts[:1]) is parts[0]
    apart = layouts.joined([parts[0], parts[2]])
    assert torch.equal(apart, torch.cat([parts[0], parts[2]])) and apart.data_ptr() != memory.data_ptr()
    del memory, parts
    junk = [torch.full((64,), 7, dtype=torch.int16) for _ in range(64)]
    assert whole.flatten().tolist() == list(range(64)) and junk, "the view keeps its memory"


def test_names() -> None:
    assert layouts.for_this_machine("portable") == "portable"
    assert layouts.for_this_machine("native") == ("native-cuda" if torch.cuda.is_available() else "native-cpu")
    assert {layouts.device_of(name) for name in layouts.LAYOUTS} == {"cpu", "cuda"}
    with pytest.raises(BadInput, match="did you mean 'native-cpu'"):
        layouts.owner("natve-cpu")
