"""The layers to solve."""

from __future__ import annotations

from tests.solving import MakeLayer, layer, make_layer, seeded

__all__ = ["MakeLayer", "layer", "make_layer", "seeded"]
