"""Who loads the result beside aerogel: transformers and the servers that read compressed-tensors, or nobody, and why.

compressed-tensors describes a format; what its readers accept is narrower. All of them count the scales of a row as K / group
and refuse a short last group, for integers, NVFP4, MXFP4 and MXFP8 alike. Blocks of 128 x 128 in FP8 may end raggedly where
only weights are rounded, in transformers; where inputs are rounded in blocks of 128 they may not. Servers stack q, k, v and
gate, up into one matrix, which must be of one kind and, in blocks, be cut at whole ones. Each knows some formats only.

Where this comes from: transformers 5.23 with compressed-tensors 0.20 and vLLM 0.32, run (docs/compatibility.md); SGLang 0.5.23,
read in source.

What nothing else can load is not called compressed-tensors: its `quant_method` is aerogel, which other loaders do not know, and
say so, instead of stopping over a tensor's shape. A recipe that names such a format under `pack` is refused.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.pack.config import choose_format
from aerogel.pack.format import Format
from aerogel.quantize.grids import BLOCK, Fp8Grid, IntGrid
from aerogel.recipes.schema import Recipe
from aerogel.recipes.stages import StageSpec

if TYPE_CHECKING:
    from aerogel.model.structure import Matrix, Structure

LOADERS = ("transformers", "vLLM", "SGLang")
SERVERS = LOADERS[1:]
SERVED_GROUPS = (128, 64, 32)
"""Group sizes that servers have fast kernels for."""
PACKED_WIDTHS = (4, 8)
MERGED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that servers run as one, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why some that read compressed-tensors do not load the result.

    lost: who does not, of `LOADERS`.
    why: what stands in the way. instead: what to write so that it does not.
    shown: whether the recipe shows it; else it comes from the shapes of this model.
    """

    lost: tuple[str, ...]
    why: str
    instead: str
    shown: bool = False


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix with the stage that rounds it and the format that stores it."""

    matrix: Matrix
    spec: StageSpec
    form: type[Format]


def obstacles(structure: Structure, assigned: Mapping[str, Sequence[StageSpec]], recipe: Recipe) -> list[Obstacle]:
    """All that stands between the weights of the result and other loaders; native layouts and entropy coding aside.

    Raises:
        BadInput: no format stores a weight; or `pack.format` asks for one by name that nothing else could load.
    """
    coded = []
    for matrix in structure.matrices:
        spec = next((spec for spec in assigned[matrix.name] if spec.kind == "quantize"), None)
        if spec is not None:
            coded.append(Coded(matrix, spec, choose_format(spec.stage.grid, spec.activations, recipe.pack.format)))
    found = [*_beside(coded), *_places(coded), *_groups(coded, recipe), *_kinds(coded), *_experts(coded), *_merged(coded)]
    hidden = next((each for each in found if not each.shown and each.lost == LOADERS), None)
    if hidden is not None and recipe.pack.format != "auto":
        raise BadInput(
            f"pack.format: {recipe.pack.format} is for other loaders, and none of them would load this: {hidden.why};"
            f" {hidden.instead}, or write pack.format: auto for a checkpoint that aerogel alone loads"
        )
    return found


def facts(found: Iterable[Obstacle], recipe: Recipe) -> dict[str, Any]:
    """`loads` of a plan and a report: {"in": [loader], "not": [{"in", "why", "instead", "shown"}]}."""
    every = [*found, *_pack(recipe)]
    lost = {name for each in every for name in each.lost}
    return {
        "in": ["aerogel", *(name for name in LOADERS if name not in lost)],
        "not": [{"in": list(o.lost), "why": o.why, "instead": o.instead, "shown": o.shown} for o in every],
    }


def only_aerogel(found: Iterable[Obstacle]) -> bool:
    """Whether no reader of compressed-tensors loads the weights, so that the checkpoint must not be called that."""
    return any(each.lost == LOADERS for each in found)


def surprises(loads: Mapping[str, Any]) -> list[str]:
    """In sentences, who does not load the result because of this model's shapes, where the recipe did not rule them out."""
    ruled_out = {name for row in loads["not"] if row["shown"] for name in row["in"]}
    rows = [row for row in loads["not"] if not row["shown"] and not ruled_out.issuperset(row["in"])]
    return lines({**loads, "not": rows}) if rows else []


def lines(loads: Mapping[str, Any]) -> list[str]:
    """`facts` in sentences."""
    said = [f"loads in {_and(loads['in'])}" + (" only" if len(loads["in"]) == 1 else "")]
    return said + [f"  not in {_and(row['in'])}: {row['why']}; {row['instead']}" for row in loads["not"]]


