"""Which instruction set and how many threads serve which weight on this machine: measured by `aerogel tune`, kept as data.

Without a table the widest instructions and all of torch's threads run everything, which is right for large weights. Small ones
may be done before a second thread has come, and some processors lower their clock for their widest registers: only a
measurement tells. Entries are keyed by what decides the time: arithmetic, bits, group size, shape, tokens, and the number of
threads torch has. The file bears the processor's name and the version of the compiled library; of another version it is
ignored.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels.cuda.nvrtc import cache_folder, keep
from aerogel.kernels.gemm.cuda_table import device_slug
from aerogel.kernels.native import library

TOKEN_CLASSES = (1, 4, 16, 128)
"""Numbers of tokens that are measured; others use the next larger one, more than the last the last."""
TOLERANCE = 2e-2
"""Relative Frobenius error between two paths: their results are rounded to 16 bits, inputs to int8."""
ROUNDS = 7
COPY_BYTES = 64 << 20
"""Copies of a weight take turns until they exceed what caches hold."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An instruction-set path by name, and a number of threads."""

    path: str
    threads: int


Run = Callable[[int, Choice], Tensor]
"""Runs the matmul with copy i of the weight."""


def token_class(M: int) -> int:
    """The number of tokens that is measured for M of them."""
    return next((size for size in TOKEN_CLASSES if size >= M), TOKEN_CLASSES[-1])


def key_of(numerics: int, bits: int, group: int, N: int, K: int, M: int) -> str:
    """`exact/4/g128/4096x14336/m1/t2`: arithmetic, width, group, shape, token class, torch's threads."""
    name = next(name for name, number in library.NUMERICS.items() if number == numerics)
    return f"{name}/{bits}/g{group}/{N}x{K}/m{token_class(M)}/t{library.threads()}"


def tuned_path() -> Path:
    """Where `tune` keeps what it found on this machine."""
    from aerogel.eval.machine import processor

    return cache_folder() / "tuned" / f"cpu_{device_slug(processor())}.json"


@functools.cache
def table() -> Mapping[str, Choice]:
    """All entries measured on this machine with this version of the library; empty where there are none."""
    path = tuned_path()
    held: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if held.get("library") != library.VERSION:
        return {}
    able = library.paths()
    return {key: Choice(**entry["choice"]) for key, entry in held["entries"].items() if entry["choice"]["path"] in able}


def save(entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Adds entries to the machine's table and returns its file."""
    path = tuned_path()
    held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    old = held["entries"] if held.get("library") == library.VERSION else {}
    content = {"library": library.VERSION, "torch": torch.__version__, "entries": {**old, **entries}}
    keep(path, json.dumps(content, indent=1, sort_keys=True).encode())
    table.cache_clear()
    return path


def choice_for(numerics: int, bits: int, group: int, N: int, K: int, M: int) -> Choice | None:
    """What was measured for such a matmul, None where nothing was."""
    known = table()
    return known.get(key_of(numerics, bits, group, N, K, M)) if known else None


def candidates() -> list[Choice]:
    """Every path of this machine with 1, 2, 4, ... and all of torch's threads, what runs without a table first."""
    most = library.threads()
    counts = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)}, reverse=True)
    names = [name for name in library.paths() if name != "portable"] or ["portable"]
    return [Choice(name, threads) for name in reversed(names) for threads in counts]


def fastest(run: Run, choices: Sequence[Choice]) -> tuple[Choice, float]:
    """The fastest choice and its median seconds. All take turns, so that a drifting machine favours none.

    Raises:
        RunFailed: two paths that do not agree: a table must never hold a broken one.
    """
    wanted = run(0, choices[0]).float()
    times: dict[Choice, list[float]] = {choice: [] for choice in choices}
    for choice in choices:
        found = run(0, choice).float()
        if not ((found - wanted).norm() <= TOLERANCE * wanted.norm()):
            raise RunFailed(
                f"the CPU path {choice.path} does not give what {choices[0].path} gives; report this with your processor"
            )
    for turn in range(ROUNDS):
        for number, choice in enumerate(choices):
            start = time.perf_counter()
            run(turn * len(choices) + number, choice)
            times[choice].append(time.perf_counter() - start)
    medians = {choice: statistics.median(taken) for choice, taken in times.items()}
    best = min(choices, key=medians.__getitem__)
    return best, medians[best]


def entry_of(choice: Choice, seconds: float) -> dict[str, Any]:
    """What the table keeps of a measurement."""
    return {"choice": asdict(choice), "us": round(1e6 * seconds, 2)}
