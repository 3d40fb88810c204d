"""How fast the formats of `formats_cases.py` multiply on this machine, each through the kernel that the dispatcher picks.

    python benchmarks/formats_speed.py --device cpu  --out benchmarks/results/formats_speed.json
    python benchmarks/formats_speed.py --device cuda --out benchmarks/results/formats_speed.json      (a minute of an H100)

A random weight of `--shape` is rounded to the format (round to nearest, `FITTED_ROWS` rows that repeat) and packed as
loading would pack it. Then M tokens go through it: on a CPU the contenders take turns, all going round over copies of their
weights that together exceed the last-level cache; on a GPU each is a CUDA graph over copies (`kernels/cuda/timing.py`).
Activations are bfloat16. Rows hold microseconds (medians), bytes of the packed weight and those that a product reads, the
kernel's name, and the time over that of 4-bit integers in groups of 64, the row BASE, in the same run: the median of the ratios
of each round. On a CPU also over integers that read as many bytes: of all widths and the groups of GROUPS, with zero points or
without, those whose bytes are nearest; `gpu_numbers.py` has that for a GPU. A format that fails is written under `failed` with
its reason, the others go on and the exit code is 1. What a stage keeps beside its codes is left out here: `outliers.py` has its
price. The file keeps one part for each device. With --seconds no batch of formats is begun once the time is up, and
the next run of the same command on the same machine goes on with the formats that the file does not have.

# make bench: --device cpu --shape 1024x1024 --rounds 3 --only int4 nf4
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import BadInput
from aerogel.eval.machine import machine, versions
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.model.layer import Layer
from aerogel.quantize.codes import Codes, stacked
from aerogel.recipes.schema import Recipe

BASE = "int4 symmetric g64"
COPY_BYTES = {"cpu": 96 << 20, "cuda": 200_000_000}
KEPT = ["format", "kind", "bits", "group_size", "symmetric", "strategy", "scale_dtype", "offset", "block_rows", "power_of_two"]
"""Keys of a stage that say what its numbers are."""
FITTED_ROWS = 256
"""Of a weight: codebooks and planes take minutes to fit to all of it, and the codes do not matter to the time."""
GROUPS = (None, 512, 256, 128, 64, 32, 16)
"""Of the integers that formats are compared with. Others are slower (`groups.py`), which would be too easy a measure."""
EQUAL = 0.01
"""By how much of their bytes integers may differ; of those that do not, the ones with the widest groups are the measure."""
FEWEST_ROUNDS = 5

NO_GRAPH: set[str] = set()
"""Formats that no fused kernel serves: their weight is decoded part by part."""


def codes_only(stage: dict[str, Any]) -> dict[str, Any]:
    """A quantize stage that gives codes of the same format without data."""
    method = stage.get("method", "gptq")
    if method == "nested":  # planes with an offset; only calibration data can solve them
        return {"method": "bcq", "bits": stage["bits"], "group_size": stage["group_size"], "offset": "scale"}
    kept = {key: stage[key] for key in KEPT if key in stage}
    return {"method": method, **kept} if method == "bcq" else {"method": "rtn", "clip": "none", **kept}


def packed(stage: dict[str, Any], N: int, K: int, device: str) -> Linear:
    """A random weight in the stage's format, ready to run in bfloat16: some rows, fitted once, again and again."""
    recipe = Recipe.load({"aerogel": 1, "stages": [{"quantize": stage}]})
    method = recipe.stages[0].at("bfloat16").stage

    def fitted(rows: int) -> Codes:
        generator = torch.Generator(device).manual_seed(0)
        weight_nK = torch.randn(rows, K, device=device, generator=generator) * 0.02
        return method(Layer(name="weight", weight_NK=weight_nK)).codes

    part = fitted(min(N, FITTED_ROWS))
    if part.grid.shared_rows is None:  # what all rows share is no row's own: nothing can be repeated
        return Linear.from_codes(fitted(N), dtype=torch.bfloat16)
    times = N // len(part.values_NK)
    params = stacked([part] * times)
    if params is None or times * len(part.values_NK) != N:
        raise BadInput(f"{N} rows cannot be made of {len(part.values_NK)} that repeat; give a shape of whole multiples")
    codes = Codes.of(part.values_NK.repeat(times, 1), params, part.grid)
    return Linear.from_codes(codes, dtype=torch.bfloat16)


