"""Runs of compiled CPU operations: what lies between is Python, what lies inside costs nothing.

A step of a small model is three hundred operations of a few microseconds each; calling them one by one from Python costs as
much again. But their tensors keep their places, so each operation becomes a C struct with addresses once, and a whole run of
structs is handed over at once.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.embedding import PackedEmbedding, wanted
from aerogel.kernels.gemm import cpu_lookup, cpu_own, cpu_tables
from aerogel.kernels.gemm.cpu import Native, structs
from aerogel.kernels.hadamard import cpu as hadamard_cpu
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.pack import own_tables

KERNELS = (Native, cpu_lookup.NativeLookup, cpu_tables.NativeTables, cpu_own.NativeOwn)
"""Whose products compiled operations are."""
KINDS = {
    name: number
    for number, name in enumerate(("gemm", "attend", "norm", "gate", "lookup", "rows", "prompt", "own", "row_sums", "hadamard"))
}
"""By their number in kernels/native/step_structs.h."""


class _Operation(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("arguments", ctypes.c_void_p),
        ("more", ctypes.c_void_p),
    ]


class Operations:
    """Operations in the order in which they are added; `run` does them all. count: how many of them are compiled."""

    def __init__(self) -> None:
        self.count = 0
        self._steps: list[Callable[[], object]] = []
        self._pending: list[_Operation] = []
        self._kept: list[Any] = []
        self._turned: dict[torch.Size, Tensor] = {}

    @property
    def calls(self) -> int:
        """How many times `run` goes through Python for something: compiled runs, and what lies between them."""
        self._close()
        return len(self._steps)

    def run(self) -> None:
        """Everything, in order. Raises BadInput or RunFailed for what an operation refuses."""
        self._close()
        for step in self._steps:
            step()

    def add(self, kind: str, arguments: ctypes.Structure, more: ctypes.Structure | None, *held: Any) -> None:
        """One compiled operation of a kind of `KINDS`; `held` is kept alive with it: the tensors whose addresses it has."""
        self._kept += [arguments, more, *held]
        self._pending.append(
            _Operation(KINDS[kind], 0, ctypes.addressof(arguments), None if more is None else ctypes.addressof(more))
        )
        self.count += 1

    def call(self, step: Callable[[], object]) -> None:
        """A call of Python."""
        self._close()
        self._steps.append(step)

    def linear(self, module: Linear, x: Tensor, y: Tensor) -> bool:
        """y [..., N] = module(x [..., K]). False, and nothing added, where no compiled operation does it."""
        more = module.rows_added() if isinstance(module, SidecarLinear) else None
        if not _compiled(module, x) or (more is not None and not _compiled(more[0], x)):
            return False
        rotation = module.turned_before() if isinstance(module, SidecarLinear) else None
        if rotation is not None:
            x = self._rotated(x, *rotation)
        self._product(module, x, y)
        if more is not None:
            linear, index_R = more
            part = torch.empty(*x.shape[:-1], linear.out_features, dtype=x.dtype)
            self._product(linear, x, part)
            where = part.data_ptr(), index_R.data_ptr(), y.data_ptr()
            sizes = y.numel() // y.shape[-1], y.shape[-1], linear.out_features
            self.add("row_sums", library.RowSums(*where, *sizes, library.TYPES[y.dtype]), None, part, index_R, y)
        return True

    def _rotated(self, x: Tensor, signs_K: Tensor, block: int) -> Tensor:
        """x in another basis: memory of all rotations of that shape, read before the next of them is made."""
        turned = self._turned.setdefault(x.shape, torch.empty_like(x))
        self.add("hadamard", hadamard_cpu.arguments(x, signs_K, block, turned), None, x, signs_K, turned)
        return turned

    def _product(self, module: Linear, x: Tensor, y: Tensor) -> None:
        """The operation of one weight, with what its kernel adds itself."""
        problem, kernel = module._problem or module.problem(), module._kernel
        found = module.added_by_kernel() if isinstance(module, SidecarLinear) else None
        beside = found if found is not None and found.operands() else None
        layout, rows, group = module.held(), x.view(-1, problem.K), problem.grid.group_size or 0
        if issubclass(kernel, cpu_lookup.NativeLookup):
            self._lookup(rows, layout, module.bias, y, group, beside)
            return
        if issubclass(kernel, cpu_own.NativeOwn):
            own = cpu_own.struct_of(layout, problem.N, problem.K, *cpu_own.tables_of(problem.grid, problem.K))
            library.check(library.library().aerogel_native_own_check(ctypes.byref(own)), "a weight of tables for each row")
            call = cpu_lookup.call_of(rows, module.bias, y, "exact", beside=beside)
            self.add("own", own, call, layout, module.bias, rows, y, beside)
            return
        if issubclass(kernel, Native):
            tensors = layout["codes"], layout["scale"], layout.get("zero"), module.bias
            numerics = library.NUMERICS[kernel.numerics]
            weight, call = structs(rows, *tensors, y.view(-1, problem.N), problem.N, group, numerics, beside=beside)
        else:
            weight, call = cpu_tables.structs(rows, layout, module.bias, y.view(-1, problem.N), problem.N, group, beside=beside)
        library.check(library.library().aerogel_native_check(ctypes.byref(weight)), "a packed weight")
        self.add("gemm", weight, call, layout, module.bias, rows, y, beside)

    def _lookup(
        self, rows: Tensor, layout: dict[str, Tensor], bias: Tensor | None, y: Tensor, group: int, beside: Beside | None
    ) -> None:
        weight = cpu_lookup.struct_of(layout, y.shape[-1], rows.shape[1], group)
        call = cpu_lookup.call_of(rows, bias, y, cpu_lookup.numerics_of(rows.dtype), beside=beside)
        library.check(library.library().aerogel_native_lookup_check(ctypes.byref(weight)), "a weight of tables")
        self.add("lookup", weight, call, layout, bias, rows, y, beside)

    def rows(self, module: PackedEmbedding, ids: Tensor, y: Tensor) -> bool:
        """y [..., K] = module(ids). False, and nothing added, where no compiled operation does it."""
        weight = module.weight()
        if weight is None or ids.dtype != torch.int64 or not ids.is_contiguous():
            return False
        self.add("rows", weight, wanted(ids, y), module.head.held(), ids, y)
        return True

    def _close(self) -> None:
        """Ends a run of compiled operations."""
        if not self._pending:
            return
        count, operations = len(self._pending), (_Operation * len(self._pending))(*self._pending)
        done, run = ctypes.c_int64(), library.library().aerogel_native_program
        at, done_at = ctypes.addressof(operations), ctypes.addressof(done)
        self._kept += [operations, done]
        self._pending = []

        def step() -> None:
            status = run(at, count, done_at)
            if status:
                library.check(status, f"operation {done.value} of {count}")

        self._steps.append(step)


def _compiled(module: Linear, x: Tensor) -> bool:
    """Whether compiled operations do all of module(x)."""
    problem, kernel = module._problem, module._kernel
    whole = module.kernel_is_all or (isinstance(module, SidecarLinear) and module.added_by_kernel() is not None)
    if problem is None or not whole or module.column_order is not None or x.dtype is not problem.dtype or not x.is_contiguous():
        return False
    if issubclass(kernel, cpu_tables.NativeTables):
        return problem.activations == "none"  # others are rounded before
    if issubclass(kernel, cpu_own.NativeOwn):
        return own_tables.laid(problem.grid, problem.K)[1] == problem.K  # others want their inputs twice
    return issubclass(kernel, KERNELS)
