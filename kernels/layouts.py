"""Kernel layouts by name: what checkpoints can be stored in, cut along rows and stacked again.

The tensors of a layout count tiles of `Kernel.rows` output rows along their first axis (all but the few in `Kernel.shared`,
which do not grow with N). Three things follow, whichever kernel it is:

    some rows of a weight          are views of its tensors
    linears that share an input    are one weight when the tensors of one lie behind those of the other
    a stored weight                comes into a layout a few rows at a time, so that nothing dense is ever held

A checkpoint in the layout of the device that it is loaded on is therefore loaded without work: on a CPU its tensors are
mapped from the file, merged or not.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from aerogel.kernels.problem import Kernel, Layout, Pieces, Problem
from aerogel.lazy import lookup
from aerogel.pack.format import ROW_STEP
from aerogel.quantize.codes import Codes
from aerogel.quantize.grids import Fp8Grid, IntGrid

LAYOUTS: dict[str, str] = {
    "native-cpu": "aerogel.kernels.gemm.cpu:Native",
    "native-cuda": "aerogel.kernels.gemm.cuda:Cuda",
}
"""Name of a layout on disk to the kernel it belongs to. The part behind the hyphen is the device."""

PORTABLE, NATIVE = "portable", "native"
CODES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Codes that are brought into a layout at a time: enough to keep a device busy, little beside a model."""


class Member(Protocol):
    """A weight that can say what some of its rows hold: a packed linear."""

    in_features: int
    out_features: int
    layout: str | None

    def held(self) -> dict[str, Tensor]:
        """Its tensors as they lie in memory."""

    def codes_of_rows(self, start: int, stop: int) -> Codes:
        """The codes of rows start..stop; start is a multiple of `ROW_STEP`."""

    def stored_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """The same as tensors of its format; empty where it does not lie in one."""


def owner(name: str) -> type[Kernel]:
    """The kernel that runs layout `name`. Raises `BadInput` for an unknown one, naming the nearest."""
    found: type[Kernel] = lookup(LAYOUTS, name, "layout")
    return found


def device_of(name: str) -> str:
    """The device type that runs layout `name`: `native-cuda` is "cuda"."""
    return name.partition("-")[2]


def for_this_machine(name: str) -> str:
    """`name`, or for "native" the layout of this machine's fastest device: native-cuda with an NVIDIA GPU, else native-cpu."""
    if name != NATIVE:
        return name
    return "native-cuda" if torch.cuda.is_available() and torch.version.hip is None else "native-cpu"


def cut(kernel: type[Kernel], layout: Layout, start: int, stop: int) -> dict[str, Tensor]:
    """The layout of rows start..stop alone, as views. `start` is a multiple of `kernel.rows`."""
    first, last = start // kernel.rows, -(-stop // kernel.rows)
    return {name: tensor if name in kernel.shared else tensor[first:last] for name, tensor in layout.items()}


def packed(kernel: type[Kernel], member: Member, problem: Problem, *, overwrite: bool = False) -> dict[str, Tensor]:
    """The layout of one weight; see `stacked`. Where pieces do not fit together, as scales that are rewritten by the largest of
    them, it is packed as a whole."""
    found = stacked(kernel, [member], problem, overwrite=overwrite)
    return kernel.pack(member.codes_of_rows(0, member.out_features), problem) if found is None else found


def stacked(
    kernel: type[Kernel], members: Sequence[Member], problem: Problem, *, overwrite: bool = False
) -> dict[str, Tensor] | None:
    """The layout of the members' weights stacked along N.

    Tensors that lie in this layout already are taken as they are: as one view where they follow one another in main memory,
    else joined by a copy. All others are unpacked and packed a few rows at a time.

    Args:
        kernel: whose layout.
        members: the weights, top to bottom.
        problem: of the whole.
        overwrite: a single member's own memory may be used, where rows take as many bytes in both layouts: the largest
            matrix of a model would else need its size again. What the member held is lost then. Integers and e4m3 only,
            whose pieces always fit together.

    Returns:
        Tensors by name; None where the layout cannot be stacked: a member that does not fill its last tile and is not the
        last, or `shared` tensors that differ.
    """
    pieces = kernel.pieces(problem)
    if pieces is None or any(member.out_features % pieces.rows for member in members[:-1]):
        return None
    if kernel.layout is not None and all(member.layout == kernel.layout for member in members):
        return _together(kernel, [member.held() for member in members])
    overwrite = overwrite and len(members) == 1 and isinstance(problem.grid, IntGrid | Fp8Grid)
    whole = _Whole(pieces, problem.N, list(members[0].held().values()) if overwrite else [])
    for member in members:
        step = _rows_at_once(member, problem.device, pieces.rows)
        for start in range(0, member.out_features, step):
            stop = min(start + step, member.out_features)
            part = _rows(kernel, member, start, stop, problem)
            if stop - start == problem.N:
                return part
            if not whole.add(part, stop - start):
                return None
    return whole.tensors()


