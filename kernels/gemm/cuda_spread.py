"""Activations spread out on CUDA: the host's side of `spread.cu`, behind an operator.

Kernels for matrix instructions want groups of whole steps of 16 columns. A weight whose groups have another size is laid out
with columns between them, and x follows: one small launch before the matmul, instead of another kernel for every group size.

Shape legend: M tokens, K in features, L columns of the result.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Launch

SOURCE, KERNEL, THREADS = "spread.cu", "spread", 128
STEP = 16
"""Columns of a step of the matrix instruction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Where columns come to lie: `copies` times all groups of `group` columns, each filled up to `filled`, then zeros.

    K: columns before. columns: after, a multiple of 16, at least what the copies take.
    """

    K: int
    group: int
    copies: int
    columns: int

    @property
    def filled(self) -> int:
        """Columns of a group afterwards: whole steps."""
        return filled(self.group)

    @property
    def groups(self) -> int:
        """Groups of one copy."""
        return -(-self.K // self.group)

    @property
    def stretch(self) -> int:
        """Columns of one copy."""
        return self.groups * self.filled

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """Where each of the K columns lies within one copy, int64 [K]."""
        k = torch.arange(self.K, device=device)
        return k // self.group * self.filled + k % self.group

    def moved(self, place_K: Tensor | None, device: torch.device | str) -> Tensor:
        """Where inputs lie that were at `place_K` before, int64 [K]; None for their own places."""
        found = self.places(device)
        return found if place_K is None else found[place_K]

    def sources(self, device: torch.device | str = "cpu") -> Tensor:
        """Of each column of one copy its column before, int64 [stretch]; the first of its group where it has none."""
        g = torch.arange(self.groups, device=device)[:, None] * self.group
        found = g + torch.arange(self.filled, device=device)
        return torch.where((found < g + self.group) & (found < self.K), found, g).flatten()


def spread_out(x_MK: Tensor, to: Spread) -> Tensor:
    """x [M, K] of 16 bits -> [M, columns]; an operator. (A graph that is being compiled cannot call an object it makes.)"""
    found: Tensor = torch.ops.aerogel.spread(x_MK, to.group, to.copies, to.columns)
    return found


def filled(group: int) -> int:
    """A group's columns, filled up to whole steps."""
    return -(-group // STEP) * STEP


def _spread_reference(x: Tensor, group: int, copies: int, columns: int) -> Tensor:
    spread = Spread(K=x.shape[1], group=group, copies=copies, columns=columns)
    out = x.new_zeros(len(x), columns)
    for copy in range(copies):
        out[:, copy * spread.stretch + spread.places(x.device)] = x
    return out


def _spread_cuda(x: Tensor, group: int, copies: int, columns: int) -> Tensor:
    x, out = x.contiguous(), x.new_empty(len(x), columns)
    if 0 in x.shape:
        return out.zero_()
    aligned = group % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
    spread = Spread(K=x.shape[1], group=group, copies=copies, columns=columns)
    with torch.cuda.device(x.device), _LOCK:
        launch = _launch(spread, len(x), aligned, x.device)
        arguments: Any = launch.arguments
        arguments.x, arguments.out = x.data_ptr(), out.data_ptr()
        launch(torch._C._cuda_getCurrentRawStream(x.get_device()))
    return out


def _spread_fake(x: Tensor, group: int, copies: int, columns: int) -> Tensor:
    return x.new_empty(len(x), columns)


_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


class Arguments(ctypes.Structure):
    """`Arguments` of spread.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int) for name in ("K", "stretch", "end", "columns")),
    ]


@functools.lru_cache(maxsize=4096)
def _launch(spread: Spread, M: int, aligned: bool, device: torch.device) -> Launch:
    """The kernel for M tokens; its addresses are filled in by each call."""
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.cuda.sources import function

    # Numbers are moved, not read: which 16-bit type they have does not matter.
    macros = {"GROUP": spread.group, "FILLED": spread.filled, "ALIGNED": int(aligned), "FP16": 0}
    arguments = Arguments(K=spread.K, stretch=spread.stretch, end=spread.copies * spread.stretch, columns=spread.columns)
    early = torch.cuda.get_device_capability(device) >= (9, 0)
    blocks = (M, -(-spread.columns // (8 * THREADS)))
    return Launch(function(SOURCE, KERNEL, macros, device), arguments, grid=blocks, block=THREADS, early=early)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "spread(Tensor x, int group, int copies, int columns) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("spread", _spread_cuda, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("spread", _spread_reference, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::spread", _spread_fake, lib=_library)
