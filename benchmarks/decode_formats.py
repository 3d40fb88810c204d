"""Tokens a second of one whole model in every format, on a CPU, beside what its bytes alone would give.

    python benchmarks/decode_formats.py MODEL --folder DIR --make             a checkpoint in DIR for each format
    python benchmarks/decode_formats.py MODEL --folder DIR --out benchmarks/results/decode_formats.json

Weights of MODEL, a dense checkpoint, are rounded to nearest without a search (codebooks and planes are fitted) and decode in
bfloat16 as `aerogel generate` does it, --batch sequences at a time. All models are loaded; in a round each takes one turn, a
prompt of PROMPT tokens and then --new tokens, in an order that changes. Given are medians over rounds: tokens a second of all
sequences, the time of a step over that of BASE in the same round, which loop ran and which kernels.

`formats_speed.py` times one product; a format whose model is slower beside BASE's than its product is loses it in the loop.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from aerogel.eval.decode import facts
from aerogel.eval.machine import machine, versions
from aerogel.kernels.decode.loop import Decoder
from aerogel.model.compress import compress
from aerogel.model.direct import load_to_decode

BASE = "int4 symmetric g64"
PROMPT = 32
DENSE = "dense"
SLOW = ("complex",)
"""Formats without a fast kernel here, whose turns would take minutes."""


def stage_of(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage that needs no data: to the nearest, what is kept beside by size."""
    method = stage.get("method", "gptq")
    if method in ("bcq", "nested", "shift"):
        return {**stage, "method": "bcq"} if method == "nested" else stage
    plain = {key: value for key, value in stage.items() if not key.startswith(("gptaq", "refit"))}
    if plain.get("outliers") == "sensitivity":
        plain["outliers"] = "sigma"
    return {**plain, "method": "rtn", "clip": "none"}


def make(model: Path, folder: Path, formats: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Checkpoints that are not there yet; why a format has none."""
    failed = {}
    for name, stage in formats.items():
        place = folder / name.replace(" ", "_").replace(",", "")
        if (place / "config.json").exists():
            continue
        start = time.perf_counter()
        try:
            compress(model, {"aerogel": 1, "stages": [{"quantize": stage_of(stage)}]}, place, device="cpu")
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        sys.stdout.write(f"{name:44s} {time.perf_counter() - start:6.1f} s {failed.get(name, '')}\n")
        sys.stdout.flush()
    return failed


def turn(decoder: Decoder, ids_BT: torch.Tensor, new: int) -> float:
    """Seconds of `new` steps behind the first token."""
    steps = decoder.stream(list(ids_BT), new + 1)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def measure(decoders: dict[str, Decoder], batch: int, new: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step in each round; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(rounds + 1):
        order = list(decoders)
        random.Random(number).shuffle(order)
        for name in order:
            size = decoders[name].model.config.vocab_size
            ids_BT = torch.randint(size, (batch, PROMPT), generator=torch.Generator().manual_seed(number))
            seconds = turn(decoders[name], ids_BT, new)
            if number:
                taken[name].append(1e3 * seconds / new)
    return taken


def main() -> int:
    """Make the checkpoints, or time them."""
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from formats_cases import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[""], help="formats whose name contains one of these words")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    # Which rows get more bits is decided with data; one more product in the loop is the same whatever their numbers are.
    able = {name: stage for name, stage in FORMATS.items() if "rows" not in stage}
    wanted = {name: stage for name, stage in able.items() if name == BASE or any(word in name for word in given.only)}
    if given.make:
        return 1 if make(given.model, given.folder, wanted) else 0
    places = {DENSE: given.model, **{name: given.folder / name.replace(" ", "_").replace(",", "") for name in wanted}}
    there = {name: place for name, place in places.items() if (place / "config.json").exists() and not name.startswith(SLOW)}
    decoders: dict[str, Decoder] = {}
    for name, place in there.items():
        start = time.perf_counter()
        decoders[name] = Decoder(load_to_decode(place, dtype=torch.bfloat16))
        sys.stderr.write(f"{name:44s} loaded in {time.perf_counter() - start:.1f} s\n")
    rows: dict[str, Any] = {name: {"ms": {}, "tokens_per_second": {}, "over": {}} for name in decoders}
    for batch in given.batch:
        taken = measure(decoders, batch, given.new, given.rounds)
        for name, row in rows.items():
            row["ms"][batch] = round(statistics.median(taken[name]), 3)
            row["tokens_per_second"][batch] = round(1e3 * batch / row["ms"][batch], 1)
            row["over"][batch] = round(statistics.median(a / b for a, b in zip(taken[name], taken[BASE], strict=True)), 3)
            row["ran"] = facts(decoders[name])
            sys.stdout.write(f"{name:44s} batch {batch:3d} {row['ms'][batch]:8.2f} ms {row['over'][batch]:6.3f} {row['ran']}\n")
        if given.out:  # after each batch: a run that is cut off has measured what it has measured
            command = f"python benchmarks/decode_formats.py MODEL --folder DIR --rounds {given.rounds} --new {given.new}"
            held = {"command": command, "machine": machine(), "versions": versions(), "rows": rows}
            given.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
