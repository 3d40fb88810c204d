"""On what and with what a report was made. Nothing in it names a person, a host or a place on the disk."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from aerogel.version import __version__

PACKAGES = ("aerogel", "torch", "transformers", "safetensors", "accelerate", "datasets", "lm_eval", "triton")


def processor() -> str:
    """The processor's name as its maker writes it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which a container or a job scheduler can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_memory() -> int | None:
    """Bytes of physical memory; None where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _installed() -> dict[str, str]:
    """Versions of those of PACKAGES that are there; looked up once, since it takes longer than a small model's first block."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, object]:
    """The report's `machine`: cpu, cores, threads, memory (bytes), gpu (names and bytes of each, or None), system."""
    gpus = None
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = [{"name": device.name, "memory": device.total_memory} for device in devices]
    return {
        "cpu": processor(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": installed_memory(),
        "gpu": gpus,
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """The report's `versions`: Python, and those of PACKAGES that are installed."""
    found = {"aerogel": __version__, "python": platform.python_version(), **_installed()}
    found["torch"] = torch.__version__  # with its build, which the metadata of some builds leave out
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found
