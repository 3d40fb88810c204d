"""Where the bytes of a compressed checkpoint went: every tensor of the source with its fate, and the totals.

Counted in the files as they were written, not in what was planned: a native layout fills up its last tile, and entropy
coding saves what it saves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aerogel.model.reader import CheckpointReader
from aerogel.model.structure import Structure

Rows = Sequence[Mapping[str, Any]]
"""The report's rows of all parts, each with its `layers`."""


def count_bytes(final: Path, structure: Structure, parts: Rows) -> None:
    """Bytes of every coded matrix as they are in the files, into its row."""
    sizes: Counter[str] = Counter()
    for entry in CheckpointReader(final):
        name, _, local = entry.name.rpartition(".")
        sizes[name] += entry.nbytes if local != "bias" else 0
    weights = {m.name: m.n * m.k for m in structure.matrices}
    for row in (row for part in parts for row in part["layers"] if row["bits"] is not None):
        row["bytes"] = sizes[row["name"]]
        row["bits_per_weight"] = 8 * row["bytes"] / weights[row["name"]]


def tensor_table(final: Path, structure: Structure, planned: Rows, parts: Rows, saved: Mapping[str, int]) -> dict[str, Any]:
    """`tensors` and `size` of the report.

    Args:
        final: the finished folder.
        planned: the plan's row for each tensor of the source.
        parts: the report's rows of all parts.
        saved: bytes that entropy coding took off, by stored tensor.
    """
    layers = {row["name"]: row for part in parts for row in part["layers"]}
    by_tensor: dict[str, list[dict[str, Any]]] = {}
    for m in structure.matrices:
        if m.name in layers and not m.tied:
            by_tensor.setdefault(m.tensor, []).append(layers[m.name])
    stored = CheckpointReader(final)
    table = []
    for tensor in planned:
        mine = by_tensor.get(tensor["name"], [])
        size = sum(row["bytes"] - _saved(row["name"], saved) for row in mine) if mine else tensor["bytes"]
        table.append({**tensor, "bytes": size - saved.get(tensor["name"], 0) * (not mine)})
    weights = [row for row in table if row["fate"] == "compressed"]
    counted = sum(math.prod(row["shape"]) for row in weights)
    source = structure.reader.nbytes
    return {
        "tensors": table,
        "size": {
            "source_bytes": source,
            "bytes": stored.nbytes,
            "compression": source / stored.nbytes,
            "bits_per_weight": 8 * sum(row["bytes"] for row in weights) / counted if counted else None,
            "zeros": _zero_share(layers),
            "files": sorted(path.name for path in final.iterdir()),
        },
    }


def _saved(layer: str, saved: Mapping[str, int]) -> int:
    """Bytes that coding saved on the tensors of a layer."""
    return sum(saved.get(f"{layer}.{local}", 0) for local in ("weight", "weight_packed"))


def _zero_share(layers: Mapping[str, Mapping[str, Any]]) -> float:
    """Zeros among the treated weights, by mask; pruned weights are stored dense for now, so they save no bytes."""
    return sum(row["zeros"] for row in layers.values()) / len(layers) if layers else 0.0
