"""How long a kernel takes in a model: replays of a CUDA graph that goes round over copies of its weights.

A weight that is used again at once comes from the L2 cache and flatters the kernel; a model comes back to it only after
all others. So the same call is recorded for several copies of the weight, together larger than any cache, until the graph
is long enough that starting it does not count. The median over replays is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

COPIES_BYTES = 200_000_000
"""What the copies of a weight should exceed together: four times an H100's L2."""
MOST_COPIES = 40


def copies(nbytes: int) -> int:
    """How many copies of a weight of `nbytes` to go round over."""
    return min(MOST_COPIES, max(3, -(-COPIES_BYTES // max(nbytes, 1))))


def graph_microseconds(calls: Sequence[Callable[[], object]], *, graph_ms: float = 4.0, replays: int = 7) -> float:
    """Microseconds of one call, median over replays of a graph that holds the calls in turn, several rounds of them.

    Args:
        calls: one per copy of the weight; each queues its kernels on the current stream. All have run before or may run now.
        graph_ms: how long the graph should take, about.
        replays: how many are timed.
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
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = sorted(_elapsed(graph.replay) for _ in range(replays))
    return times[len(times) // 2] / (rounds * len(calls))


def _elapsed(work: Callable[[], object]) -> float:
    """Microseconds of the device between two events around `work`, on the current stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return 1000.0 * float(start.elapsed_time(stop))
