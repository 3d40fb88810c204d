"""Words in device memory through which the blocks of a launch tell each other that something is there.

They are zero before a launch, and the launch leaves them zero. Launches on one stream come one after the other, so they share
their words, whatever kernels they are; those on different streams may run at once, so each stream has its own. What a graph
records may be replayed beside anything else, so each recording has its own as well: they come from the graph's memory, and
setting them to zero is recorded with their first use. When another recording begins the last one's need not be held: what
else the memory is given to belongs to graphs that share it in turn, each of which begins with its own zeros.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from aerogel.kernels.cuda.launch import check, driver

LEAST_WORDS = 1 << 12
_held: dict[tuple[int, int, bool], tuple[int, Tensor]] = {}
_lock = threading.Lock()


def flags(stream: int, device: torch.device, words: int) -> Tensor:
    """At least `words` zeros, int32, for launches on `stream`, which is torch's current one."""
    recording = recording_on(stream)
    key = stream, device.index, recording > 0
    with _lock:
        of, held = _held.get(key, (0, None))
        if held is None or of != recording or len(held) < words:
            held = torch.zeros(max(words, LEAST_WORDS), dtype=torch.int32, device=device)
            _held[key] = recording, held
        return held


def recording_on(stream: int) -> int:
    """The number of the graph that is being recorded on the stream, which no other graph has; 0 where none is."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    asked = driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    check(asked, "asking whether a graph is being recorded")
    return number.value if status.value else 0
