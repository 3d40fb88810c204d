"""Grouped matmuls on a CPU: the compiled kernels of `kernels/native`, one call for each expert that somebody chose.

An expert's weight is a slice of the stack, so nothing is copied; the row of a pair that is alone with its expert, which is
all there is when one sequence is decoded, is read and written in place. What Python adds is about 10 microseconds for each
active expert, against a weight that takes a hundred to read.

Shape legend: E experts, M rows of x, S pairs of token and expert, N out features, K in features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.kernels.gemm import cpu, cpu_tables
from aerogel.kernels.grouped.kernel import Grouped, Routes, pairs_by_expert
from aerogel.kernels.native import library
from aerogel.kernels.problem import Kernel, Layout, Problem


class Native(Grouped):
    """Compiled CPU kernels, expert by expert."""

    about: ClassVar[str] = "the compiled CPU kernels, one call for each active expert"
    base: ClassVar[type[Kernel]] = cpu.Native

    @staticmethod
    def run(
        x_MK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """One call of the operator."""
        y_SN: Tensor = torch.ops.aerogel.grouped_native_linear.default(
            x_MK,
            expert_S,
            layout["codes"],
            layout["scale"],
            layout.get("zero"),
            bias_EN,
            problem.N,
            problem.grid.group_size or 0,
        )
        return y_SN


class NativeTables(Grouped):
    """The same for codes that point into tables: FP8, MXFP4 and other floats."""

    about: ClassVar[str] = "the compiled CPU kernels for tables, one call for each active expert"
    base: ClassVar[type[Kernel]] = cpu_tables.NativeTables

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Anything but such tables on a CPU, and inputs that are rounded before."""
        return cpu_tables.refused(problem) or problem.needs_activations("none")

    @staticmethod
    def run(
        x_MK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """One call of the operator."""
        held = [layout.get(name) for name in cpu_tables.TENSORS]
        y_SN: Tensor = torch.ops.aerogel.grouped_native_tables.default(
            x_MK, expert_S, *held, bias_EN, problem.N, problem.grid.group_size or 0
        )
        return y_SN


def linear(
    x_MK: Tensor,
    expert_S: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias_EN: Tensor | None,
    N: int,
    group: int,
) -> Tensor:
    """`aerogel::grouped_native_linear`: y [S, N]. The weight's tensors are those of `aerogel.pack.native`, stacked."""

    def structs(e: int, x: Tensor, y: Tensor, bias_N: Tensor | None) -> tuple[library.Weight, library.Call]:
        zero_e = None if zero is None else zero[e]
        return cpu.structs(x, codes[e], scale[e], zero_e, bias_N, y, N, group, library.NUMERICS["exact"])

    return _by_expert(x_MK, expert_S, len(codes), N, bias_EN, structs)


def tables(x_MK: Tensor, expert_S: Tensor, *rest: Any) -> Tensor:
    """`aerogel::grouped_native_tables`: the same with the tensors of `aerogel.pack.native_tables`."""
    held, (bias_EN, N, group) = dict(zip(cpu_tables.TENSORS, rest, strict=False)), rest[len(cpu_tables.TENSORS) :]

    def structs(e: int, x: Tensor, y: Tensor, bias_N: Tensor | None) -> tuple[library.Weight, library.Call]:
        layout = {name: tensor[e] for name, tensor in held.items() if tensor is not None}
        return cpu_tables.structs(x, layout, bias_N, y, N, group)

    return _by_expert(x_MK, expert_S, len(held["codes"]), N, bias_EN, structs)


def _by_expert(
    x_MK: Tensor, expert_S: Tensor, experts: int, N: int, bias_EN: Tensor | None, structs: Callable[..., Any]
) -> Tensor:
    """y [S, N] by one call of the library for each expert with pairs; `structs` makes its weight and call from the expert's
    number, its rows of x and y, and its bias."""
    x_MK = x_MK.contiguous()
    pairs = expert_S.shape[0]
    y_SN = x_MK.new_zeros(pairs, N)
    each = max(1, pairs // max(1, x_MK.shape[0]))
    for e, places in pairs_by_expert(expert_S, experts).items():
        one = len(places) == 1
        rows = [s // each for s in places]
        x = x_MK[rows[0] : rows[0] + 1] if one else x_MK[rows]
        y = y_SN[places[0] : places[0] + 1] if one else y_SN.new_empty(len(places), N)
        weight, call = structs(e, x, y, None if bias_EN is None else bias_EN[e])
        status = library.library().aerogel_native_gemm(ctypes.byref(weight), ctypes.byref(call))
        if status:
            library.check(status, f"expert {e}, a packed weight [{N}, {x_MK.shape[1]}]")
        if not one:
            y_SN[places] = y
    return y_SN


def _fake(x_MK: Tensor, expert_S: Tensor, *rest: Any) -> Tensor:
    return x_MK.new_empty(expert_S.shape[0], rest[-2])


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "grouped_native_linear(Tensor x, Tensor expert, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, SymInt N,"
    " int group) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "grouped_native_tables(Tensor x, Tensor expert, Tensor codes, Tensor scale, Tensor table, Tensor? pick, Tensor factor,"
    " Tensor unit, Tensor? bias, SymInt N, int group) -> Tensor"
)
for _name, _function in (("grouped_native_linear", linear), ("grouped_native_tables", tables)):
    _library.impl(_name, _function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"aerogel::{_name}", _fake, lib=_library)
