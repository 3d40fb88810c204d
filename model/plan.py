"""What a recipe will do to a model, tensor by tensor, before any weight is read.

Everything comes from the headers of the checkpoint and from the shapes that a format says it stores, so the bytes are
exact and not an estimate. Memory and time are estimates, and each is given with the parts it is made of:

    memory = one block in compute precision + its input and output activations + the second moments of one wave
    seconds = (2 forward passes over the calibration tokens + the solvers' flops) / matmul rate + rounding per weight

Shape legend: N out features, K in features, T calibration tokens, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.kernels.linear import problem_of, stored_shapes
from aerogel.model import servers
from aerogel.model.experts import rows_of
from aerogel.model.granularity import Sizes, adaptive_sizes, sized
from aerogel.pack.config import choose_format
from aerogel.pack.scheme import Scheme
from aerogel.recipes.assign import assign, matches
from aerogel.recipes.schema import Recipe
from aerogel.recipes.stages import StageSpec
from aerogel.recipes.words import words

if TYPE_CHECKING:
    from aerogel.model.structure import Matrix, Structure

SOLVER_COPIES = 3
"""float32 [K, K] matrices a solver holds at once for one linear: the second moment, its inverse, a work copy."""

ROUNDING_SECONDS = 5e-8
"""Per weight, for the search of its scale and the rounding itself: two cores of a current server."""


def plan(model: str | Path, recipe: Recipe | str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The fate of every tensor of `model` under `recipe`, with predicted bytes, memory and time. Loads no weights.

    Returns:
        {"model", "recipe", "tensors": [row], "loads": {...}, "size": {...}, "memory": {...}, "time": {...}}; a row is as in
        the report: {"name", "fate": compressed | pruned | kept, "why", "shape", "bits_per_weight", "bytes", "source_bytes"};
        `loads`: `servers.facts`.

    Raises:
        BadInput: whatever would stop the real run before it starts: model, architecture, recipe, patterns.
    """
    from aerogel.model.source import resolve
    from aerogel.model.structure import discover

    checked = Recipe.load(recipe)
    structure = discover(resolve(model))
    return {"model": str(model), **plan_structure(structure, checked)}


def plan_structure(structure: Structure, recipe: Recipe, sizes: Sizes | None = None) -> dict[str, Any]:
    """As `plan`, for a structure that was already discovered. `sizes`: group sizes that were decided by the weights already."""
    assigned = assign(recipe.stages, structure.modules)
    dtype = stored_dtype(structure, recipe)
    assigned = sized(assigned, adaptive_sizes(structure, assigned, dtype) if sizes is None else sizes)
    _check_outside(structure, assigned)
    _check_stacks(structure, assigned)
    _check_gradients(structure, assigned)
    stored = {name: [spec.at(str(dtype).removeprefix("torch.")) for spec in specs] for name, specs in assigned.items()}
    loads = servers.facts(servers.obstacles(structure, stored, recipe), recipe)
    by_tensor: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in structure.matrices:
        if not matrix.tied:
            by_tensor[matrix.tensor].append(matrix)
    rows = []
    for entry in structure.reader:
        kept = _dense_bytes(entry.shape, entry.dtype, recipe)
        role = structure.role(entry.name)
        facts = {"role": role, "shape": list(entry.shape), "source_bytes": entry.nbytes}
        fate = _fate(by_tensor.get(entry.name, []), role, assigned, recipe, dtype, kept)
        rows.append({"name": entry.name, **facts, **fate})
    rows += [_untied(matrix, assigned[matrix.name], recipe, dtype) for matrix in structure.matrices if matrix.tied]
    return {
        "recipe": recipe.as_dict(),
        "tensors": [row for row in rows if row["bytes"] or row["source_bytes"]],
        "loads": loads,
        "size": {**_size(rows), "basis": _size_basis(assigned, recipe)},
        "memory": _memory(structure, assigned, recipe),
        "time": _time(structure, assigned, recipe),
    }


