"""`aerogel compress`: a dense checkpoint and a recipe become a compressed checkpoint and a report of what was done.

The run is resumable: each finished block is on the disk before the next one begins, and the same command continues at the
first block that is not. The output folder appears whole, by one rename. What lies in it depends on the model, the recipe
and the versions alone; times and memory are in the report that is returned, not in the files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from aerogel.errors import BadInput
from aerogel.eval.machine import machine, versions
from aerogel.eval.memory import peak_bytes
from aerogel.kernels import layouts
from aerogel.model.calibration import Tokens, load_tokens
from aerogel.model.entropy import Saving
from aerogel.model.gradients import Gradients, gradients_wanted, measure
from aerogel.model.granularity import adaptive_sizes, sized
from aerogel.model.journal import Journal, fingerprint, restore, weights_digest, work_folder
from aerogel.model.plan import plan_structure, stored_dtype
from aerogel.model.progress import Progress, silent
from aerogel.model.reader import CheckpointReader, read_header
from aerogel.model.relayout import PORTABLE_INDEX, to_native
from aerogel.model.runner import Activations, Runner
from aerogel.model.source import resolve
from aerogel.model.structure import Structure, discover
from aerogel.model.walk import Job, Part, Walk
from aerogel.model.writer import assemble, disk_errors, index_of, shard, write_json
from aerogel.pack.config import quantization_config
from aerogel.pack.export import export_coded
from aerogel.recipes.assign import assign
from aerogel.recipes.schema import Recipe
from aerogel.recipes.stages import StageSpec

SHARD_BYTES = 5_000_000_000
REPORT_NAME = "aerogel_report.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NOT_COPIED = {
    "config.json",
    "model.safetensors.index.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "README.md",
    REPORT_NAME,
}


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
    report = _finished(out, key)
    if report is None:
        if out.exists() and not overwrite:
            raise BadInput(f"the output {out} already exists; choose another folder, or pass --overwrite to replace it")
        with Journal.open(out, key) as journal:
            seconds = run.work(journal, tokens, progress)
            report = run.finish(journal, tokens, key, str(model))
            journal.publish(overwrite=overwrite)
            journal.close()
    else:
        seconds = {}
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
    """One compression: what was decided before it starts, and the three things it does (work, finish, describe)."""

    def __init__(self, structure: Structure, recipe: Recipe, device: torch.device) -> None:
        self.structure, self.recipe, self.device = structure, recipe, device
        stored = stored_dtype(structure, recipe)
        specs = [spec.at(str(stored).removeprefix("torch.")) for spec in recipe.stages]
        assigned = assign(specs, structure.modules)
        sizes = adaptive_sizes(structure, assigned, stored)
        self.assigned: dict[str, list[StageSpec]] = sized(assigned, sizes)
        # The plan raises whatever would go wrong later: formats that cannot store a grid, patterns, shapes.
        self.plan = plan_structure(structure, recipe, sizes)
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
        total = len(self.structure.block_names) + 1
        names = [f"block-{i:05d}" for i in range(total - 1)] + ["outer"]
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

    def finish(self, journal: Journal, tokens: Tokens | None, key: str, model: str) -> dict[str, Any]:
        """Makes the final folder from the finished parts; returns the part of the report that is stored in it."""
        names = [f"block-{i:05d}" for i in range(len(self.structure.block_names))]
        rows = [journal.row(name) or {} for name in [*names, "outer"]]
        final = journal.final
        with disk_errors(final):
            if final.exists():
                shutil.rmtree(final)
            final.mkdir()
            self._copy_files(final)
        self._write_config(final, rows)
        self._write_tensors(final, [journal.tensors_file(name) for name in ["outer", *names]])
        self._count_bytes(final, rows)
        savings = self._entropy_code(journal) if self.recipe.pack.entropy else []
        described = self.recipe.as_dict()
        report = {
            "aerogel": versions()["aerogel"],
            "fingerprint": key,
            "model": Path(model).name if Path(model).exists() else model,
            "recipe": described,
            "versions": versions(),
            "calibration": self._calibration_facts(tokens),
            "blocks": rows,
            "experts": [{"block": row["index"], **facts} for row in rows for facts in row.get("experts", [])],
            "entropy": [saving.as_row() for saving in savings],
            **self._tensor_table(final, rows, {saving.name: saving.before - saving.after for saving in savings}),
        }
        with disk_errors(final):
            (final / "recipe.yaml").write_text(yaml.safe_dump(described, sort_keys=False), "utf-8")
        write_json(final / REPORT_NAME, report)
        return report

    def _write_tensors(self, final: Path, parts: list[Path]) -> None:
        """The tensors of all parts as the files of a checkpoint, in the recipe's layout."""
        layout = self.recipe.pack.layout
        if layout == layouts.PORTABLE:
            assemble(parts, final, SHARD_BYTES)
            return
        shards = shard(parts, SHARD_BYTES)
        if len(shards) > 1:
            write_json(final / PORTABLE_INDEX, index_of(shards))
        entries = {entry.name: entry for part in parts for entry in read_header(part).values()}
        config = json.loads((final / "config.json").read_text("utf-8"))
        dtype = stored_dtype(self.structure, self.recipe)
        write_json(final / "config.json", to_native(entries, config, final, layout, dtype, SHARD_BYTES))

    def _count_bytes(self, final: Path, rows: list[dict[str, Any]]) -> None:
        """Bytes of every coded matrix as they are in the files, into its row: a native layout fills up its last tile."""
        if self.recipe.pack.layout == layouts.PORTABLE:
            return
        sizes: Counter[str] = Counter()
        for entry in CheckpointReader(final):
            name, _, local = entry.name.rpartition(".")
            sizes[name] += entry.nbytes if local != "bias" else 0
        weights = {m.name: m.n * m.k for m in self.structure.matrices}
        for row in (row for part in rows for row in part["layers"] if row["bits"] is not None):
            row["bytes"] = sizes[row["name"]]
            row["bits_per_weight"] = 8 * row["bytes"] / weights[row["name"]]

    def _entropy_code(self, journal: Journal) -> list[Saving]:
        """Codes the final folder without loss, in its own place."""
        coded = journal.work / "coded"
        with disk_errors(coded):
            shutil.rmtree(coded, ignore_errors=True)
        savings = export_coded(journal.final, coded)[1]
        with disk_errors(coded):
            shutil.rmtree(journal.final)
            coded.rename(journal.final)
        return savings

    def _calibration_facts(self, tokens: Tokens | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            **tokens.facts(),
            "compute": str(self.compute).removeprefix("torch."),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }

    def _copy_files(self, final: Path) -> None:
        """Tokenizer, chat template, generation config, licence: every file that is not a weight or about one."""
        for file in sorted(self.structure.folder.iterdir()):
            if not file.is_file() or file.name in NOT_COPIED or file.name.startswith("."):
                continue
            if file.suffix.lower() not in WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
                shutil.copyfile(file, final / file.name)

    def _write_config(self, final: Path, rows: list[dict[str, Any]]) -> None:
        config = json.loads((self.structure.folder / "config.json").read_text("utf-8"))
        coded = {row["name"] for part in rows for row in part["layers"] if row["bits"] is not None}
        matrices = [m for m in self.structure.matrices if m.name in coded]
        if any(m.tied for m in matrices):
            config["tie_word_embeddings"] = False
        if self.kept_dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.kept_dtype).removeprefix("torch.")
        if matrices:
            grids = [
                (m.name, spec.stage.grid, spec.activations)
                for m in matrices
                for spec in self.assigned[m.name]
                if spec.kind == "quantize"
            ]
            ignore = [m.name for m in self.structure.matrices if m.name not in coded and m.kind in ("Linear", "Conv1D")]
            # Only aerogel can put back together what no other loader expects: transposed weights, expert stacks, sidecars.
            special = any(m.transposed or m.index is not None or m.kind == "Embedding" for m in matrices)
            special |= any(spec.keeps for m in matrices for spec in self.assigned[m.name])
            config["quantization_config"] = quantization_config(
                grids, ignore, wanted=self.recipe.pack.format, method="aerogel" if special else "compressed-tensors"
            )
        write_json(final / "config.json", config)

    def _tensor_table(self, final: Path, rows: list[dict[str, Any]], saved: Mapping[str, int]) -> dict[str, Any]:
        """Every tensor of the source with its fate and real bytes, and the totals. `saved`: bytes by stored tensor."""
        layers = {row["name"]: row for part in rows for row in part["layers"]}
        by_tensor: dict[str, list[dict[str, Any]]] = {}
        for m in self.structure.matrices:
            if m.name in layers and not m.tied:
                by_tensor.setdefault(m.tensor, []).append(layers[m.name])
        stored = CheckpointReader(final)
        table = []
        for planned in self.plan["tensors"]:
            mine = by_tensor.get(planned["name"], [])
            size = sum(row["bytes"] - _saved(row["name"], saved) for row in mine) if mine else planned["bytes"]
            table.append({**planned, "bytes": size - saved.get(planned["name"], 0) * (not mine)})
        weights = [row for row in table if row["fate"] == "compressed"]
        counted = sum(math.prod(row["shape"]) for row in weights)
        source = self.structure.reader.nbytes
        return {
            "tensors": table,
            "size": {
                "source_bytes": source,
                "bytes": stored.nbytes,
                "compression": source / stored.nbytes,
                "bits_per_weight": 8 * sum(row["bytes"] for row in weights) / counted if counted else None,
                "zeros": _zero_share(layers),
                "files": sorted(path.name for path in final.iterdir()),
            },
        }


def _saved(layer: str, saved: Mapping[str, int]) -> int:
    """Bytes that coding saved on the tensors of a layer."""
    return sum(saved.get(f"{layer}.{local}", 0) for local in ("weight", "weight_packed"))


def _zero_share(layers: Mapping[str, Mapping[str, Any]]) -> float:
    """Zeros among the treated weights, by mask; pruned weights are stored dense for now, so they save no bytes."""
    return sum(row["zeros"] for row in layers.values()) / len(layers) if layers else 0.0


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
