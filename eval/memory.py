"""How large a model is: on disk, in memory, and at the peak of a run. All sizes in bytes."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import torch
from torch import nn

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth"})
"""File name endings that hold weights; everything else is configuration, tokenizer and documentation."""


def disk_bytes(path: Path) -> dict[str, int]:
    """`total` and `weights` of a checkpoint folder (links followed, hidden files left out) or of a single file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if _visible(file, path)]
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    return {
        "total": sum(sizes.values()),
        "weights": sum(size for file, size in sizes.items() if file.suffix in WEIGHT_SUFFIXES),
    }


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once (tied weights, views of one packed buffer)."""
    storages: dict[tuple[str, int], int] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes() -> int | None:
    """The most physical memory this process has held since it started; None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """The most CUDA memory that tensors of this process held since it started or the last reset, or None."""
    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
