"""Recording a CUDA graph so that a recording that fails leaves no trace.

Some work cannot be recorded: an operator that reads a number back to the host ends the recording with an error, and callers
go on without a graph. torch (2.11) then still takes its own generator for one that is being recorded, and every random number
drawn on that device afterwards, by whomever, is an error ("Offset increment outside graph capture"). So the generator's state
from before is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """What is queued inside is recorded in `graph` and does not run.

    Args:
        graph: an empty graph.
        device: a CUDA device; its current stream waits for what it has been given.
        pool: memory that several graphs share (`torch.cuda.graph_pool_handle`).

    Raises:
        RuntimeError: something inside cannot be recorded; the device and torch's generator are as before.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.synchronize(index)
        generator.graphsafe_set_state(before)
        raise
