"""Our pool of threads beside OpenMP's, on the same kernels in one process: is it worth its code?

    python benchmarks/cpu_pool.py PACKED --out benchmarks/results/cpu_pool.json

PACKED is a checkpoint that is loaded directly (model/direct.py), run in bfloat16: a prompt of --prompt tokens, then --new
tokens one at a time. Turns of both pools alternate, and every second pair has a neighbour: one process that keeps one core
busy, as machines have them. Given are medians of tokens per second and medians of the ratios of neighbouring turns, ours over
OpenMP's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from aerogel.eval.machine import machine, versions
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.linear import round_activations
from aerogel.kernels.native import library
from aerogel.model.direct import load

POOLS = ("own", "openmp")
QUANTITIES = ("prefill", "decode")


def busy() -> None:
    while True:
        pass


def turn(decoder: Decoder, ids: torch.Tensor, new: int, pool: str) -> dict[str, float]:
    """Tokens per second of both phases; `library.own_pool` is what every phase asks for its threads."""
    own = library.own_pool

    def borrowed() -> AbstractContextManager[None]:
        return nullcontext()

    if pool == "openmp":
        library.own_pool = borrowed  # type: ignore[assignment]
    try:
        start = first = time.perf_counter()
        for number, _ in enumerate(decoder.stream([ids], new + 1)):
            first = time.perf_counter() if number == 0 else first
        end = time.perf_counter()
    finally:
        library.own_pool = own
    return {"prefill": len(ids) / (first - start), "decode": new / (end - first)}


def measure(decoder: Decoder, ids: torch.Tensor, given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    neighbour = multiprocessing.Process(target=busy, daemon=True)
    neighbour.start()
    pid = neighbour.pid or 0
    samples = {(place, pool): [] for place in ("idle", "busy") for pool in POOLS}  # type: ignore[var-annotated]
    for number in range(given.rounds + 1):
        for place in ("idle", "busy"):
            os.kill(pid, signal.SIGSTOP if place == "idle" else signal.SIGCONT)
            for pool in POOLS if number % 2 else POOLS[::-1]:
                sample = turn(decoder, ids, given.new, pool)
                if number:  # the first warms up
                    samples[place, pool].append(sample)
    neighbour.kill()
    for place in ("idle", "busy"):
        row: dict[str, Any] = {
            pool: {q: statistics.median(s[q] for s in samples[place, pool]) for q in QUANTITIES} for pool in POOLS
        }
        pairs = list(zip(samples[place, "own"], samples[place, "openmp"], strict=True))
        row["own_over_openmp"] = {q: statistics.median(ours[q] / theirs[q] for ours, theirs in pairs) for q in QUANTITIES}
        found[place] = row | {"samples": {pool: samples[place, pool] for pool in POOLS}}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load(given.packed, torch.bfloat16)
    ids = torch.randint(model.config.vocab_size, (given.prompt,), generator=torch.Generator().manual_seed(0))
    rows = {}
    for numerics in ("exact", "int8"):
        if numerics == "int8":
            round_activations(model)  # type: ignore[arg-type]
        rows[numerics] = measure(Decoder(model), ids, given)
        for place, row in rows[numerics].items():
            middle = {pool: {q: round(row[pool][q], 1) for q in QUANTITIES} for pool in POOLS}
            sys.stdout.write(f"{numerics:6} {place:5} {middle} {row['own_over_openmp']}\n")
    if given.out:
        command = f"python benchmarks/cpu_pool.py {given.packed.name} --rounds {given.rounds} --threads {given.threads}"
        report = {"command": command, "machine": machine(), "versions": versions(), "prompt": given.prompt, "new": given.new}
        given.out.write_text(json.dumps(report | {"threads": given.threads, "rows": rows}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
