"""Pruning: scores, patterns, masks, and the refit of the weights that stay. One method per file."""

from __future__ import annotations

METHODS: dict[str, str] = {
    "magnitude": "aerogel.prune.magnitude:Magnitude",
    "wanda": "aerogel.prune.wanda:Wanda",
    "sparsegpt": "aerogel.prune.sparsegpt:SparseGpt",
}
"""Name of a `prune:` method -> its class, loaded when first used. A method is `Layer -> Layer` and leaves a mask."""
