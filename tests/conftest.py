"""What all tests share: syncing costs no time, and tests on a GPU run side by side. For these, workers of pytest-xdist share
the devices out among them, and leave each other room there.

Most of what these tests do is compiling kernels, on the CPU. So there are as many workers as processors, fewer only where
devices have too little memory for them. Tests that need much of it are one group (`xdist_group("large")`), one after another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.gpus import cores, seats

WORKER_MEMORY, LARGE_MEMORY = 3 << 30, 14 << 30
"""Bytes of a device for each worker, most of them CUDA's own, and for the group of large tests."""
KEPT_MEMORY = 512 << 20
"""Bytes that torch may hold for later in a worker that has nothing to do with them."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` imports only files that have such tests; each worker would import the others for nothing."""
    other = config.option.markexpr == "gpu" and collection_path.suffix == ".py"
    return True if other and "mark.gpu" not in collection_path.read_text() else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many `-n auto` are."""
    return len(seats(WORKER_MEMORY, LARGE_MEMORY)) or cores()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Called where workers are started: each gets its device."""
    if there := seats(WORKER_MEMORY, LARGE_MEMORY):
        node.workerinput["gpu"] = there[int(node.gateway.id.removeprefix("gw")) % len(there)]


def pytest_configure(config: pytest.Config) -> None:
    """In a worker nothing has touched CUDA yet."""
    gpu = getattr(config, "workerinput", {}).get("gpu")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A small checkpoint is synced 25 times, a twentieth of a test's time. Nobody cuts the power here; when what is synced is
    tested in `model/test_resume.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Memory that torch keeps is given back, so that others can have it."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_MEMORY:
        torch.cuda.empty_cache()
