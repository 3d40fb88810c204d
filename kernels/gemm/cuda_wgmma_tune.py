"""The search for cuts of the many-token kernel: what is known for a weight and what the cost model likes best, timed.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from aerogel.kernels.cuda import sources
from aerogel.kernels.gemm import cuda_wgmma
from aerogel.kernels.gemm.cuda_ranked import ranked
from aerogel.kernels.gemm.cuda_tune import weight_copies
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import SOURCE, Config, deepest, microseconds
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan, macros_of
from aerogel.kernels.gemm.cuda_wgmma_table import cuts_for

TRIED = 16
"""Cuts of the cost model, which is right to 15 % or so: the fastest is nearly always among them."""
MOST_WHOLE = 64
"""Tokens up to which a whole tile is tried as one set of fragments (`batch` 8)."""


def candidates(weight: TileWeight, M: int, multiprocessors: int, name: str) -> list[Config]:
    """Cuts worth a measurement: the one in use on the device `name`, the cost model's TRIED first, and of these the ones that
    can hold a whole tile's fragments with them: products of few tokens are short, and more of them hide more decoding."""
    known = [config for rows, config in cuts_for(weight, M, name) if rows == weight.N]
    liked = sorted(cuda_wgmma.candidates(weight, M), key=lambda config: microseconds(weight, config, M, multiprocessors))
    few = (config for config in liked[:TRIED] if config.tokens <= MOST_WHOLE and config.warpgroups * config.blocks <= 3)
    whole = [deepest(weight, replace(config, batch=8)) for config in few if config.resident == 1 and weight.outliers is None]
    return list(dict.fromkeys(config for config in (*known, *liked[:TRIED], *whole) if config is not None))


def tune(weight: TileWeight, tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The best cut per number of tokens, entries for `cuda_wgmma_table.save`. The weight's values do not matter, only its shape
    and types, and how many outliers it has."""
    facts = torch.cuda.get_device_properties(weight.codes.device)
    weights = weight_copies(weight)
    entries: dict[str, dict[str, Any]] = {}
    for M in tokens:
        configs = candidates(weight, M, facts.multi_processor_count, facts.name)
        wanted = [(SOURCE, macros_of(weight, config, torch.bfloat16)) for config in configs]
        sources.compile_ahead(wanted, (facts.major, facts.minor), workers=16)
        config, time = ranked(weights, configs, M, torch.bfloat16, Plan)[0]
        entries[str(M)] = {"config": as_data(config), "us": round(time, 2)}
    return entries


def as_data(config: Config) -> dict[str, int]:
    """What differs from the defaults, as the table keeps it."""
    plain = asdict(Config(tokens=0))
    return {name: value for name, value in asdict(config).items() if value != plain[name]}
