"""The search for cuts in bytes (`cuda_bytes`): what is known and what is estimated to be fast, timed with the rounding first.
Of weights without outliers also the matmul in 16 bits is timed, in the cut that serves it: where it is faster it is used.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels import gpu_here
from aerogel.kernels.cuda import sources
from aerogel.kernels.cuda.timing import graph_microseconds
from aerogel.kernels.gemm import cuda, cuda_added, cuda_bytes, cuda_int8, cuda_tune, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_bytes import SIXTEEN
from aerogel.kernels.gemm.cuda_quantize import ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_ranked import ranked
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import SOURCE, Config, ceil_divide
from aerogel.kernels.gemm.cuda_wgmma_plan import KERNEL, macros_of
from aerogel.kernels.gemm.cuda_wgmma_tune import as_data
from aerogel.kernels.problem import Problem, Tuned

TRIED = 12
"""Cuts of the estimate, which is right to 7 % or so."""


def tune_and_keep(problem: Problem, tokens: Sequence[int]) -> Tuned | None:
    """What `Kernel.tune` gives for cuts in bytes; None where they serve nothing of the problem and these tokens."""
    if gpu_here.other_than_hopper(torch.cuda.get_device_capability()) is not None:
        return None
    weight = cuda_tune.like(problem)
    if weight is None:
        return None
    held = replace(weight, group_size=problem.grid.group_size or 0, in_bytes=True)
    served = [M for M in tokens if _serves(held, M)]
    if not served:
        return None
    entries = tune(held, sorted({cuda_wgmma_table.class_of(held, M) for M in served}))
    kept = cuda_wgmma_table.save(torch.cuda.get_device_name(), cuda_wgmma_table.place_of(held), entries)
    return Tuned(found={int(M): _in_words(entry) for M, entry in entries.items()}, kept=kept)


def joined(sixteen: Tuned | None, in_bytes: Tuned | None) -> Tuned | None:
    """What was found for the matmul in 16 bits and in bytes, for which the former was measured already."""
    if sixteen is None or in_bytes is None:
        return sixteen or in_bytes
    return Tuned(found={**sixteen.found, **in_bytes.found}, kept=in_bytes.kept.parent)


def tune(held: TileWeight, tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The best cut of a weight `in_bytes` per number of tokens, entries for `cuda_wgmma_table.save`."""
    facts = torch.cuda.get_device_properties(held.codes.device)
    weights = cuda_tune.weight_copies(held)
    entries: dict[str, dict[str, Any]] = {}
    for M in tokens:
        configs = candidates(held, M, facts.multi_processor_count, facts.name)
        wanted = [(SOURCE, macros_of(held, config, torch.bfloat16, int8=True)) for config in configs]
        sources.compile_ahead(wanted, (facts.major, facts.minor), workers=16)
        config, time = ranked(weights, configs, M, torch.bfloat16, Rounded)[0]
        entries[str(M)] = {"config": as_data(config), "us": round(time, 2)}
        if not held.exact:
            entries[str(M)][SIXTEEN] = round(sixteen_microseconds(weights, M, torch.bfloat16), 2)
    return entries


def candidates(held: TileWeight, M: int, multiprocessors: int, name: str) -> list[Config]:
    """Cuts worth a measurement: the one in use on the device `name`, and the TRIED that are estimated to be the fastest."""
    known = [config for rows, config in cuda_wgmma_table.cuts_for(held, M, name) if rows == held.N]
    found = cuda_bytes.candidates(held, M, multiprocessors)
    liked = sorted(found, key=lambda config: cuda_bytes.microseconds(held, config, M, multiprocessors))
    return list(dict.fromkeys((*known, *liked[:TRIED])))


class Rounded:
    """A cut in bytes as `ranked` times it: rounding, then the matmul."""

    def __init__(self, held: TileWeight, config: Config, M: int, dtype: torch.dtype) -> None:
        macros = macros_of(held, config, dtype, int8=True)
        self.function = sources.function(SOURCE, KERNEL, macros, held.codes.device)
        self._row_scale = cuda_int8.row_scale(held)  # kept alive: plans hold addresses
        run = cuda_int8.many_tokens(held, self._row_scale, M, dtype, config)
        if run is None:
            raise RunFailed("cuts in bytes were searched on a device other than Hopper's, which must be refused before")
        self._run = run

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor, exact_MK: Tensor | None = None) -> None:
        """Queues both kernels; inputs of outliers, where there are any, are x itself."""
        self._run(x_MK, bias_N, y_MN)


def sixteen_microseconds(weights: Sequence[TileWeight], M: int, dtype: torch.dtype) -> float:
    """Rounding and the matmul in 16 bits, in microseconds. weights: one and its copies."""
    held = weights[0]
    x_MK = torch.randn(M, held.K, device=held.codes.device).to(dtype)
    y_MN = torch.empty(M, held.N, dtype=dtype, device=held.codes.device)
    columns = ceil_divide(held.K, 16) * 16
    rounding = Quantizer(dtype=dtype, device=held.codes.device, output=ROUNDED, columns=columns)
    plain = [replace(weight, in_bytes=False) for weight in weights]
    by = cuda.choose(plain[0], M, dtype, torch.cuda.get_device_capability(held.codes.device))

    def call(run: cuda.Runner) -> None:
        run(rounding(x_MK)[0][:, : held.K].contiguous(), None, y_MN)

    return graph_microseconds([partial(call, by.plan(weight, M, dtype)) for weight in plain])


def _serves(held: TileWeight, M: int) -> bool:
    """Whether M tokens may be multiplied in bytes with a cut that is searched here."""
    if held.exact:
        return cuda_added.fewest_tokens(held) <= M and (held.group_size == 0 or M > cuda_int8.FEW_TOKENS)
    return cuda_int8.shares_columns(held, M)


def _in_words(entry: dict[str, Any]) -> str:
    beside = f", in 16 bits {entry[SIXTEEN]} us" if SIXTEEN in entry else ""
    return f"{entry['us']} us in bytes{beside}, {entry['config']}"