def outline(kernel: type[Kernel], problem: Problem) -> dict[str, Tensor]:
    """The layout of a weight that is not there yet, on the meta device. Of what is stored only its shape is read."""
    shapes = problem.stored.shapes(problem.N, problem.K, problem.grid)
    stored = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    stored |= {name: torch.tensor([problem.N, problem.K]) for name in stored if name == "weight_shape"}
    return kernel.pack(problem.stored.to_codes(stored, problem.grid).to("meta"), problem)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Contiguous tensors as one along the first axis: a view where they follow one another in main memory, else a copy.

    A view works for the pages of a mapped file as for any memory; it keeps the tensors alive that it is made of.
    """
    first = parts[0]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    follows = all(end == part.data_ptr() for end, part in zip(ends[:-1], parts[1:], strict=True))
    if len(parts) == 1 or first.device.type != "cpu" or not follows or not all(part.is_contiguous() for part in parts):
        return first if len(parts) == 1 else torch.cat(list(parts))
    memory = (ctypes.c_uint8 * sum(part.nbytes for part in parts)).from_address(first.data_ptr())
    memory.parts = list(parts)  # type: ignore[attr-defined]
    whole = torch.frombuffer(memory, dtype=torch.uint8).view(first.dtype)
    return whole.view(-1, *first.shape[1:])


def _together(kernel: type[Kernel], layouts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    found = {}
    for name, tensor in layouts[0].items():
        if name in kernel.shared:
            if not all(_equal(tensor, other[name]) for other in layouts[1:]):
                return None
            found[name] = tensor
        else:
            found[name] = joined([layout[name] for layout in layouts])
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bytes: a table of all e4m3 numbers holds NaN."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _rows(kernel: type[Kernel], member: Member, start: int, stop: int, problem: Problem) -> dict[str, Tensor]:
    """The layout of rows start..stop of a member, straight from the file's tensors where the kernel can."""
    problem = replace(problem, N=stop - start)
    stored = member.stored_rows(start, stop)
    made = kernel.rearrange(stored, problem) if stored else None
    return kernel.pack(member.codes_of_rows(start, stop), problem) if made is None else made


class _Whole:
    """A layout put together from pieces, top to bottom. Its tensors are made at the first one, in `room` where that fits."""

    def __init__(self, pieces: Pieces, N: int, room: list[Tensor]) -> None:
        self._pieces, self._room, self._at = pieces, room, 0
        self._most = -(-N // pieces.rows) * pieces.rows
        self._made: dict[str, Tensor] = {}
        self._each: dict[str, int] = {}  # rows for an entry of the first axis
        self._ends: dict[str, int] = {}

    def add(self, part: Layout, rows: int) -> bool:
        """False where the piece is of another kind: other tensors or types, or a shared one that is not the same."""
        if self._made and self._made.keys() != part.keys():
            return False
        for name, tensor in part.items():
            held = self._made.get(name)
            if name in self._pieces.shared:
                if not _equal(self._made.setdefault(name, tensor), tensor):
                    return False
                continue
            if held is None:
                each = self._each[name] = rows // tensor.shape[0]
                held = self._made[name] = _memory((self._most // each, *tensor.shape[1:]), tensor, self._room)
            if held.dtype != tensor.dtype:
                return False
            first = self._at // self._each[name]
            self._ends[name] = first + tensor.shape[0]
            held[first : self._ends[name]] = tensor
        self._at += rows
        return True

    def tensors(self) -> dict[str, Tensor]:
        """All of them, without what no row has used."""
        return {name: tensor[: self._ends[name]] if name in self._ends else tensor for name, tensor in self._made.items()}


def _memory(shape: tuple[int, ...], like: Tensor, room: list[Tensor]) -> Tensor:
    """An empty tensor, in the memory of one of `room` (which is taken out) where one has exactly as many bytes.

    Rows a..b then lie in the same bytes as rows a..b of what was there, which have been read when they are written.
    """
    nbytes = torch.Size(shape).numel() * like.element_size()
    for index, old in enumerate(room):
        if old.nbytes == nbytes and old.is_contiguous() and old.dim() > 0:
            del room[index]
            return old.view(-1).view(torch.uint8).view(like.dtype).view(shape)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _rows_at_once(member: Member, device: str, together: int) -> int:
    rows, step = CODES_AT_ONCE.get(device, CODES_AT_ONCE["cuda"]) // max(member.in_features, 1), math.lcm(ROW_STEP, together)
    return max(rows // step, 1) * step
