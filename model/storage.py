"""What a solved layer becomes in the file: its tensors, its row in the report, and back again.

A walk runs what it stores. `Storage.settled` decodes the very tensors that go to the file and compares them with what the
solver returned, so that no later layer is calibrated on a weight that nobody will load.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.gradients import Gradients
from aerogel.model.layer import Layer
from aerogel.model.naming import Group
from aerogel.model.sources import Sources
from aerogel.model.structure import Matrix
from aerogel.pack.config import choose_format
from aerogel.pack.format import Format, Grid
from aerogel.quantize.sidecars import with_sidecars
from aerogel.recipes.stages import StageSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a walk needs to know beside the model: stages by matrix name, how to store, and how calibration behaves."""

    stages: Mapping[str, list[StageSpec]]
    format: str
    dtype: torch.dtype | None
    experts_top_up: bool
    min_expert_tokens: int
    gradients: Gradients | None = None

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor that is not compressed, in the type the output is written in."""
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor


@dataclass(frozen=True, slots=True)
class Storage:
    """How the layers of a job are stored."""

    job: Job

    def form(self, matrix: Matrix) -> type[Format]:
        """The format that a matrix with a quantize stage is stored in."""
        spec = self._spec(matrix)
        return choose_format(spec.stage.grid, spec.activations, self.job.format)

    def settled(self, matrix: Matrix, layer: Layer) -> Layer:
        """A solved layer without what only its solver needed; its weight is the one that the file decodes to."""
        tokens = layer.stats.tokens if layer.stats is not None else 0
        if layer.codes is None:
            return layer.with_(weight_NK=self.job.kept(layer.weight_NK).float(), stats=None, tokens=tokens)
        local = layer.tensors(self.form(matrix))
        if not torch.equal(self._decoded(matrix, local, layer.codes.grid), layer.weight_NK):
            raise RunFailed(
                f"{matrix.name}: what would be stored does not decode to what the solver returned; this is a mistake in"
                " aerogel, report it with the recipe"
            )
        return layer.with_(stats=None, fisher_NK=None, tokens=tokens)

    def weight(self, matrix: Matrix, stored: Mapping[str, Tensor]) -> Tensor | None:
        """The weight [N, K] that a finished part's tensors hold for a matrix; None where it was not quantized."""
        start = f"{matrix.name}."
        local = {name.removeprefix(start): t for name, t in stored.items() if name.startswith(start) and name != f"{start}bias"}
        return self._decoded(matrix, local, self._spec(matrix).stage.grid) if "weight_scale" in local else None

    def codes(self, matrix: Matrix, layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a quantized layer under their names in the file, and its row; dtype: the source's."""
        stored = {f"{matrix.name}.{key}": value for key, value in layer.tensors(self.form(matrix)).items()}
        return stored, self._row(matrix, layer, sum(t.nbytes for t in stored.values()), dtype)

    def part(
        self, groups: Iterable[Group], matrices: list[Matrix], layers: Mapping[str, Layer], sources: Sources
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """What goes to the file for these groups, and a report row per matrix.

        Raises:
            BadInput: only some of the experts that share a tensor were quantized.
        """
        tensors: dict[str, Tensor] = {}
        rows = []
        coded: Counter[str] = Counter()
        for m in matrices:
            layer, dtype = layers[m.name], sources.tensors[m.tensor].dtype
            if layer.codes is None:
                sources.put(m, layer.weight_NK)
                row = self._row(m, layer, m.n * m.k * (self.job.dtype or dtype).itemsize, dtype)
            else:
                stored, row = self.codes(m, layer, dtype)
                tensors |= stored
                coded[m.tensor] += 1
            rows.append(row)
        for source in (source for group in groups for source, _ in group.sources):
            value = sources.fetch(source)
            slices = value.shape[0] if value.ndim == 3 else 1
            if 0 < coded[source] < slices:
                raise BadInput(
                    f"{coded[source]} of the {slices} experts in {source} are quantized; target all of them or none, since"
                    " they are stored together"
                )
            if not coded[source]:
                tensors[source] = self.job.kept(value)
        return tensors, rows

    def _spec(self, matrix: Matrix) -> StageSpec:
        spec = next((s for s in self.job.stages[matrix.name] if s.kind == "quantize"), None)
        if spec is None:
            raise RunFailed(f"{matrix.name} has codes but no quantize stage; this is a mistake in aerogel, report it")
        return spec

    def _decoded(self, matrix: Matrix, local: Mapping[str, Tensor], grid: Grid) -> Tensor:
        return with_sidecars(self.form(matrix).decode(local, grid), local, matrix.name)

    def _row(self, matrix: Matrix, layer: Layer, size: int, dtype: torch.dtype) -> dict[str, Any]:
        weights = matrix.n * matrix.k
        zeros = 1 - float(layer.mask_NK.float().mean()) if layer.mask_NK is not None else 0.0
        return {
            "name": matrix.name,
            "method": " -> ".join(spec.method_name for spec in self.job.stages[matrix.name]),
            "bits": layer.codes.grid.bits if layer.codes is not None else None,
            "bits_per_weight": 8 * size / weights,
            "zeros": zeros,
            "loss": layer.loss,
            "tokens": layer.tokens,
            "bytes": size,
            "source_bytes": weights * dtype.itemsize,
            "notes": dict(layer.notes),
        }
