"""Launching `wgmma.cu`: the block of arguments, the tensor maps, and layers that are cut into two launches.

The copy engine reads through tensor maps, 128-byte descriptions that the driver encodes: those of a weight once per plan,
that of x again whenever its address is new.

Shape legend: M tokens, N out features, K in features, R row tiles of 16, C k tiles of 128.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.cuda.launch import Launch
from aerogel.kernels.cuda.sources import function
from aerogel.kernels.cuda.tensor_map import Matrix
from aerogel.kernels.gemm.cuda_decoder import table_kind
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import SOURCE, Config, ceil_divide, defines, shared_bytes, threads_of, window

KERNEL = "packed_matmul"
MOST_MAPS = 64
"""Addresses of x whose tensor maps a plan remembers."""


class Arguments(ctypes.Structure):
    """`Arguments` of wgmma.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_uint64 * 16) for name in ("x_map", "codes_map", "scales_map", "zeros_map", "chosen_map")),
        *((name, ctypes.c_void_p) for name in ("scale", "zero", "table", "factor", "bias", "y", "row_scale", "token_scale")),
        *((name, ctypes.c_void_p) for name in ("runs", "outlier_start", "outlier", "kept")),
        *((name, ctypes.c_int) for name in ("M", "N", "y_stride", "row_tiles", "k_tiles", "token_span", "kept_steps")),
        ("padding", ctypes.c_int),  # the source's struct is aligned to 64 bytes
    ]


def maps_of(weight: TileWeight, config: Config) -> dict[str, bytes]:
    """The tensor maps of codes, scales and zero points (or table numbers); the last two only where they are per group."""
    R, C, tile = weight.codes.shape
    maps = {
        "codes_map": Matrix(
            address=weight.codes.data_ptr(),
            element="uint64",
            rows=R,
            columns=C * tile // 8,
            row_bytes=C * tile,
            box_rows=config.row_tiles,
            box_columns=config.w_tiles * tile // 8,
            promotion=256,
        ).encode()
    }
    beside = weight.zero if weight.zero is not None else weight.pick
    for name, tensor in (("scales_map", weight.scale), ("zeros_map", beside)):
        if tensor is not None and weight.group_size:
            maps[name] = Matrix(
                address=tensor.data_ptr(),
                element=f"uint{8 * tensor.element_size()}",
                rows=R,
                columns=tensor.shape[1] * 16,
                row_bytes=tensor.shape[1] * 16 * tensor.element_size(),
                box_rows=config.row_tiles,
                box_columns=window(weight.group_size, config.w_tiles) * 16,
            ).encode()
    return maps


def in_pieces(x_MK: Tensor) -> Tensor:
    """x itself, or where its rows do not lie at multiples of 16 bytes, a copy whose rows do, with zeros beyond K."""
    if x_MK.shape[1] % 8 == 0 and x_MK.data_ptr() % 16 == 0 and x_MK.is_contiguous():
        return x_MK
    x_MK = torch.nn.functional.pad(x_MK, (0, -x_MK.shape[1] % 8)).contiguous()
    return x_MK.clone() if x_MK.data_ptr() % 16 else x_MK


def macros_of(
    weight: TileWeight, config: Config, dtype: torch.dtype, *, int8: bool = False, experts: bool = False, kept: bool = False
) -> dict[str, int]:
    """All macros of a plan's kernel."""
    return defines(weight, config, dtype) | {"INT8": int(int8), "EXPERTS": int(experts), "KEPT": int(kept)}


