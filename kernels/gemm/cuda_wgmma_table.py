"""Measured configurations of the many-token kernel, by device family, weight and number of tokens.

`wgmma_NAME.json` beside this module holds what was measured on NAME: for each weight the fastest configuration at some
numbers of tokens, with its time. Other numbers of tokens use the next larger one; tables those of other groups too, since what
decoding takes decides there, and what has no entries of its own but no table those of integers in as large groups. Weights with
outliers have entries of their own where they want another cut (`4o/g128/4096x4096`). A weight
that no entry suits, or a number of tokens beyond them, is served by the cost model of `cuda_wgmma`: the cut of other groups can
be half as fast, where two blocks share a multiprocessor.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aerogel.kernels.gemm.cuda_table import family_slug, places
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import Config, deepest, fits

FOLDER = Path(__file__).parent
TOKEN_CLASSES = (16, 32, 64, 128, 256, 512, 1024, 4096)


@functools.cache
def table(name: str) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Place (`cuda_table.places`) to number of tokens to entry (`config`, `us`) for device `name`; empty if not measured."""
    path = FOLDER / f"wgmma_{family_slug(name)}.json"
    found: Mapping[str, Mapping[str, Mapping[str, Any]]] = (
        json.loads(path.read_text("utf-8"))["entries"] if path.is_file() else {}
    )
    return found


def cuts_for(weight: TileWeight, M: int, name: str) -> list[tuple[int, Config]]:
    """Runs of rows and their measured configurations for M tokens on the device `name`; empty when nothing was measured.

    An entry with `rows` and `rest` serves that many rows with `config` and the others with `rest`.
    """
    tokens = next((size for size in TOKEN_CLASSES if size >= M), TOKEN_CLASSES[-1])
    integers = f"{weight.bits}/g{weight.group_size}/{weight.N}x{weight.K}"
    own = places(weight)[:-1] if weight.table is not None or weight.planes else places(weight)[:1]
    beside = () if weight.outliers is None else (integers.replace("/", "o/", 1),)
    known = [table(name).get(place, {}) for place in (*beside, *own, integers)]
    entry = next((entries[str(tokens)] for entries in known if str(tokens) in entries), None)
    if entry is None:
        return []
    rows = entry.get("rows", weight.N)
    cuts = [(rows, _fitting(weight, entry["config"]))]
    if rows < weight.N:
        cuts.append((weight.N - rows, _fitting(weight, entry["rest"])))
    return [(rows, config) for rows, config in cuts if config is not None] if all(config for _, config in cuts) else []


def _fitting(weight: TileWeight, data: Mapping[str, Any]) -> Config | None:
    """The configuration, with shallower rings where the weight has more beside its codes than the one that was measured; None
    where they would be less than half as deep, which is no longer what was measured."""
    config = Config(**data)
    if fits(weight, config):
        return config
    made = deepest(weight, config)
    return made if made is not None and 2 * made.x_stages >= config.x_stages else None
