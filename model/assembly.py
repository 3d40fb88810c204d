"""The last step of a compression: the finished parts become a folder that loads, with its config and its report.

What lies in the folder depends on the model, the recipe and the versions alone, so equal runs give equal folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from aerogel.eval.machine import versions
from aerogel.kernels import layouts
from aerogel.model.account import count_bytes, tensor_table
from aerogel.model.entropy import Saving
from aerogel.model.journal import Journal
from aerogel.model.plan import stored_dtype
from aerogel.model.reader import read_header
from aerogel.model.relayout import PORTABLE_INDEX, to_native
from aerogel.model.servers import obstacles, only_aerogel
from aerogel.model.structure import Structure
from aerogel.model.writer import assemble, disk_errors, index_of, shard, write_json
from aerogel.pack.config import quantization_config
from aerogel.pack.export import SHARD_BYTES, export_coded
from aerogel.recipes.schema import Recipe
from aerogel.recipes.stages import StageSpec

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


def part_names(structure: Structure) -> list[str]:
    """The parts of a run as the journal knows them: the blocks in order, then what lies outside."""
    return [*(f"block-{i:05d}" for i in range(len(structure.block_names))), "outer"]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What the final folder is made from, beside the parts on disk.

    structure, recipe: the model and what was asked of it.
    stages: resolved stages by matrix name.
    planned: the plan's row for each tensor of the source. loads: who loads the result, as the plan says it.
    kept_dtype: what tensors that are not compressed were cast to; None where they stayed.
    """

    structure: Structure
    recipe: Recipe
    stages: Mapping[str, list[StageSpec]]
    planned: list[dict[str, Any]]
    loads: dict[str, Any]
    kept_dtype: torch.dtype | None

    def finish(self, journal: Journal, calibration: Mapping[str, Any] | None, key: str, model: str) -> dict[str, Any]:
        """Makes the final folder from the finished parts; returns the part of the report that is stored in it."""
        *blocks, outer = part_names(self.structure)
        rows = [journal.row(name) or {} for name in [*blocks, outer]]
        final = journal.final
        with disk_errors(final):
            if final.exists():
                shutil.rmtree(final)
            final.mkdir()
            self._copy_files(final)
        self._write_config(final, rows)
        self._write_tensors(final, [journal.tensors_file(name) for name in [outer, *blocks]])
        if self.recipe.pack.layout != layouts.PORTABLE:
            count_bytes(final, self.structure, rows)
        savings = self._entropy_code(journal) if self.recipe.pack.entropy else []
        saved = {saving.name: saving.before - saving.after for saving in savings}
        described = self.recipe.as_dict()
        report = {
            "aerogel": versions()["aerogel"],
            "fingerprint": key,
            "model": Path(model).name if Path(model).exists() else model,
            "recipe": described,
            "versions": versions(),
            "calibration": calibration,
            "loads": self.loads,
            "blocks": rows,
            "experts": [{"block": row["index"], **facts} for row in rows for facts in row.get("experts", [])],
            "entropy": [saving.as_row() for saving in savings],
            **tensor_table(final, self.structure, self.planned, rows, saved),
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
                for spec in self.stages[m.name]
                if spec.kind == "quantize"
            ]
            ignore = [m.name for m in self.structure.matrices if m.name not in coded and m.kind in ("Linear", "Conv1D")]
            ignore += self.structure.routers
            alone = only_aerogel(obstacles(self.structure, self.stages, self.recipe))
            config["quantization_config"] = quantization_config(
                grids,
                ignore,
                heads=[m.name for m in matrices if m.block is None and m.kind == "Linear"],
                wanted=self.recipe.pack.format,
                method="aerogel" if alone else "compressed-tensors",
            )
        write_json(final / "config.json", config)
