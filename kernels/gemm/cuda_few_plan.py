"""Launching the kernels for few tokens: the block of arguments, and a weight's launch made ready once.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.cuda.launch import Launch
from aerogel.kernels.cuda.sources import function
from aerogel.kernels.cuda.stream_flags import flags
from aerogel.kernels.gemm.cuda_apart import PIECE_ROWS, slice_count, slice_tiles
from aerogel.kernels.gemm.cuda_few import Config, apart_tokens, grid_of, kernel_of, shared_bytes, takes_patches, threads_of
from aerogel.kernels.gemm.cuda_outliers import Apart
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.pack import tiles


class Arguments(ctypes.Structure):
    """`Arguments` of few_tokens.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table", "pick", "factor", "x", "bias", "y")),
        *((name, ctypes.c_void_p) for name in ("outlier_start", "outlier", "kept", "chosen")),
        *((name, ctypes.c_void_p) for name in ("apart_start", "apart_units", "apart_rows", "apart_sums", "apart_flags")),
        *(
            (name, ctypes.c_int)
            for name in ("M", "N", "x_stride", "x_columns", "row_tiles", "k_tiles", "groups", "tables", "stages", "kept_steps")
        ),
        *((name, ctypes.c_int) for name in ("apart_blocks", "apart_slices", "apart_tiles", "apart_round_rows")),
    ]


def lists_of(weight: TileWeight, config: Config) -> tuple[Tensor, Tensor] | None:
    """Where the outliers that a block adds beside its codes begin, and these; None where a weight has none."""
    if weight.outliers is None:
        return None
    patches = weight.outliers.patches
    if takes_patches(weight, config) and patches is not None:
        return patches.start_P1, patches.word_U
    return weight.outliers.start_N1, weight.outliers.by_row_E


class Plan:
    """One weight, one number of tokens, one configuration: compiled, sized and ready to be called as a `Runner`.

    It knows the weight by its addresses and keeps none of its memory alive but the table's. The first call does not begin
    early: whatever wrote the weight may be the kernel just before it on the stream.
    """

    def __init__(self, weight: TileWeight, config: Config, M: int, dtype: torch.dtype) -> None:
        device = weight.codes.device
        facts = torch.cuda.get_device_properties(device)
        self.config = config
        self.function = function(*kernel_of(weight, config, M, dtype), device)
        # The converted table lives as long as the plan; so does the original, or its address could come to mean another one.
        self._original, self._table = weight.table, None if weight.table is None else weight.table.to(dtype)
        grid = grid_of(weight, config, facts.multi_processor_count)
        R, C = weight.codes.shape[:2]
        whole_tiles = config.ring and (config.x_resident or config.stages_hold_x)
        self._columns = C * 128 if whole_tiles else -(-weight.K // 8) * 8
        self._pad, self.exact = self._columns - weight.K, weight.exact
        self._device, self._dtype, self._lock = device.index, dtype, threading.Lock()
        lists = lists_of(weight, config)
        self._arguments: Any = Arguments(
            codes=weight.codes.data_ptr(),
            scale=weight.scale.data_ptr(),
            zero=None if weight.zero is None else weight.zero.data_ptr(),
            table=None if self._table is None else self._table.data_ptr(),
            pick=None if weight.pick is None else weight.pick.data_ptr(),
            factor=None if weight.factor is None else weight.factor.data_ptr(),
            outlier_start=None if lists is None else lists[0].data_ptr(),
            outlier=None if lists is None else lists[1].data_ptr(),
            kept=None if weight.kept is None else weight.kept.data_ptr(),
            kept_steps=0 if weight.kept is None else weight.kept.shape[1],
            M=M,
            N=weight.N,
            x_stride=self._columns,
            x_columns=self._columns,
            row_tiles=R,
            k_tiles=C,
            groups=weight.groups,
            tables=0 if weight.table is None else weight.table.shape[0],
            stages=config.stages,
        )
        self._apart_floats = self._apart_words = 0
        if config.apart and weight.outliers is not None and weight.outliers.apart is not None:
            self._add_apart(weight, weight.outliers.apart, M, grid - config.apart)
        options: Any = {
            "grid": (grid,),
            "block": threads_of(config, M, weight.outliers is not None),
            "shared_bytes": shared_bytes(weight, config, M, grid),
            "cluster": config.cluster * config.share,
        }
        self._first: Launch | None = Launch(self.function, self._arguments, **options)
        self._launch = Launch(self.function, self._arguments, early=(facts.major, facts.minor) >= (9, 0), **options)

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor, chosen_MC: Tensor | None = None) -> None:
        """Queues the kernel; `x_MK` is padded or copied where the loads need it. chosen_MC: inputs of kept columns, or of
        outliers where these are `exact`."""
        x_MK = self._in_pieces(x_MK)
        if self.exact and chosen_MC is not None:
            chosen_MC = self._in_pieces(chosen_MC)
        if bias_N is not None and (bias_N.dtype != self._dtype or not bias_N.is_contiguous()):
            bias_N = bias_N.to(self._dtype).contiguous()
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:
            arguments = self._arguments
            if self._apart_words:  # sums are free again when the launch has ended, as the stream sees it
                sums = torch.empty(self._apart_floats, device=x_MK.device)
                arguments.apart_sums = sums.data_ptr()
                arguments.apart_flags = flags(stream, x_MK.device, self._apart_words).data_ptr()
            arguments.x = x_MK.data_ptr()
            arguments.bias = None if bias_N is None else bias_N.data_ptr()
            arguments.y = y_MN.data_ptr()
            arguments.chosen = None if chosen_MC is None else chosen_MC.data_ptr()
            launch, self._first = self._first or self._launch, None
            launch(stream)

    def _add_apart(self, weight: TileWeight, apart: Apart, M: int, grid: int) -> None:
        arguments, pieces = self._arguments, -(-weight.N // PIECE_ROWS)
        arguments.apart_start = apart.start_G1.data_ptr()
        arguments.apart_units = apart.unit_U.data_ptr()
        arguments.apart_rows = apart.row_G.data_ptr()
        arguments.apart_blocks, arguments.apart_slices = self.config.apart, slice_count(weight.K)
        arguments.apart_tiles = slice_tiles(weight.K)
        arguments.apart_round_rows = grid // self.config.cluster * self.config.block_tiles * tiles.ROWS
        self._apart_floats, self._apart_words = slice_count(weight.K) * pieces * PIECE_ROWS * apart_tokens(M), 2 * pieces

    def _in_pieces(self, x_MK: Tensor) -> Tensor:
        if self._pad or x_MK.data_ptr() % 16 or not x_MK.is_contiguous():
            x_MK = torch.nn.functional.pad(x_MK, (0, self._pad)).contiguous()
            x_MK = x_MK.clone() if x_MK.data_ptr() % 16 else x_MK
        return x_MK
