"""The CUDA devices there are, for what spreads processes over them: each is told of one device alone, before it starts."""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """name: what CUDA_VISIBLE_DEVICES calls it. memory: bytes it has."""

    name: str
    memory: int


def gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, where it is set; none without a driver. No context is made on any of them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    if driver.cuInit(0):
        return []
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else map(str, itertools.count())
    return [Gpu(name, memory_of(driver, index)) for index, name in zip(range(count.value), names, strict=False)]


def memory_of(driver: ctypes.CDLL, index: int) -> int:
    """Bytes of a device."""
    device, size = ctypes.c_int(), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return size.value


def seats(each: int, apart: int = 0) -> list[str]:
    """Names of devices, one for each process: as many as this one may use processors, if devices hold so many.

    each: bytes of a device for one process. apart: bytes of each device that are left free of them. One process fits anyway.
    Neighbours sit on different devices. Empty without a device.
    """
    found = gpus()
    counts = [max((gpu.memory - apart) // each, 1) for gpu in found]
    turns = range(max(counts, default=0))
    return [gpu.name for turn in turns for gpu, count in zip(found, counts, strict=True) if turn < count][: cores()]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
