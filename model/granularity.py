"""Stages that decide their group size from the weights (`granularity: adaptive`, `worth`), before anything else.

The rules: `quantize/granularity.py`. Each weight is read once, one at a time; from then on every weight has an
ordinary stage with an ordinary group size, so planning, solving, storing and resuming know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from aerogel.model.structure import Matrix, Structure
from aerogel.recipes.stages import StageSpec

Sizes = dict[str, int | None]
"""Name of a matrix -> the group size that was decided for it."""


def adaptive_sizes(structure: Structure, assigned: Mapping[str, list[StageSpec]], dtype: torch.dtype) -> Sizes:
    """The group sizes of all matrices whose stage decides by the weight. Reads those weights. dtype: of `auto` scales.

    Linears of one module with inputs of the same width share the smallest that one of them needs: they are what runtimes
    merge (q, k, v; gate, up), and experts of a layer can only be stored together alike.

    Raises:
        BadInput: a weight with NaN or infinity.
    """
    together: dict[tuple[object, ...], list[tuple[Matrix, StageSpec]]] = {}
    for matrix in structure.matrices:
        spec = next((spec for spec in assigned[matrix.name] if spec.kind == "quantize" and spec.adaptive), None)
        if spec is not None:
            module = matrix.parameter.removesuffix(".weight").rpartition(".")[0]
            together.setdefault((matrix.block, module, matrix.k, spec.granularity), []).append((matrix, spec))
    sizes: Sizes = {}
    for members in together.values():
        found = [_size(structure, matrix, spec.at(str(dtype).removeprefix("torch."))) for matrix, spec in members]
        smallest = min((size for size in found if size is not None), default=None)
        sizes |= {matrix.name: smallest for matrix, _ in members}
    return sizes


def sized(assigned: Mapping[str, list[StageSpec]], sizes: Sizes) -> dict[str, list[StageSpec]]:
    """The same stages, each with the group size of its weight."""
    return {
        name: [spec.sized(sizes[name]) if spec.kind == "quantize" and name in sizes else spec for spec in specs]
        for name, specs in assigned.items()
    }


def _size(structure: Structure, matrix: Matrix, spec: StageSpec) -> int | None:
    weight = matrix.take(structure.reader.read(matrix.tensor, finite=True)).float()
    bits, smallest = 8 * spec.stage.grid.scale_dtype.itemsize, int(spec.options["group_size"])
    found: int | None = spec.granularity.group_size(weight, smallest, bits)
    return found
