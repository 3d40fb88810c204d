"""`aerogel compress`: a dense checkpoint and a recipe become a compressed checkpoint and a report of what was done.

The run is resumable: each finished block is on the disk before the next one begins, and the same command continues at the
first block that is not. The output folder appears whole, by one rename. What lies in it depends on the model, the recipe
and the versions alone; times and memory are in the report that is returned, not in the files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aerogel.errors import BadInput
from aerogel.eval.machine import machine, versions
from aerogel.eval.memory import peak_bytes
from aerogel.kernels import layouts
from aerogel.model.assembly import REPORT_NAME, Assembly, part_names
from aerogel.model.calibration import Tokens, load_tokens
from aerogel.model.gradients import Gradients, gradients_wanted, measure
from aerogel.model.granularity import adaptive_sizes, sized
from aerogel.model.journal import Journal, fingerprint, restore, weights_digest, work_folder
from aerogel.model.plan import plan_structure, stored_dtype
from aerogel.model.progress import Progress, silent
from aerogel.model.runner import Activations, Runner
from aerogel.model.servers import surprises
from aerogel.model.source import resolve
from aerogel.model.storage import Job
from aerogel.model.structure import Structure, discover
from aerogel.model.walk import Part, Walk
from aerogel.recipes.assign import assign
from aerogel.recipes.schema import Recipe
from aerogel.recipes.stages import StageSpec

logger = logging.getLogger(__name__)


def compress(
    model: str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
    command: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compresses `model` as `recipe` says and writes the checkpoint to `out`.

    Args:
        model: a local folder, a GGUF file or a hub id.
        recipe: a shipped recipe's name, a YAML file, a mapping, or a `Recipe`.
        out: folder to write; must not exist, unless an interrupted or finished run of the same command made it.
        device: where the mathematics runs, such as `cpu` or `cuda:0`.
        overwrite: replace an existing `out`; the old one is deleted only when the new one is whole.
        progress: called after every block.
        command: the command line, for the report.

    Returns:
        The report (see docs/report.md). The part of it that does not change from run to run is in `out` too.

    Raises:
        BadInput: something to fix in the model, the recipe, the data or the paths; nothing was written.
        RunFailed: disk, memory or numerics; finished blocks are kept, the same command goes on.
    """
    start, started = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    chosen = Recipe.load(recipe).with_layout(layouts.for_this_machine)
    folder = resolve(model, trust_remote_code=trust_remote_code)
    out = Path(os.path.abspath(out))
    _check_places(folder, out)
    structure = discover(folder, trust_remote_code=trust_remote_code)
    run = _Run(structure, chosen, torch.device(device))
    tokens = run.tokens() if chosen.needs_data else None
    key = run.key(tokens)
    restore(out)
    report, seconds = _finished(out, key), dict[str, float]()
    if report is None:
        report, seconds = _made(run, tokens, out, key, str(model), overwrite, progress)
    else:
        shutil.rmtree(work_folder(out), ignore_errors=True)
    for row in report["blocks"]:
        row["seconds"] = seconds.get(row["name"], 0.0)
    return {
        **report,
        "command": command,
        "machine": machine(),
        "started": started,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_bytes(),
    }


def _made(
    run: _Run, tokens: Tokens | None, out: Path, key: str, model: str, overwrite: bool, progress: Progress
) -> tuple[dict[str, Any], dict[str, float]]:
    """Does the work and publishes `out`; the report, and the seconds of each block that this call finished, by name."""
    if out.exists() and not overwrite:
        raise BadInput(f"the output {out} already exists; choose another folder, or pass --overwrite to replace it")
    with Journal.open(out, key) as journal:
        seconds = run.work(journal, tokens, progress)
        report = run.assembly().finish(journal, run.calibration_facts(tokens), key, model)
        journal.publish(overwrite=overwrite)
        journal.close()
    return report, seconds