def bytes_read(linear: Linear) -> int:
    """Of a weight on a CPU: without what is kept to bring it back into its format."""
    held = linear.operands()
    names = getattr(sys.modules[linear._kernel.__module__], "TENSORS", held)
    return sum(tensor.nbytes for name, tensor in held.items() if name in names)


def integers_of(size: int, N: int, K: int) -> tuple[str, dict[str, Any]]:
    """Name and stage of the integers [N, K] that read as many bytes as `size`, or where there are none, most nearly."""
    found: dict[str, dict[str, Any]] = {}
    off: dict[str, float] = {}
    for group, bits, zeros in itertools.product(GROUPS, range(2, 9), (False, True)):
        name = f"int{bits} {'zero point' if zeros else 'symmetric'} {f'g{group}' if group else 'per channel'}"
        factors = N * (-(-K // group) if group else 1)
        found[name] = {"bits": bits, "group_size": group, "symmetric": not zeros}
        off[name] = abs((N * K * bits // 8 + factors * (3 if zeros else 2)) / size - 1)
    name = next((name for name, by in off.items() if by < EQUAL), min(off, key=off.__getitem__))
    return name, found[name]


def copies(linear: Linear, device: str) -> list[Linear]:
    """The same weight often enough that the cache does not hold it until it is read again."""
    number = max(2, min(40, -(-COPY_BYTES[device] // linear.packed_bytes)))
    return [linear, *(copy.deepcopy(linear) for _ in range(number - 1))]


def calls_of(linear: Linear, M: int, device: str) -> list[Callable[[], object]]:
    """One call for each copy of the weight."""
    x_MK = torch.randn(M, linear.in_features, device=device).bfloat16()
    return [lambda held=held: held(x_MK) for held in copies(linear, device)]  # type: ignore[misc]


def in_turns(running: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every contender in every round but the first; in a round each runs once, in an order that changes."""
    taken: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds + 1):
        order = list(running)
        random.Random(number).shuffle(order)  # who comes first, and what another leaves in the caches, is nobody's own
        for name in order:
            calls = running[name]
            start = time.perf_counter()
            calls[number % len(calls)]()
            if number:
                taken[name].append((time.perf_counter() - start) * 1e6)
    return taken


def graphs(running: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """The same from CUDA graphs, a few times in turn; without a graph for what asks the host in the middle (NO_GRAPH)."""
    from aerogel.kernels.cuda.timing import graph_microseconds

    taken: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, calls in running.items():
            taken[name].append(launched(calls) if name in NO_GRAPH else graph_microseconds(calls))
    return taken


def launched(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call, host and device together."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / len(calls)


class Packed:
    """Weights by name, packed when they are first asked for, while a batch needs them."""

    def __init__(self, shape: tuple[int, int], device: str) -> None:
        self.shape, self.device = shape, device
        self.held: dict[str, Linear] = {}

    def add(self, name: str, stage: dict[str, Any]) -> Linear:
        """A weight that has run once. Raises whatever its packing or its kernel does."""
        if name not in self.held:
            linear = packed(codes_only(stage), *self.shape, self.device)
            linear(torch.randn(1, self.shape[1], device=self.device).bfloat16())
            if linear.kernel_name in ("torch-chunked", "reference"):
                NO_GRAPH.add(name)
            self.held[name] = linear
        return self.held[name]


def timed(linears: dict[str, Linear], given: argparse.Namespace) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Each number of tokens, and what every weight took of them in every round."""
    for M in given.tokens:
        calls = {name: calls_of(linear, M, given.device) for name, linear in linears.items()}
        rounds = max(min(FEWEST_ROUNDS, given.rounds), round(given.rounds / math.sqrt(M)))
        with library.own_pool():  # as whole models run; torch's threads hold each other up where the machine is busy elsewhere
            taken = in_turns(calls, rounds) if given.device == "cpu" else graphs(calls, 3)
        yield str(M), taken


def ratio(taken: dict[str, list[float]], name: str, other: str) -> float:
    """The median over rounds."""
    return round(statistics.median(a / b for a, b in zip(taken[name], taken[other], strict=True)), 3)


def measure_batch(
    formats: dict[str, dict[str, Any]], given: argparse.Namespace, failed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """The rows of some formats, which take turns with the integers that they are compared with."""
    N, K = map(int, given.shape.split("x"))
    weights = Packed((N, K), given.device)
    weights.add(BASE, formats.get(BASE, {"bits": 4, "group_size": 64}))
    rows: dict[str, dict[str, Any]] = {}
    for name, stage in formats.items():
        try:
            linear = weights.add(name, stage)
        except Exception:
            failed[name] = traceback.format_exc()
            sys.stdout.write(f"{name:44s} FAILED\n{failed[name]}\n")
            continue
        row = rows[name] = {"kernel": linear.kernel_name, "packed_bytes": linear.packed_bytes, "us": {}, "over": {}}
        if given.device == "cpu":
            integers, equal = integers_of(bytes_read(linear), N, K)
            weights.add(integers, equal)
            bytes_over = round(bytes_read(linear) / bytes_read(weights.held[integers]), 3)
            row |= {"bytes_read": bytes_read(linear), "integers": integers, "bytes_over": bytes_over, "over_integers": {}}
    for M, taken in timed(weights.held, given):
        for name, row in rows.items():
            row["us"][M] = round(statistics.median(taken[name]), 2)
            row["over"][M] = ratio(taken, name, BASE)
            if "integers" in row:
                row["over_integers"][M] = ratio(taken, name, row["integers"])
    return rows


@torch.inference_mode()
def measure(formats: dict[str, dict[str, Any]], given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Rows by name: {kernel, bytes, us: {M: time}, over: {M: time over the base's}}; and why a format has none."""
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    names = list(formats)
    stop = math.inf if given.seconds is None else time.monotonic() + given.seconds
    for first in range(0, len(names), given.batch):
        if time.monotonic() > stop:
            sys.stdout.write(f"{len(names) - first} formats are left: run the same command again\n")
            break
        found = measure_batch({name: formats[name] for name in names[first : first + given.batch]}, given, failed)
        rows |= found
        for name, row in found.items():
            over = row.get("over_integers", row["over"])
            sys.stdout.write(f"{name:44s} {row['kernel']:18s} {row['packed_bytes']:10d} {row['us']} {row['over']}")
            sys.stdout.write(f" over {row['integers']} (bytes {row['bytes_over']}) {over}\n" if "integers" in row else "\n")
            sys.stdout.flush()
    return rows, failed


def main() -> int:
    """Measure, and put the result beside the other device's."""
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from formats_cases import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", default="4096x4096", help="N x K")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=101, help="on a CPU, of one token; of M a root of M fewer")
    parser.add_argument("--batch", type=int, default=8, help="formats that take turns")
    parser.add_argument("--seconds", type=float, help="until when a batch may begin; formats in the file are not repeated then")
    parser.add_argument("--only", nargs="*", default=[""], help="formats whose name contains one of these words")
    given = parser.parse_args()
    # Formats that share a packed form are timed once each all the same: a difference between them is the noise.
    wanted = {name: stage for name, stage in FORMATS.items() if name == BASE or any(word in name for word in given.only)}
    held = json.loads(given.out.read_text("utf-8")) if given.out and given.out.exists() else {}
    about = {
        "command": " ".join(["benchmarks/formats_speed.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "shape": given.shape,
    }
    before = held.get(given.device, {})
    kept = before["rows"] if given.seconds is not None and about.items() <= before.items() else {}
    rows, failed = measure({name: stage for name, stage in wanted.items() if name not in kept}, given)
    if given.out:
        held[given.device] = {**about, "rows": kept | rows, "failed": failed}
        given.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
