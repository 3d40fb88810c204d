"""Number formats on one model with one solver: KL to dense, bits per weight and size, every format on the same token ids.

    python benchmarks/formats.py MODEL --ids IDS.safetensors --out benchmarks/results/formats.json [--device cuda]
        [--jobs 8] [--only WORD ...] [--shares 0.25 0.5 1] [--seconds 240] [--samples 128] [--windows 40]

IDS.safetensors holds `calibration` [rows, length] and `evaluation` [windows, length] token ids. Each format is quantized by
GPTQ with this package's defaults and half the shift towards the dense model's outputs (`gptaq`, as recipe w4 has it; a
quarter of it, or none, where the name says `a quarter` or `plain`), or rounded to nearest (`rtn`), on 128 x 512 calibration
tokens, scales as float16 unless the format says.
Then KL(dense || compressed) in float32 on the evaluation ids, per token with the standard error over windows.

A solve is bound by the launches of small operations, not by the device, so `--jobs` processes share the device and each
takes the next format. Rows are written as they come; a format that fails is written under `failed` with its reason and the
others go on (the exit code is 1 then). With --seconds no format is begun once the time is up, and rows already in the
file are not repeated. With --shares each format is solved once for every share of the shift instead.

MODEL may be a GGUF. The dense weights of SmolLM2's are on a 4-bit grid in groups of 32 with a minimum each, so integers
with a zero point at a group size of 32 would find nothing to round; all formats here have other groups or say so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aerogel.eval.body import Split
from aerogel.eval.machine import machine, versions
from aerogel.eval.quality import record, score
from aerogel.eval.significance import mean_and_error
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.model.source import resolve
from aerogel.pack.export import export_dense


class Dense:
    """The dense model's head and its hidden states on the evaluation ids, computed once."""

    def __init__(self, model: Path, ids_WT: torch.Tensor, device: str) -> None:
        self.ids_WT = ids_WT
        self.split = Split(load(model, dtype=torch.float32, device=device))
        self.store = record(self.split, ids_WT, batch=4)

    def compare(self, other: Path, device: str) -> dict[str, float]:
        """KL per token of a compressed model with its standard error, and its perplexity."""
        scores = score(
            Split(load(other, dtype=torch.float32, device=device)), self.ids_WT, dense=(self.split, self.store), batch=4
        )
        kl, error = mean_and_error(scores.kl_W)
        loss, dense_loss = (float(torch.tensor(x).double().mean()) for x in (scores.loss_W, scores.dense_loss_W))
        return {"kl": kl, "kl_error": error, "loss": loss, "dense_loss": dense_loss}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all formats share.

    model: folder of the dense checkpoint. ids: the token ids. samples, windows: how many rows of them are used.
    threads: of each process. end: no format is begun after this time.time().
    """

    model: Path
    ids: Path
    device: str
    samples: int
    windows: int
    threads: int
    end: float


def measure(task: Task, stage: dict[str, Any], dense: Dense) -> dict[str, Any]:
    """One format: compressed, stored, decoded from what was stored, compared."""
    shift = {"gptaq": True, "gptaq_experts": "plain"} if stage.get("method", "gptq") == "gptq" else {}
    quantize = {"method": "gptq", **shift, **stage}
    recipe = {
        "aerogel": 1,
        "calibration": {"source": f"{task.ids}:calibration", "samples": task.samples, "sequence_length": 512},
        "pack": {"dtype": "float16"},
        "stages": [{"quantize": quantize}],
    }
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        report = compress(task.model, recipe, folder / "out", device=task.device)
        seconds = time.perf_counter() - start
        export_dense(folder / "out", folder / "dense")
        quality = dense.compare(folder / "dense", task.device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = report["size"]
    return {"bits_per_weight": size["bits_per_weight"], "bytes": size["bytes"], "seconds": round(seconds, 1), **quality}


def work(task: Task, wanted: Any, done: Any) -> None:
    """One process: formats from `wanted` until none is left or the time is up; (name, row or None, reason) to `done`."""
    torch.set_num_threads(task.threads)
    dense = Dense(task.model, load_file(task.ids)["evaluation"][: task.windows].long(), task.device)
    while time.time() < task.end:
        try:
            name, stage = wanted.get_nowait()
        except queue.Empty:
            break
        try:
            row = measure(task, stage, dense)
            done.put((name, {"stage": stage, "device": task.device, "samples": task.samples, **row}, None))
        except Exception:
            done.put((name, None, traceback.format_exc()))


def collect(processes: list[Any], done: Any) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
    """What the processes report until all of them have ended."""
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            yield done.get(timeout=1)
        except queue.Empty:
            if not running:
                return


def shared(formats: dict[str, dict[str, Any]], shares: list[float]) -> dict[str, dict[str, Any]]:
    """The formats that GPTQ solves, once for every share of the shift."""
    return {
        f"{re.sub(', (plain|a quarter)$', '', name)}, share {share:g}": {
            **stage,
            **({"gptaq": True, "gptaq_alpha": share} if share else {"gptaq": False, "gptaq_experts": "error"}),
        }
        for name, stage in formats.items()
        if stage.get("method", "gptq") == "gptq"
        for share in shares
    }


def show(name: str, row: dict[str, Any] | None, reason: str | None) -> None:
    """One line for a format, or the whole reason why it has none."""
    if row is None:
        sys.stdout.write(f"{name:28s} FAILED\n{reason}\n")
    else:
        error = "" if row["kl_error"] is None else f" +- {row['kl_error']:.4f}"
        sys.stdout.write(f"{name:28s} {row['bits_per_weight']:.3f} bits  KL {row['kl']:.4f}{error}")
        sys.stdout.write(f"  {row['bytes'] / 1e6:.1f} MB  {row['seconds']} s\n")
    sys.stdout.flush()


def main() -> int:
    """Measure what is not in the file yet."""
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from formats_cases import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--only", nargs="*", default=[""], help="formats whose name contains one of these words")
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="shares of the shift, from 0 to 1; 0 is none")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    end = time.time() + given.seconds
    held: dict[str, Any] = {"machine": machine(), "versions": versions(), "rows": {}}
    if given.out.exists():
        held = json.loads(given.out.read_text())
    command = f"--device {given.device} --jobs {given.jobs} --samples {given.samples} --windows {given.windows}"
    if given.shares:
        command += f" --shares {' '.join(map(str, given.shares))}"
    held |= {"command": f"python benchmarks/formats.py MODEL --ids IDS --out OUT {command}", "failed": {}}
    context = multiprocessing.get_context("spawn")
    wanted, done = context.Queue(), context.Queue()
    formats = shared(FORMATS, given.shares) if given.shares else FORMATS
    pending = [n for n in formats if n not in held["rows"] and any(word in n for word in given.only)]
    for name in pending:
        wanted.put((name, formats[name]))
    jobs = min(given.jobs, len(pending))
    task = Task(
        model=resolve(given.model),
        ids=given.ids.resolve(),
        device=given.device,
        samples=given.samples,
        windows=given.windows,
        threads=max(1, torch.get_num_threads() // max(1, jobs)),
        end=end,
    )
    processes = [context.Process(target=work, args=(task, wanted, done)) for _ in range(jobs)]
    for process in processes:
        process.start()
    for name, row, reason in collect(processes, done):
        held["rows" if row is not None else "failed"][name] = row if row is not None else reason
        given.out.write_text(json.dumps(held, indent=1) + "\n")
        show(name, row, reason)
    missing = [name for name in pending if name not in held["rows"]]
    wanted.cancel_join_thread()
    sys.stdout.write(f"no row for {len(missing)} formats: {', '.join(missing)}\n" if missing else "")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
