"""The progress line of a long run: what is being done, how far, how long still, tokens per second, memory.

On a terminal it is a live line on stderr. In a log file it is one plain line per finished tenth of a stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aerogel.model.progress import NO_FACTS, Progress, silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """A `Progress` callback that draws for as long as the context is open."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            yield _Live(bars)
    else:
        yield _Lines()


def describe(facts: Mapping[str, object]) -> str:
    """Known facts with their units, anything else as name and value."""
    words = []
    for name, value in facts.items():
        if name == "tokens_per_second" and isinstance(value, int | float):
            words.append(f"{value:,.0f} tok/s")
        elif name.endswith("_bytes") and isinstance(value, int | float):
            words.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {value / 2**30:.2f} GiB")
        elif isinstance(value, float):
            words.append(f"{name.replace('_', ' ')} {value:.3g}")
        elif name == "name":
            words.append(str(value))
        elif value is not None:
            words.append(f"{name.replace('_', ' ')} {value}")
    return "  ".join(words)


class _Live:
    """One bar per stage."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, facts: Mapping[str, object] = NO_FACTS, /) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, facts="")
        self.bars.update(self.tasks[stage], completed=done, total=total, facts=describe(facts))


class _Lines:
    """A line for the first step, for each finished tenth and for the end."""

    def __init__(self) -> None:
        self.shown: dict[str, int] = {}
        self.begun: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int, facts: Mapping[str, object] = NO_FACTS, /) -> None:
        tenth = 10 * done // total if total else 10
        start, already = self.begun.setdefault(stage, (time.monotonic(), done))
        if tenth == self.shown.get(stage, -1):
            return
        self.shown[stage] = tenth
        spent = time.monotonic() - start
        # A resumed run begins in the middle: only what it did itself says how fast it is.
        left = f", {spent / (done - already) * (total - done):.0f} s left" if already < done < total else ""
        sys.stderr.write(f"{stage}: {done}/{total}, {spent:.0f} s{left}  {describe(facts)}".rstrip() + "\n")
        sys.stderr.flush()