def _check_outside(structure: Structure, assigned: Mapping[str, list[StageSpec]]) -> None:
    """What the walk does last, it must not refuse last: linears outside the blocks, and a head tied to the embedding."""
    for matrix in structure.matrices:
        stages = assigned[matrix.name]
        if matrix.block is not None or not stages:
            continue
        is_head = structure.is_head(matrix)
        if any(spec.kind == "scale" for spec in stages):
            raise BadInput(
                f"{matrix.name} lies outside the blocks, where no scale can be folded; add it to ignore of that stage"
            )
        if not is_head and any(spec.needs for spec in stages):
            raise BadInput(
                f"{matrix.name} lies outside the blocks, where only the output head can be calibrated; add it to ignore, or"
                " give it a stage of its own with rtn or hqq"
            )
        if matrix.tied and not any(spec.kind == "quantize" for spec in stages):
            raise BadInput(
                f"{matrix.name} is tied to the embedding; it can be quantized, which unties it, but not only pruned;"
                " add it to ignore"
            )


def _check_stacks(structure: Structure, assigned: Mapping[str, list[StageSpec]]) -> None:
    """Experts that are stored together are quantized together."""
    stacks: dict[str, list[bool]] = defaultdict(list)
    for matrix in structure.matrices:
        if matrix.index is not None:
            stacks[matrix.tensor].append(any(spec.kind == "quantize" for spec in assigned[matrix.name]))
    for tensor, quantized in stacks.items():
        if any(quantized) and not all(quantized):
            raise BadInput(
                f"{sum(quantized)} of the {len(quantized)} experts in {tensor} are quantized; target all of them or none, since"
                " they are stored together"
            )


def _check_gradients(structure: Structure, assigned: Mapping[str, list[StageSpec]]) -> None:
    """A weight whose stage needs gradients is some rows of one parameter of a block."""
    for matrix in structure.matrices:
        if not any(spec.needs & {"row_loss", "fisher"} for spec in assigned[matrix.name]):
            continue
        if matrix.block is None or rows_of(structure, matrix) is None:
            raise BadInput(
                f"{matrix.name} has no gradient of its own (it lies outside the blocks, or the model joins it with others);"
                " add it to ignore, or leave out what needs gradients (rows: loss, clip: fisher)"
            )


