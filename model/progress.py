"""How a long run tells whoever watches where it stands. Nothing below `cli/` draws anything."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

NO_FACTS: Mapping[str, object] = MappingProxyType({})


class Progress(Protocol):
    """Called as `progress("blocks", 3, 30, {"tokens_per_second": 812.0, "memory_bytes": 1 << 30, "loss": 0.004})`."""

    def __call__(self, stage: str, done: int, total: int, facts: Mapping[str, object] = NO_FACTS, /) -> None:
        """`done` of `total` steps of `stage` are finished; `facts` are shown beside the bar, by name."""


def silent(stage: str, done: int, total: int, facts: Mapping[str, object] = NO_FACTS, /) -> None:
    """The progress callback that shows nothing."""
