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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels.problem import Kernel, Layout, Problem
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
    """The layout of one weight; see `stacked`."""
    found = stacked(kernel, [member], problem, overwrite=overwrite)
    if found is None:
        raise RunFailed(f"{kernel.__name__} gave other shared tensors for other rows; this is a mistake in aerogel, report it")
    return found


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
            matrix of a model would else need its size again. What the member held is lost then.

    Returns:
        Tensors by name; None where the layout cannot be stacked: a member that does not fill its last tile and is not the
        last, or `shared` tensors that differ.
    """
    in_rows = kernel.rows > 0 and isinstance(problem.grid, IntGrid | Fp8Grid)  # a table's tensors have other axes
    if len(members) > 1 and (not in_rows or any(member.out_features % kernel.rows for member in members[:-1])):
        return None
    if kernel.layout is not None and all(member.layout == kernel.layout for member in members):
        return _together(kernel, [member.held() for member in members])
    if not in_rows:
        return kernel.pack(members[0].codes_of_rows(0, members[0].out_features), problem)
    made: dict[str, Tensor] = {}
    room = list(members[0].held().values()) if overwrite and len(members) == 1 else []
    at = 0
    for member in members:
        step = _rows_at_once(member, problem.device)
        for start in range(0, member.out_features, step):
            stop = min(start + step, member.out_features)
            part = _rows(kernel, member, start, stop, problem)
            if stop - start == problem.N:
                return part
            if not _place(kernel, part, made, at, problem, room):
                return None
            at += -(-(stop - start) // kernel.rows)
    return made


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
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _rows(kernel: type[Kernel], member: Member, start: int, stop: int, problem: Problem) -> dict[str, Tensor]:
    """The layout of rows start..stop of a member, straight from the file's tensors where the kernel can."""
    problem = replace(problem, N=stop - start)
    stored = member.stored_rows(start, stop)
    made = kernel.rearrange(stored, problem) if stored else None
    return kernel.pack(member.codes_of_rows(start, stop), problem) if made is None else made


def _place(kernel: type[Kernel], part: Layout, made: dict[str, Tensor], at: int, problem: Problem, room: list[Tensor]) -> bool:
    """Puts a piece into the whole, which is made at the first one. False where a shared tensor is not the same."""
    for name, tensor in part.items():
        if name in kernel.shared:
            if not _equal(made.setdefault(name, tensor), tensor):
                return False
            continue
        if name not in made:
            made[name] = _memory((-(-problem.N // kernel.rows), *tensor.shape[1:]), tensor, room)
        made[name][at : at + tensor.shape[0]] = tensor
    return True


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


def _rows_at_once(member: Member, device: str) -> int:
    rows = CODES_AT_ONCE.get(device, CODES_AT_ONCE["cuda"]) // max(member.in_features, 1)
    return max(rows // ROW_STEP, 1) * ROW_STEP
