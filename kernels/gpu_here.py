"""Whether this machine has the GPU that a kernel was written for."""

from __future__ import annotations

import torch

Capability = tuple[int, int]
LEAST: Capability = (8, 0)
"""Of NVIDIA's GPUs: older ones have no bfloat16."""


def missing(device: str = "cuda", least: Capability = LEAST) -> str | None:
    """What it lacks for kernels of a torch device type, as a sentence, or None.

    least: the compute capability that NVIDIA's GPUs must have; others have none.
    """
    there = torch.cuda.is_available() if device == "cuda" else torch.xpu.is_available()
    if not there:
        return f"needs a GPU that torch can use as {device}, and there is none"
    if device == "cuda" and torch.version.hip is None:
        return older(torch.cuda.get_device_capability(), least)
    return None


def nvidia_missing(least: Capability = LEAST) -> str | None:
    """The same for sources that are compiled for NVIDIA's GPUs alone. Raises `ImportError` where the compiler is missing."""
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, and this torch was built for AMD's"
    found = missing("cuda", least)
    if found is None:
        from aerogel.kernels.cuda.nvrtc import compiler

        compiler()  # its ImportError is the reason
    return found


def older(found: Capability, least: Capability) -> str | None:
    """The refusal of a GPU that is older than `least`."""
    if found >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]} or newer, this GPU has {found[0]}.{found[1]}"


def other_than_hopper(found: Capability) -> str | None:
    """The refusal of a GPU without the warpgroup matmul, which 9.0 alone has."""
    if found[0] == 9:
        return None
    return f"multiplies with the warpgroup instruction of compute capability 9.0, which {found[0]}.{found[1]} does not have"