class Plan:
    """One weight, one number of tokens, one configuration: compiled, described and ready to be called as a `Runner`.

    The first call does not begin early: whatever wrote the weight may be the kernel just before it on the stream.
    y_stride: elements from one token of y to the next, where y is wider than this weight.
    row_scale: float32 [16 R], with which the weight is brought to bytes, for activations that are bytes (`cuda_int8`).
    runs: the most runs of tokens that there can be when the weight is that of several experts, one below the other, its N that
    of one of them, and `launch` is told who takes which tokens (`kernels.grouped.cuda_grouped`).
    kept: weights of columns beside the codes, as fragments (`cuda_kept`); `launch` is given their inputs.
    """

    def __init__(
        self,
        weight: TileWeight,
        config: Config,
        M: int,
        dtype: torch.dtype,
        y_stride: int | None = None,
        row_scale: Tensor | None = None,
        runs: int | None = None,
        kept: Tensor | None = None,
    ) -> None:
        device = weight.codes.device
        self.config = config
        kinds = {"int8": row_scale is not None, "experts": runs is not None, "kept": kept is not None}
        macros = macros_of(weight, config, dtype, **kinds)
        self.function = function(SOURCE, KERNEL, macros, device)
        self._sixteen = str(dtype).removeprefix("torch.")
        self._element = self._sixteen if row_scale is None else "uint8"
        self._weight, self._dtype, self._device, self._lock = weight, dtype, device.index, threading.Lock()
        self._table = None if weight.table is None else weight.table.to(dtype).contiguous()  # kept alive with the plan
        self._maps: dict[tuple[int, str, int], bytes] = {}
        R, C = ceil_divide(weight.N, 16), weight.codes.shape[1]
        beside = weight.zero if weight.zero is not None else weight.pick
        self._arguments: Any = Arguments(
            scale=weight.scale.data_ptr(),
            zero=None if beside is None else beside.data_ptr(),
            table=None if self._table is None else self._table.data_ptr(),
            factor=None if weight.factor is None else weight.factor.data_ptr(),
            row_scale=None if row_scale is None else row_scale.data_ptr(),
            outlier_start=None if weight.outliers is None else weight.outliers.start_T1.data_ptr(),
            outlier=None if weight.outliers is None else weight.outliers.by_sheet_E.data_ptr(),
            kept=None if kept is None else kept.data_ptr(),
            kept_steps=0 if kept is None else kept.shape[1],
            M=M,
            N=weight.N,
            y_stride=y_stride or weight.N,
            row_tiles=R,
            k_tiles=C,
            token_span=config.span,
        )
        for name, encoded in maps_of(weight, config).items():
            self._place(name, encoded)
        token_blocks = ceil_divide(M, config.tokens) if runs is None else runs
        tiles = ceil_divide(R, config.row_tiles * config.share) * token_blocks
        seats = torch.cuda.get_device_properties(device).multi_processor_count // config.cluster * config.resident
        options: Any = {
            "grid": ((tiles if config.split > 1 else min(tiles, seats)) * config.cluster,),
            "block": threads_of(weight, config),
            "shared_bytes": shared_bytes(weight, config),
        }
        self._first: Launch | None = Launch(self.function, self._arguments, **options)
        self._launch = Launch(self.function, self._arguments, early=True, **options)

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor, exact_MK: Tensor | None = None) -> None:
        """Queues the kernel; inputs are padded or copied where the copy engine needs it. exact_MK: those of outliers, where the
        weight wants them apart."""
        chosen = None if exact_MK is None else in_pieces(exact_MK)
        self.launch(in_pieces(x_MK), None, bias_N, y_MN, chosen=chosen)

    def launch(
        self,
        x_MK: Tensor,
        token_scale_M: Tensor | None,
        bias_N: Tensor | None,
        y_MN: Tensor,
        runs: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        """Queues the kernel for activations that the copy engine can take as they are: whole rows at multiples of 16 bytes."""
        if bias_N is not None and (bias_N.dtype != self._dtype or not bias_N.is_contiguous()):
            bias_N = bias_N.to(self._dtype).contiguous()
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:
            arguments = self._arguments
            self._place("x_map", self._map_of(x_MK, self._element))
            if chosen is not None:
                self._place("chosen_map", self._map_of(chosen, self._sixteen))
            arguments.bias = None if bias_N is None else bias_N.data_ptr()
            arguments.y = y_MN.data_ptr()
            arguments.token_scale = None if token_scale_M is None else token_scale_M.data_ptr()
            arguments.runs = None if runs is None else runs.data_ptr()
            launch, self._first = self._first or self._launch, None
            launch(stream)

    def _map_of(self, x_MK: Tensor, element: str) -> bytes:
        key = address, _, columns = x_MK.data_ptr(), element, x_MK.shape[1]  # memory is used again for other widths
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= MOST_MAPS:
                self._maps.clear()
            found = Matrix(
                address=address,
                element=element,
                rows=len(x_MK),
                columns=columns,
                row_bytes=x_MK.element_size() * columns,
                box_rows=self.config.tokens // self.config.share,
                box_columns=128 // x_MK.element_size(),
                swizzle=128,
            ).encode()
            self._maps[key] = found
        return found

    def _place(self, name: str, encoded: bytes) -> None:
        ctypes.memmove(ctypes.addressof(self._arguments) + getattr(Arguments, name).offset, encoded, len(encoded))


class Parts:
    """A weight cut into runs of rows, each with its own plan.

    One configuration fills whole rounds of the device, and what is left would keep a few multiprocessors busy for a round
    more; with smaller tiles it does so for a shorter time. Arguments as those of `Plan`.
    """

    def __init__(
        self,
        weight: TileWeight,
        cuts: Sequence[tuple[int, Config]],
        M: int,
        dtype: torch.dtype,
        row_scale: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        self._parts = [
            (
                start,
                Plan(
                    part,
                    config,
                    M,
                    dtype,
                    y_stride=weight.N,
                    row_scale=None if row_scale is None else row_scale[start:],
                    kept=None if kept is None else kept[start // 16 :],
                ),
            )
            for start, part, config in parts_of(weight, cuts)
        ]

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> None:
        """Queues the kernels."""
        self.launch(in_pieces(x_MK), None, bias_N, y_MN)

    def launch(
        self,
        x_MK: Tensor,
        token_scale_M: Tensor | None,
        bias_N: Tensor | None,
        y_MN: Tensor,
        chosen: Tensor | None = None,
    ) -> None:
        """The same as `Plan.launch`."""
        for start, plan in self._parts:
            bias = None if bias_N is None else bias_N[start:]
            plan.launch(x_MK, token_scale_M, bias, y_MN[:, start:], chosen=chosen)


def parts_of(weight: TileWeight, cuts: Sequence[tuple[int, Config]]) -> list[tuple[int, TileWeight, Config]]:
    """First row, weight and configuration of each run of rows."""
    ends = list(itertools.accumulate(rows for rows, _ in cuts))
    return [(end - rows, rows_of(weight, end - rows, end), config) for end, (rows, config) in zip(ends, cuts, strict=True)]


def rows_of(weight: TileWeight, start: int, stop: int) -> TileWeight:
    """Rows start .. stop of a weight as views; `start` is a multiple of 16."""
    first, last = start // 16, ceil_divide(stop, 16)
    table = weight.table
    return TileWeight(
        codes=weight.codes[first:last],
        scale=weight.scale[first:last],
        zero=None if weight.zero is None else weight.zero[first:last],
        table=table[16 * first : 16 * last] if table is not None and table_kind(weight) == 2 else table,
        pick=None if weight.pick is None else weight.pick[first:last],
        group_size=weight.group_size,
        N=stop - start,
        K=weight.K,
        floats=weight.floats,
        factor=weight.factor,
        outliers=None if weight.outliers is None else weight.outliers.rows(start, stop, weight.codes.shape[1]),
        exact=weight.exact,
        in_bytes=weight.in_bytes,
    )
