"""Contenders are timed in turn and per call; the device and its clock are played by the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from aerogel.kernels.cuda import timing


class Graph:
    """Two calls of a contender that take `us` microseconds each, and one more in every replay."""

    def __init__(self, name: str, us: float, seen: list[str]) -> None:
        self.name, self.us, self.seen, self.replays = name, us, seen, 0

    def replay(self) -> None:
        self.seen.append(self.name)
        self.replays += 1


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was replayed or waited for, in order."""
    order: list[str] = []

    def graph_of(calls: Sequence[Any]) -> tuple[Graph, int]:
        return calls[0], 2

    def elapsed(work: Callable[[], object]) -> float:
        work()
        graph: Graph = work.__self__  # type: ignore[attr-defined]
        return 2 * graph.us + graph.replays

    monkeypatch.setattr(timing, "graph_of", graph_of)
    monkeypatch.setattr(timing, "_elapsed", elapsed)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: order.append(f"pause {seconds}"))
    return order


def test_contenders_take_turns_behind_pauses(seen: list[str]) -> None:
    contenders: Any = {name: [Graph(name, us, seen)] for name, us in (("slow", 100.0), ("fast", 10.0))}
    found = timing.in_turn(contenders, rounds=3, pause=0.5)
    turn = [word for name in ("slow", "fast") for word in ("pause 0.5", *[name] * 4)]
    assert seen == 3 * turn
    # Replays 2 to 4, 6 to 8 and 10 to 12 are timed: medians 3, 7 and 11.
    assert found == {"slow": (200 + 7) / 2, "fast": (20 + 7) / 2}


def test_sustained_leaves_out_the_first_rush(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the time is not counted; a replay takes a tenth of a second here."""
    graph: Any = Graph("it", 50.0, seen)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.1 * graph.replays)
    found = timing.sustained_microseconds([graph], seconds=0.8)
    counted = range(3, 11)  # the first two end before 0.2 s are over, the last begins before 1 s are
    assert found == pytest.approx(sum(100 + i for i in counted) / len(counted) / 2)