def stored_dtype(structure: Structure, recipe: Recipe) -> torch.dtype:
    """The type that kept weights and `auto` scales are stored in: `pack.dtype`, or what most of the checkpoint has."""
    if recipe.pack.dtype != "source":
        chosen: torch.dtype = getattr(torch, recipe.pack.dtype)
        return chosen
    counts: Counter[torch.dtype] = Counter()
    for entry in structure.reader:
        if entry.dtype.is_floating_point:
            counts[entry.dtype] += math.prod(entry.shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def stored_bytes(spec: StageSpec, n: int, k: int, recipe: Recipe, dtype: torch.dtype, layout: str | None = None) -> int:
    """Bytes of all tensors that a [N, K] weight becomes under a quantize stage, in a native `layout` if one is named.

    Raises:
        BadInput: no format fits, or the layout does not hold it.
    """
    spec = spec.at(str(dtype).removeprefix("torch."))
    grid = spec.stage.grid
    name = choose_format(grid, spec.activations, recipe.pack.format).name
    scheme = Scheme(format=name, grid=grid, activations=spec.activations, layout=layout)
    if layout is not None:
        reason = layouts.owner(layout).refuses_layout(problem_of(scheme, n, k, dtype))
        if reason is not None:
            raise BadInput(f"a weight cannot be stored as {layout}: it {reason}, or write `layout: portable`")
    shapes = stored_shapes(scheme, n, k)
    if spec.has_beside:
        shapes = {**shapes, **spec.stage.shapes(n, k)}
    return sum(math.prod(shape) * kind.itemsize for shape, kind in shapes.values())


def _fate(
    owned: list[Matrix],
    role: str,
    assigned: Mapping[str, list[StageSpec]],
    recipe: Recipe,
    dtype: torch.dtype,
    kept: int,
) -> dict[str, Any]:
    """What becomes of one tensor on disk; a fused stack of experts is several matrices."""
    if not owned:
        return {"fate": "kept", "why": f"{role}: no stage applies", "bits_per_weight": None, "bytes": kept}
    if not any(assigned[matrix.name] for matrix in owned):
        return {"fate": "kept", "why": _why_kept(owned[0], role, recipe), "bits_per_weight": None, "bytes": kept}
    stored = [_stored_bytes(matrix, assigned[matrix.name], recipe, dtype, kept // len(owned)) for matrix in owned]
    weights = sum(matrix.n * matrix.k for matrix in owned)
    stages = assigned[owned[0].name]
    fate = "compressed" if any(spec.kind == "quantize" for spec in stages) else "pruned"
    why = " -> ".join(words(spec, owned[0].k) for spec in stages)
    return {"fate": fate, "why": why, "bits_per_weight": 8 * sum(stored) / weights, "bytes": sum(stored)}


def _untied(matrix: Matrix, stages: list[StageSpec], recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """The row of an output head that shares the embedding's tensor: nothing when it stays tied."""
    size = _stored_bytes(matrix, stages, recipe, dtype, matrix.n * matrix.k * dtype.itemsize) if stages else 0
    return {
        "name": f"{matrix.name}.weight",
        "role": "head",
        "fate": "compressed" if stages else "kept",
        "why": " -> ".join(words(spec, matrix.k) for spec in stages) + " (was tied to the embedding)"
        if stages
        else "tied to the embedding",
        "shape": [matrix.n, matrix.k],
        "bits_per_weight": 8 * size / (matrix.n * matrix.k) if stages else None,
        "bytes": size,
        "source_bytes": 0,
    }


def _stored_bytes(matrix: Matrix, stages: list[StageSpec], recipe: Recipe, dtype: torch.dtype, dense: int) -> int:
    """Bytes of one matrix under its stages; `dense` is what it takes when it is not quantized."""
    spec = next((spec for spec in stages if spec.kind == "quantize"), None)
    layout = layouts.for_this_machine(recipe.pack.layout)
    # Stacks of experts have no layout on disk, and embeddings no kernel: both stay portable.
    native = layout if layout != layouts.PORTABLE and matrix.kind in ("Linear", "Conv1D") else None
    return dense if spec is None else stored_bytes(spec, matrix.n, matrix.k, recipe, dtype, native)


def _dense_bytes(shape: tuple[int, ...], dtype: torch.dtype, recipe: Recipe) -> int:
    """Bytes of a tensor that is kept: floating-point ones are cast to `pack.dtype`."""
    cast = dtype.is_floating_point and recipe.pack.dtype != "source"
    kind: torch.dtype = getattr(torch, recipe.pack.dtype) if cast else dtype
    return math.prod(shape) * kind.itemsize


def _why_kept(matrix: Matrix, role: str, recipe: Recipe) -> str:
    """The ignore pattern that kept a matrix, or that no stage targets it."""
    for index, spec in enumerate(recipe.stages):
        for pattern in spec.ignore:
            if matches(pattern, matrix.name, "lm_head" if role == "head" else matrix.kind):
                return f"stages.{index}.{spec.kind}.ignore: '{pattern}'"
    return f"no stage targets it ({matrix.kind})"


def _size(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals; `bits_per_weight` is over the quantized weights alone, `coverage` their share of all parameters."""
    source, stored = sum(row["source_bytes"] for row in rows), sum(row["bytes"] for row in rows)
    quantized = [row for row in rows if row["fate"] == "compressed"]
    weights = sum(math.prod(row["shape"]) for row in quantized)
    everything = sum(math.prod(row["shape"]) for row in rows if row["bytes"])
    return {
        "source_bytes": source,
        "bytes": stored,
        "compression": source / stored if stored else None,
        "bits_per_weight": 8 * sum(row["bytes"] for row in quantized) / weights if weights else None,
        "coverage": weights / everything if everything else 0.0,
    }


def _size_basis(assigned: Mapping[str, list[StageSpec]], recipe: Recipe) -> str:
    """What the planned bytes are: exact, unless the weights or the data decide a part of them."""
    options = [spec.options for specs in assigned.values() for spec in specs]
    most = [rule for rule in ("columns", "outliers") if any(each.get(rule, "none") != "none" for each in options)]
    said = [f"{' and '.join(most)} counted at their whole share"] if most else []
    if any(each.get("rows", "none") != "none" for each in options):
        said.append("about: rows of more bits counted at the same share of every weight")
    said += ["before entropy coding"] if recipe.pack.entropy else []
    return "; ".join(said) or "exact"


def _blocks(structure: Structure) -> dict[int, list[Matrix]]:
    """The matrices of each decoder block."""
    table: dict[int, list[Matrix]] = defaultdict(list)
    for matrix in structure.matrices:
        if matrix.block is not None:
            table[matrix.block].append(matrix)
    return table


def _memory(structure: Structure, assigned: Mapping[str, list[StageSpec]], recipe: Recipe) -> dict[str, int | str]:
    """Peak bytes of the run on top of the Python process, and what they are made of."""
    blocks = _blocks(structure).values()
    block = max((sum(matrix.n * matrix.k for matrix in matrices) for matrices in blocks), default=0) * 4
    needing = [matrix for matrices in blocks for matrix in matrices if any(spec.needs for spec in assigned[matrix.name])]
    widest = max((matrix.k for matrix in needing), default=0)
    statistics = SOLVER_COPIES * 4 * widest**2
    data = recipe.calibration
    hidden = int(getattr(structure.config.get_text_config(), "hidden_size", 0) or 0)
    activations = 2 * 4 * data.samples * data.sequence_length * hidden if recipe.needs_data else 0
    return {
        "block_bytes": block,
        "activations_bytes": activations,
        "statistics_bytes": statistics,
        "peak_bytes": block + activations + statistics,
        "basis": "float32; activations of the whole calibration set before and after one block",
    }


def _time(structure: Structure, assigned: Mapping[str, list[StageSpec]], recipe: Recipe) -> dict[str, float | str]:
    """Seconds of forward passes and solvers at the matmul rate of this machine."""
    rate = matmul_rate()
    data = recipe.calibration
    tokens = data.samples * data.sequence_length if recipe.needs_data else 0
    inside = [matrix for matrices in _blocks(structure).values() for matrix in matrices]
    forward = 2 * 2 * tokens * sum(matrix.n * matrix.k for matrix in inside)
    # Second moment (T K^2 multiply-adds), Cholesky and inverse (about K^3), column loop (N K^2).
    solving = sum(
        2 * tokens * matrix.k**2 + 2 * matrix.k**3 + 2 * matrix.n * matrix.k**2
        for matrix in inside
        if any(spec.needs for spec in assigned[matrix.name])
    )
    rounded = [matrix for matrix in structure.matrices if any(spec.kind == "quantize" for spec in assigned[matrix.name])]
    rounding = ROUNDING_SECONDS * sum(matrix.n * matrix.k for matrix in rounded)
    return {
        "forward_seconds": forward / rate,
        "solver_seconds": solving / rate,
        "rounding_seconds": rounding,
        "seconds": (forward + solving) / rate + rounding,
        "flops_per_second": rate,
        "basis": "float32 matmul of 512 x 512 on the CPU, measured now; rough, within a factor of three",
    }


def matmul_rate() -> float:
    """float32 operations per second of a 512 x 512 matmul, the best of three; takes milliseconds."""
    a = torch.ones(512, 512)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best
