"""Measured configurations of the many-token kernel, by device family, weight and number of tokens.

`wgmma_NAME.json` beside this module holds what was measured on NAME: for each weight the fastest configuration at some
numbers of tokens, with its time; what `aerogel tune` measured on this machine lies in the cache folder, and wins. Other numbers
of tokens use the next larger one; tables those of other groups too, since what decoding takes decides there, and what has no
entries of its own but no table those of integers in as large groups, or in groups of 128 where its own are multiples of that.
Weights with outliers have entries of their own where they want another cut (`4o/g128/4096x4096`), and take those of any
groups, else what the same weights have without; those whose outliers have inputs of their own take only theirs (`8e/...`, and
`8i/...` where codes are multiplied as bytes), and so do weights without outliers that are multiplied as bytes (`8a/...`). A
weight that no entry suits, or a number of tokens beyond them, is served by the cost model of `cuda_wgmma`: the cut of other
groups can be half as fast, where two blocks share a multiprocessor.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aerogel.kernels.cuda.nvrtc import cache_folder, keep
from aerogel.kernels.gemm.cuda_table import device_slug, family_slug, places
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import Config, deepest, fits

FOLDER = Path(__file__).parent
TOKEN_CLASSES = (16, 32, 64, 128, 256, 512, 1024, 4096)
TOKENS_IN_BYTES = (16, 32, 48, 64, 96, 128)
"""Of weights that are multiplied as bytes without outliers, which have cuts for each (`cuda_bytes`)."""


@functools.cache
def table(name: str) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Place (`cuda_table.places`) to number of tokens to entry (`config`, `us`) for device `name`: the shipped ones of its
    family, then the machine's own."""
    found: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for path in (FOLDER / f"wgmma_{family_slug(name)}.json", tuned_path(name)):
        for place, entries in _entries(path).items():
            found[place] = {**found.get(place, {}), **entries}
    return found


def tuned_path(name: str) -> Path:
    """Where `save` keeps what was measured on the device `name`."""
    return cache_folder() / "tuned" / f"wgmma_{device_slug(name)}.json"


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads(path.read_text("utf-8"))["entries"]) if path.is_file() else {}


def save(name: str, place: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Adds a weight's entries, by number of tokens, to the machine's own table for the device `name`."""
    path = tuned_path(name)
    held = _entries(path)
    held[place] = {**held.get(place, {}), **entries}
    content = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "entries": held}
    keep(path, json.dumps(content, indent=1, sort_keys=True).encode())
    table.cache_clear()
    return path


def token_class(M: int) -> int:
    """The number of tokens that is measured for M of them."""
    return next((size for size in TOKEN_CLASSES if size >= M), TOKEN_CLASSES[-1])


def place_of(weight: TileWeight) -> str:
    """Where a weight's own entries are."""
    if weight.outliers is None:
        return places(weight)[0].replace("/", "a/", 1) if weight.in_bytes else places(weight)[0]
    return _beside_outliers(places(weight)[0], weight.exact, weight.in_bytes)


def _beside_outliers(place: str, exact: bool = False, in_bytes: bool = False) -> str:
    return place.replace("/", "i/" if in_bytes else "e/" if exact else "o/", 1)


def entry_of(weight: TileWeight, M: int, name: str) -> Mapping[str, Any] | None:
    """A weight's own entry for M tokens on the device `name`; None where it was not measured."""
    return table(name).get(place_of(weight), {}).get(str(class_of(weight, M)))


def class_of(weight: TileWeight, M: int) -> int:
    """The number of tokens that is measured for M tokens of a weight."""
    in_bytes = weight.in_bytes and weight.outliers is None
    return next((size for size in TOKENS_IN_BYTES if size >= M), token_class(M)) if in_bytes else token_class(M)


def cuts_for(weight: TileWeight, M: int, name: str) -> list[tuple[int, Config]]:
    """Runs of rows and their measured configurations for M tokens on the device `name`; empty when nothing was measured.

    An entry with `rows` and `rest` serves that many rows with `config` and the others with `rest`.
    """
    tokens = token_class(M)
    if weight.exact or weight.in_bytes:
        entry = entry_of(weight, M, name)
        return [] if entry is None else _cuts_of(weight, entry)
    integers = f"{weight.bits}/g{weight.group_size}/{weight.N}x{weight.K}"
    own = places(weight)[:-1] if weight.table is not None or weight.planes else places(weight)[:1]
    whole = weight.group_size > 128 and weight.group_size % 128 == 0
    in_128 = integers.replace(f"/g{weight.group_size}/", "/g128/")
    larger = (in_128,) if whole or weight.outliers is not None else ()
    # Where outliers stand who puts them into sheets decides, not how codes are decoded.
    beside = () if weight.outliers is None else map(_beside_outliers, (*own, integers, in_128))
    known = [table(name).get(place, {}) for place in (*beside, *own, integers, *larger)]
    found = [entries[str(tokens)] for entries in known if str(tokens) in entries]
    suited = map(functools.partial(_cuts_of, weight), found if weight.outliers is not None else found[:1])
    return next(filter(None, suited), [])


def _cuts_of(weight: TileWeight, entry: Mapping[str, Any]) -> list[tuple[int, Config]]:
    """Runs of rows and their configurations by an entry; none where they do not fit."""
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
