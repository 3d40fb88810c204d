"""How long a kernel takes in a model: replays of a CUDA graph that goes round over copies of its weights.

A weight that is used again at once comes from the L2 cache and flatters the kernel; a model comes back to it only after
all others. So the same call is recorded for several copies of the weight, together larger than any cache, until the graph
is long enough that starting it does not count. The median over replays is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from aerogel.kernels.cuda.record import recording

COPIES_BYTES = 200_000_000
"""What the copies of a weight should exceed together: four times an H100's L2."""
MOST_COPIES = 40


def copies(nbytes: int) -> int:
    """How many copies of a weight of `nbytes` to go round over."""
    return min(MOST_COPIES, max(3, -(-COPIES_BYTES // max(nbytes, 1))))


def graph_of(calls: Sequence[Callable[[], object]], *, graph_ms: float = 4.0) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that holds the calls in turn, several rounds of them, and how many calls that are.

    Args:
        calls: one per copy of the weight; each queues its kernels on the current stream. All have run before or may run now.
        graph_ms: how long the graph should take, about.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        once = _elapsed(lambda: [call() for call in calls]) / len(calls)
    torch.cuda.current_stream().wait_stream(side)
    rounds = max(1, round(min(2000.0, 1000 * graph_ms / max(once, 1.0)) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with recording(graph, torch.device("cuda")):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph, rounds * len(calls)


def graph_microseconds(calls: Sequence[Callable[[], object]], *, graph_ms: float = 4.0, replays: int = 7) -> float:
    """Microseconds of one call, median over `replays` of a graph; the other arguments are those of `graph_of`."""
    graph, count = graph_of(calls, graph_ms=graph_ms)
    graph.replay()
    return _replayed(graph, replays) / count


def in_turn(contenders: Mapping[str, Sequence[Callable[[], object]]], *, rounds: int, pause: float) -> dict[str, float]:
    """Microseconds of a call of each contender, the median of rounds in which all take their turn.

    A dense product draws more power than the device may use on average: some 50 ms later its clock falls by a fifth, and
    whoever comes next is measured slower for it. So each turn is a few milliseconds long and comes after a pause.

    Args:
        contenders: calls by name, as `graph_of` takes them.
        pause: seconds without work before each turn.
    """
    graphs = {name: graph_of(calls) for name, calls in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            time.sleep(pause)
            graph.replay()
            found[name].append(_replayed(graph, 3) / count)
    return {name: statistics.median(times) for name, times in found.items()}


def sustained_microseconds(calls: Sequence[Callable[[], object]], *, seconds: float) -> float:
    """Microseconds of one call when nothing else runs for so long, the mean: at the clock that its own power leaves it. The
    device adjusts that about once a second, so that less says little."""
    graph, count = graph_of(calls)
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() < start + 1.25 * seconds:
        taken = _elapsed(graph.replay)
        if time.perf_counter() > start + seconds / 4:  # behind the first rush
            times.append(taken)
    return statistics.mean(times) / count


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds of a replay, the median."""
    return statistics.median(_elapsed(graph.replay) for _ in range(replays))


def _elapsed(work: Callable[[], object]) -> float:
    """Microseconds of the device between two events around `work`, on the current stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return 1000.0 * float(start.elapsed_time(stop))