def _beside(coded: Sequence[Coded]) -> list[Obstacle]:
    """What the recipe itself asks for and no standard has."""
    found = []
    if any(each.spec.keeps for each in coded):
        why = "outliers, kept columns, rows of more bits and rotations stand beside the codes in aerogel's own tensors"
        found.append(Obstacle(lost=LOADERS, why=why, instead="leave them out for other loaders", shown=True))
    own = sorted({each.form.name for each in coded if not each.form.standard})
    if own:
        instead = "for other loaders take integers, FP8, NVFP4, MXFP4 or MXFP8"
        found.append(Obstacle(lost=LOADERS, why=f"no standard has {_and(own)}", instead=instead, shown=True))
    return found


def _places(coded: Sequence[Coded]) -> list[Obstacle]:
    """Weights that other loaders expect elsewhere, or dense."""
    places = {
        "transposed weights (Conv1D)": [c.matrix for c in coded if c.matrix.transposed],
        "stacks of experts": [c.matrix for c in coded if c.matrix.index is not None],
        "embeddings": [c.matrix for c in coded if c.matrix.kind == "Embedding"],
    }
    instead = "`aerogel export OUT` writes dense weights for other loaders"
    return [
        Obstacle(lost=LOADERS, why=f"{what} are expected dense ({_names(found)})", instead=instead)
        for what, found in places.items()
        if found
    ]


def _groups(coded: Sequence[Coded], recipe: Recipe) -> list[Obstacle]:
    """Groups and blocks that do not divide the inputs of their weight, by size."""
    by_size: dict[tuple[str, int, bool], list[Coded]] = defaultdict(list)
    for each in coded:
        size = each.spec.stage.grid.group_size
        if each.form.standard and size is not None:
            # transformers decodes ragged blocks of weights; inputs in blocks are viewed as whole ones.
            blocks_of_weights = each.form.name == "float-quantized" and each.spec.activations == "none"
            by_size[each.form.name, size, blocks_of_weights].append(each)
    found = []
    adaptive = any(spec.kind == "quantize" and spec.adaptive for spec in recipe.stages)
    for (name, size, decoded), members in by_size.items():
        ragged = [each.matrix for each in members if each.matrix.k % size]
        if ragged:
            widths = _and(sorted({str(m.k) for m in ragged}, key=int))
            what = f"blocks of {size}" if name == "float-quantized" else f"groups of {size}"
            why = f"{what} do not divide {widths} inputs ({_names(ragged)})"
            instead = _other_groups(members, size, adaptive)
            found.append(Obstacle(lost=SERVERS if decoded else LOADERS, why=why, instead=instead))
    return found


def _other_groups(members: Sequence[Coded], size: int, adaptive: bool) -> str:
    """What to write where groups of `size`, whether or not the weights decided it, do not divide the inputs of all of these."""
    if members[0].form.name == "float-quantized":
        return "write quantize.strategy: channel (recipe w8-fp8)"
    if not isinstance(members[0].spec.stage.grid, IntGrid):
        return "the format has no other size: add these weights to ignore, or take integers (w4) or FP8 (w8-fp8)"
    common = gcd(*(each.matrix.k for each in members))
    sizes = [s for s in (*SERVED_GROUPS, *range(min(size, common), 7, -1)) if s <= size and common % s == 0]
    fixed = "granularity: fixed and " if adaptive else ""
    if not sizes:
        return f"write {fixed}quantize.group_size: null (one scale per output), which suits every width"
    return f"write {fixed}quantize.group_size: {sizes[0]}, which divides every input width"


def _kinds(coded: Sequence[Coded]) -> list[Obstacle]:
    """Formats that a server refuses whatever their shapes."""
    found = []
    packed = [each for each in coded if each.form.name == "pack-quantized"]
    if any(each.spec.stage.grid.bits not in PACKED_WIDTHS for each in packed):
        why = f"it unpacks {_and(map(str, PACKED_WIDTHS))} bits only"
        found.append(Obstacle(lost=("SGLang",), why=why, instead="write 4 or 8 bits", shown=True))
    instead = "write bits: 8 and group_size: null (recipes w8a8 and w8a8-static)"
    if any(each.spec.activations.endswith("-static") for each in packed):
        why = "with one scale for all inputs they read 8 bits with a scale per output only"
        found.append(Obstacle(lost=SERVERS, why=why, instead=instead, shown=True))
    elif any(each.spec.activations != "none" for each in packed):
        why = "with rounded inputs it reads 8 bits with a scale per output only"
        found.append(Obstacle(lost=("SGLang",), why=why, instead=instead, shown=True))
    if any(each.form.name == "float-quantized" and _in_blocks(each) and each.spec.activations == "none" for each in coded):
        why = "they read FP8 in blocks with rounded inputs only"
        instead = "write activations: fp8, or strategy: channel (recipe w8-fp8)"
        found.append(Obstacle(lost=SERVERS, why=why, instead=instead, shown=True))
    scaled = sorted({each.form.name for each in coded if each.form.name in ("mxfp4-pack-quantized", "mxfp8-quantized")})
    if scaled:
        instead = "take NVFP4 (w4-nvfp4), FP8 (w8-fp8) or integers"
        found.append(Obstacle(lost=("SGLang",), why=f"it does not read {_and(scaled)}", instead=instead, shown=True))
    return found


