"""Number formats on one model with one solver: KL to dense, bits per weight and size, every format on the same token ids.

    python benchmarks/formats.py MODEL --ids IDS.safetensors --out benchmarks/results/formats.json [--device cuda]
        [--jobs 8] [--only WORD ...] [--seconds 240] [--samples 128] [--windows 40]

IDS.safetensors holds `calibration` [rows, length] and `evaluation` [windows, length] token ids. Each format is quantized by
GPTQ with this package's defaults and its error feedback from layer to layer (`gptaq`, as recipe w4 has it; not where the
name says `plain`), or rounded to nearest (`rtn`), on 128 x 512 calibration tokens, scales as float16 unless the format says.
Then KL(dense || compressed) in float32 on the evaluation ids, per token with the standard error over windows.

A solve is bound by the launches of small operations, not by the device, so `--jobs` processes share the device and each
takes the next format. Rows are written as they come; a format that fails is written under `failed` with its reason and the
others go on (the exit code is 1 then). With --seconds no format is begun once the time is up, and rows already in the
file are not repeated.

MODEL may be a GGUF. The dense weights of SmolLM2's are on a 4-bit grid in groups of 32 with a minimum each, so integers
with a zero point at a group size of 32 would find nothing to round; all formats here have other groups or say so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
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

INT4 = {"bits": 4, "group_size": 64}
INT3 = {"bits": 3, "group_size": 72, "symmetric": False}
PLAIN = {"gptaq": False, "gptaq_experts": "error"}
OUTLIERS = {"outliers": "sensitivity", "outlier_share": 0.005}
SPARSE = {"format": "kmeans", "clip": "fisher", "outliers": "sensitivity", "outlier_share": 0.0045}
FORMATS: dict[str, dict[str, Any]] = {
    "int4 symmetric g64": INT4,
    "nf4 g64": {"format": "nf4", "group_size": 64},
    "int3 zero point g72": INT3,
    "bitmod3 g72": {"format": "bitmod", "bits": 3, "group_size": 72},
    "int4 symmetric g64, 9.9 % rows at 8": {**INT4, "rows": "loss", "row_share": 0.099, "row_bits": 8},
    "int4 symmetric g64, 18.8 % rows at 6": {**INT4, "rows": "loss", "row_share": 0.188, "row_bits": 6},
    "int4 symmetric g64, 2 % rows at 8": {**INT4, "rows": "loss", "row_share": 0.02, "row_bits": 8},
    "int4 symmetric g64, 5 % rows at 6": {**INT4, "rows": "loss", "row_share": 0.05, "row_bits": 6},
    "bitmod3 e4m3 scales g40": {"format": "bitmod", "bits": 3, "group_size": 40, "scale_dtype": "e4m3"},
    "kmeans4 per row": {"format": "kmeans", "bits": 4},
    "kmeans4 per row, fisher": {"format": "kmeans", "bits": 4, "clip": "fisher"},
    "bitmod4 g72": {"format": "bitmod", "bits": 4, "group_size": 72},
    "int4 zero point g72": {"bits": 4, "group_size": 72, "symmetric": False},
    "fp4 e2m1 g64": {"format": "float", "kind": "e2m1", "group_size": 64},
    "nf4 e4m3 scales g32": {"format": "nf4", "group_size": 32, "scale_dtype": "e4m3"},
    "bitmod4 e4m3 scales g40": {"format": "bitmod", "bits": 4, "group_size": 40, "scale_dtype": "e4m3"},
    "int3 symmetric g64": {"bits": 3, "group_size": 64},
    "nf4 g64, 9.9 % rows at 8": {"format": "nf4", "group_size": 64, "rows": "loss", "row_share": 0.099, "row_bits": 8},
    "int3 zero point g72, 10 % rows at 6": {**INT3, "rows": "loss", "row_share": 0.1, "row_bits": 6},
    "int4 symmetric g32": {"bits": 4, "group_size": 32},
    "mxfp4 g32": {"format": "mx"},
    "nvfp4 g16": {"format": "nvfp4"},
    "nvfp4 ue5m3 g16": {"format": "nvfp4", "scale_dtype": "ue5m3"},
    "nvfp4 g32": {"format": "nvfp4", "group_size": 32},
    "fp3 e1m1 g64": {"format": "float", "kind": "e1m1", "group_size": 64},
    "fp3 e2m0 g64": {"format": "float", "kind": "e2m0", "group_size": 64},
    "kmeans3 per row": {"format": "kmeans", "bits": 3},
    "kmeans3 per row, fisher": {"format": "kmeans", "bits": 3, "clip": "fisher"},
    "kmeans4 per row, fisher, rtn": {"method": "rtn", "format": "kmeans", "bits": 4, "clip": "fisher"},
    "kmeans4 per row, rtn": {"method": "rtn", "format": "kmeans", "bits": 4},
    "nf4 g64, rtn": {"method": "rtn", "format": "nf4", "group_size": 64},
    "int4 symmetric g64, rtn": {"method": "rtn", **INT4},
    "int4 symmetric g64, rtn, 9.9 % rows at 8": {"method": "rtn", **INT4, "rows": "loss", "row_share": 0.099, "row_bits": 8},
    "fp5 e2m2 g64": {"format": "float", "kind": "e2m2", "group_size": 64},
    "fp6 e2m3 per channel": {"format": "float", "kind": "e2m3"},
    "mxfp8 g32": {"format": "mx", "kind": "e4m3"},
    "fp8 e4m3 per channel, rtn": {"method": "rtn", "format": "fp8"},
    "fp8 e4m3 128x128, rtn": {"method": "rtn", "format": "fp8", "strategy": "block"},
    "fp8 e5m2 per channel, rtn": {"method": "rtn", "format": "float", "kind": "e5m2"},
    "rf8 per channel, rtn": {"method": "rtn", "format": "rf8"},
    "int4 symmetric adaptive, rtn": {"method": "rtn", **INT4, "granularity": "adaptive"},
    "int4 symmetric g128, 0.5 % outliers, plain": {"bits": 4, "group_size": 128, **PLAIN, **OUTLIERS},
    "int4 symmetric g128, plain": {"bits": 4, "group_size": 128, **PLAIN},
    "ternary g64, plain": {"format": "ternary", "group_size": 64, "refit": 4, **PLAIN},
    "bcq3 g128": {"method": "bcq", "bits": 3, "group_size": 128, "offset": "scale"},
    "bipolar4 per channel, plain": {"format": "bipolar", "bits": 4, "group_size": None, **PLAIN},
    "fp6 e3m2 per channel": {"format": "float", "kind": "e3m2"},
    "planes1 g64, plain": {"format": "planes", "bits": 1, "group_size": 64, "refit": 4, **PLAIN},
    "bitmod4 e4m3 scales g32": {"format": "bitmod", "bits": 4, "group_size": 32, "scale_dtype": "e4m3"},
    "bitmod3 e4m3 scales g32": {"format": "bitmod", "bits": 3, "group_size": 32, "scale_dtype": "e4m3"},
    "shift3 8x128, plain": {"format": "planes", "bits": 3, "group_size": 8, "block_rows": 128, "power_of_two": True, **PLAIN},
    "nested4 g64": {"method": "nested", "bits": 4, "group_size": 64},
    "planes3 g128": {"format": "planes", "bits": 3, "group_size": 128, "offset": "scale"},
    "shift3 8x128": {"format": "planes", "bits": 3, "group_size": 8, "block_rows": 128, "power_of_two": True},
    "int8 per channel, rtn": {"method": "rtn", "bits": 8},
    "hqq4 floating zero g64": {"method": "hqq", "format": "affine", "bits": 4, "group_size": 64},
    "hqq4 floating zero g128": {"method": "hqq", "format": "affine", "bits": 4, "group_size": 128},
    "affine4 g128": {"format": "affine", "bits": 4, "group_size": 128},
    "affine1 g64, plain": {"format": "affine", "bits": 1, "group_size": 64, "refit": 4, **PLAIN},
    "int4 symmetric g64, rtn, hadamard": {"method": "rtn", **INT4, "transform": "hadamard"},
    "int4 symmetric g64, hadamard": {**INT4, "transform": "hadamard"},
    "mxfp4 g32, hadamard": {"format": "mx", "transform": "hadamard"},
    "complex, rtn": {"method": "rtn", "format": "complex"},
    "int4 per channel, rtn, 1 % outliers": {"method": "rtn", "bits": 4, "outliers": "sigma", "outlier_share": 0.01},
    "kmeans4 per row, fisher, rtn, 0.45 % outliers": {
        "method": "rtn",
        "format": "kmeans",
        "bits": 4,
        "clip": "fisher",
        **SPARSE,
    },
}
"""Name -> keys of the quantize stage. Group sizes put neighbours in the list at the same bits per weight (4.25, 3.25)."""


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--only", nargs="*", default=[""], help="formats whose name contains one of these words")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    end = time.time() + given.seconds
    held: dict[str, Any] = {"machine": machine(), "versions": versions(), "rows": {}}
    if given.out.exists():
        held = json.loads(given.out.read_text())
    command = f"--device {given.device} --jobs {given.jobs} --samples {given.samples} --windows {given.windows}"
    held |= {"command": f"python benchmarks/formats.py MODEL --ids IDS --out OUT {command}", "failed": {}}
    context = multiprocessing.get_context("spawn")
    wanted, done = context.Queue(), context.Queue()
    pending = [n for n in FORMATS if n not in held["rows"] and any(word in n for word in given.only)]
    for name in pending:
        wanted.put((name, FORMATS[name]))
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