def _check_places(folder: Path, out: Path) -> None:
    if out == folder.resolve() or folder.resolve() in out.parents:
        raise BadInput(f"the output {out} lies in the model's own folder; choose a folder outside {folder}")
    if out.exists() and not out.is_dir():
        raise BadInput(f"the output {out} is a file; give the name of a folder")
    parent = next(p for p in out.parents if p.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise BadInput(f"the output {out} cannot be made: no permission to write in {parent}; choose another folder")


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """The report of an output that this very command has already written."""
    file = out / REPORT_NAME
    if not file.is_file():
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(file.read_text("utf-8"))
        if isinstance(found, dict) and found.get("fingerprint") == key:
            return found
    return None


class _Run:
    """One compression: what was decided before it starts, and the walk that finishes its parts one by one."""

    def __init__(self, structure: Structure, recipe: Recipe, device: torch.device) -> None:
        self.structure, self.recipe, self.device = structure, recipe, device
        stored = stored_dtype(structure, recipe)
        specs = [spec.at(str(stored).removeprefix("torch.")) for spec in recipe.stages]
        assigned = assign(specs, structure.modules)
        sizes = adaptive_sizes(structure, assigned, stored)
        self.assigned: dict[str, list[StageSpec]] = sized(assigned, sizes)
        # The plan raises whatever would go wrong later: formats that cannot store a grid, patterns, shapes.
        self.plan = plan_structure(structure, recipe, sizes)
        for line in surprises(self.plan["loads"]):
            logger.warning("%s", line)
        self.kept_dtype = None if recipe.pack.dtype == "source" else stored
        self.compute = _compute_dtype(recipe.calibration.compute, stored, device)

    def tokens(self) -> Tokens:
        """The calibration rows."""
        from transformers import AutoTokenizer

        section = self.recipe.calibration

        def tokenizer() -> Any:
            try:
                return AutoTokenizer.from_pretrained(self.structure.folder)
            except (OSError, ValueError, KeyError) as error:
                raise BadInput(
                    f"{self.structure.folder} has no tokenizer that loads; calibration needs one (or a recipe without data,"
                    " such as w4-fast)"
                ) from error

        return load_tokens(
            section.source,
            tokenizer,
            rows=section.samples,
            length=section.sequence_length,
            seed=section.seed,
            column=section.column,
            bos=section.bos,
            chat_template=section.chat_template,
        )

    def assembly(self) -> Assembly:
        """What makes the final folder once every part is finished."""
        return Assembly(
            structure=self.structure,
            recipe=self.recipe,
            stages=self.assigned,
            planned=self.plan["tensors"],
            loads=self.plan["loads"],
            kept_dtype=self.kept_dtype,
        )

    def key(self, tokens: Tokens | None) -> str:
        """The fingerprint of everything that decides the bytes of the result."""
        described = self.recipe.as_dict()
        return fingerprint(
            {
                "weights": weights_digest(self.structure.reader),
                "config": (self.structure.folder / "config.json").read_text("utf-8"),
                "recipe": {part: described[part] for part in ("calibration", "stages", "pack")},
                "tokens": tokens.sha256 if tokens else None,
                "versions": versions(),
                "compute": str(self.compute),
                "device": self.device.type,
                "threads": torch.get_num_threads(),
            }
        )

    def work(self, journal: Journal, tokens: Tokens | None, progress: Progress) -> dict[str, float]:
        """Finishes every part that the journal does not have yet; returns seconds by block name."""
        names = part_names(self.structure)
        total = len(names)
        seconds: dict[str, float] = {}
        done = sum(journal.row(name) is not None for name in names)
        progress("blocks", done, total, {"resumed": done} if done else {})
        if done == total:
            return seconds
        with self._walk(journal, tokens) as walk:
            for part in walk.parts(lambda name: load_file(journal.tensors_file(name)) if journal.row(name) else None):
                journal.finish(part.name, part.tensors, part.row)
                seconds[str(part.row["name"])] = part.seconds
                done += 1
                progress("blocks", done, total, _facts(part))
        return seconds

    @contextlib.contextmanager
    def _walk(self, journal: Journal, tokens: Tokens | None) -> Iterator[Walk]:
        section = self.recipe.calibration
        job = Job(
            stages=self.assigned,
            format=self.recipe.pack.format,
            dtype=self.kept_dtype,
            experts_top_up=section.experts == "top_up",
            min_expert_tokens=section.min_expert_tokens,
            gradients=self._gradients(journal, tokens),
        )
        if tokens is None:
            yield Walk(self.structure, None, job, None, 0, device=self.device)
            return
        # Kept tensors run in the precision that they are stored in, so that what is measured is what is written.
        reader = self.structure.reader
        runner = Runner(
            self.structure, lambda name: job.kept(reader.read(name, finite=True)).to(self.device), self.compute, self.device
        )
        batches = list(torch.split(tokens.ids, section.batch))
        spill = journal.work if section.activations == "disk" else None
        with contextlib.ExitStack() as stack:
            activations = Activations(spill)
            stack.callback(activations.close)
            runner.prologue(batches, activations)
            dense = None
            if any("cross_moment" in spec.needs for specs in self.assigned.values() for spec in specs):
                dense = Activations(spill)
                stack.callback(dense.close)
                for batch in range(len(batches)):
                    dense[batch] = activations[batch].clone()
            yield Walk(self.structure, runner, job, activations, len(batches), dense, self.device)

    def _gradients(self, journal: Journal, tokens: Tokens | None) -> Gradients | None:
        """What the loss feels of the weights, where a stage asks for it."""
        if tokens is None or not gradients_wanted(self.assigned):
            return None
        section = self.recipe.calibration
        return measure(
            self.structure,
            self.assigned,
            tokens.ids[: section.gradient_samples],
            self.device,
            journal.work / "gradients",
            seed=section.seed,
            spill=journal.work if section.activations == "disk" else None,
        )

    def calibration_facts(self, tokens: Tokens | None) -> dict[str, Any] | None:
        """What the report says of the data, and of the machine where that decides the result."""
        if tokens is None:
            return None
        return {
            **tokens.facts(),
            "compute": str(self.compute).removeprefix("torch."),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }


def _facts(part: Part) -> dict[str, object]:
    losses = [row["loss"] for row in part.row["layers"] if row["loss"] is not None]
    facts: dict[str, object] = {"seconds": part.seconds, "memory_bytes": peak_bytes()}
    if "relative_error" in part.row:
        facts["relative_error"] = part.row["relative_error"]
    if losses:
        facts["loss"] = sum(losses) / len(losses)
    return facts


def _compute_dtype(wanted: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that blocks run in. `auto`: the checkpoint's half type, or bfloat16 on a CPU that multiplies it natively."""
    if wanted in ("float32", "bfloat16"):
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    if wanted == "source" or device.type != "cpu":
        return stored
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