def _experts(coded: Sequence[Coded]) -> list[Obstacle]:
    """Formats that vLLM runs in linears and not in experts."""
    ways: dict[str, tuple[str, Callable[[str], bool], str]] = {
        "packed integers without rounded inputs only": (
            "pack-quantized",
            lambda activations: activations != "none",
            "leave activations out, or write bits: 8 and group_size: null (recipe w8a8)",
        ),
        "int8 with a scale per token of inputs only": (
            "int-quantized",
            lambda activations: activations.endswith("-static"),
            "write activations: int8 (recipe w8a8)",
        ),
        "FP8 with rounded inputs only": (
            "float-quantized",
            lambda activations: activations == "none",
            "write activations: fp8 (recipe w8a8-fp8)",
        ),
    }
    found = []
    for what, (form, refused, instead) in ways.items():
        experts = [c.matrix for c in coded if c.matrix.kind == "Expert" and c.form.name == form and refused(c.spec.activations)]
        if experts:
            why = f"it reads experts in {what} ({_names(experts)})"
            found.append(Obstacle(lost=("vLLM",), why=why, instead=instead))
    return found


def _in_blocks(each: Coded) -> bool:
    """Whether an FP8 weight has its scales in blocks."""
    return each.spec.stage.grid.group_size is not None


def _one_scale(each: Coded) -> bool:
    """Whether a weight is FP8 with a single scale."""
    grid = each.spec.stage.grid
    return isinstance(grid, Fp8Grid) and grid.strategy == "tensor"


def _merged(coded: Sequence[Coded]) -> list[Obstacle]:
    """Linears that servers run as one and cannot join."""
    modules: dict[tuple[str, tuple[str, ...]], dict[str, Coded]] = defaultdict(dict)
    for each in coded:
        parent, _, last = each.matrix.name.rpartition(".")
        for family in MERGED:
            if last in family:
                modules[parent, family][last] = each
    unlike, cut, again = [], [], []
    for (_, family), members in modules.items():
        ordered = [members[last] for last in family if last in members]
        if len({(each.form.name, each.spec.activations, repr(each.spec.stage.grid)) for each in ordered}) > 1:
            unlike.append(ordered[0].matrix)
        blocks = [each for each in ordered[:-1] if each.form.name == "float-quantized" and _in_blocks(each)]
        cut += [each.matrix for each in blocks if each.matrix.n % BLOCK]
        if len(ordered) > 1 and all(_one_scale(each) and each.spec.activations != "none" for each in ordered):
            again.append(ordered[0].matrix)
    found = []
    if unlike:
        why = f"they run {_and(' + '.join(family) for family in MERGED)} as one, and these differ in format ({_names(unlike)})"
        found.append(Obstacle(lost=SERVERS, why=why, instead="give linears that read the same input one stage"))
    if cut:
        why = f"stacked with others, blocks of {BLOCK} do not divide their outputs ({_names(cut)})"
        found.append(Obstacle(lost=SERVERS, why=why, instead="write quantize.strategy: channel (recipe w8-fp8)"))
    if again:
        why = f"they bring stacked tensors with a scale each to one scale, which rounds the weights again ({_names(again)})"
        found.append(Obstacle(lost=SERVERS, why=why, instead="write quantize.strategy: channel (recipe w8a8-fp8)"))
    return found


def _pack(recipe: Recipe) -> list[Obstacle]:
    """What the recipe's `pack` makes of the files."""
    found = []
    if recipe.pack.layout != layouts.PORTABLE:
        instead = "write layout: portable, or `aerogel export --layout portable`"
        found.append(Obstacle(lost=LOADERS, why=f"layout {recipe.pack.layout} is aerogel's", instead=instead, shown=True))
    if recipe.pack.entropy:
        found.append(Obstacle(lost=LOADERS, why="it is entropy coded", instead="`aerogel export --to plain`", shown=True))
    return found


def _names(matrices: Sequence[Matrix]) -> str:
    """The first by name, and how many there are."""
    return matrices[0].name + (f" and {len(matrices) - 1} more" if len(matrices) > 1 else "")


def _and(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last
