"""Finds the sites of a block by experiment, and folds scales into them.

A site is a producer whose channels can be scaled if its consumers are scaled back: a norm before q, k, v; `up` before
`down`; `v` before `o`. Instead of listing them for each architecture, every candidate is tried: its channels are
multiplied by known, distinct factors t, the block runs once more in float32, and wherever the input of a linear turns out
to be the old one times exactly those factors, the linear is a consumer. Which factor appears at which input also tells how
grouped value heads map onto query heads. Norms that multiply by 1 + weight are found by trying that as well.

After a scale is chosen and folded, the block must give the same output as before, or the run stops.

Shape legend: K inputs of a consumer, C channels of a producer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer
from aerogel.model.naming import materialise
from aerogel.model.runner import Activations, Runner
from aerogel.model.statistics import BlockStatistics
from aerogel.model.structure import Matrix, Structure
from aerogel.model.tape import Tape, Weights
from aerogel.quantize.site import Site
from aerogel.recipes.stages import StageSpec

if TYPE_CHECKING:
    from aerogel.model.sources import Sources

MATCH = 1e-3
"""Relative deviation up to which a scaled input counts as exactly the old one times the factors."""
INVARIANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative change of the block's output that folding may cause, by the type it runs in."""

NO_SITE = "not scaled: no producer in the block can take up the scales of this input"
"""The note of a linear that a scale stage targets in vain."""


@dataclass(frozen=True, slots=True)
class Found:
    """A producer module of a block and the parameters whose input follows its scale.

    module: path of the producer, such as `model.layers.0.input_layernorm`; `offset` is True where it multiplies by 1 + weight.
    tie_K: the channel that each input comes from; None when they are the same in number and order.
    """

    module: str
    offset: bool
    consumers: tuple[str, ...]
    tie_K: Tensor | None


def find_sites(runner: Runner, index: int, block: nn.Module, hidden: Tensor) -> list[Found]:
    """The sites of block `index`, tried out on `hidden` [B, L, H]. A consumer belongs to the first producer that claims it."""
    prefix = runner.structure.block_names[index] + "."
    trial = copy.deepcopy(block).float()
    hidden = hidden.float()
    base = _inputs(runner, index, trial, prefix, hidden)
    found: list[Found] = []
    claimed: set[str] = set()
    for path, module in trial.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not path or isinstance(module, Conv1D):
            continue
        for offset in (False, True) if weight.ndim == 1 else (False,):
            factors_C = _factors(weight)
            with _scaled(module, factors_C, offset):
                changed = _inputs(runner, index, trial, prefix, hidden)
            matches = {name: _tie(base[name], changed[name], factors_C) for name in base if name in changed}
            hits = {name: tie for name, tie in matches.items() if tie is not None and name not in claimed}
            if hits:
                ties = list(hits.values())
                if any(len(t) != len(ties[0]) or not torch.equal(t, ties[0]) for t in ties):
                    continue
                plain = torch.equal(ties[0], torch.arange(len(factors_C)))
                site = Found(prefix + path, offset, tuple(hits), None if plain else ties[0])
                if _folds(runner, index, trial, prefix, hidden, site, factors_C):
                    claimed.update(hits)
                    found.append(site)
                break
    return found


def _folds(runner: Runner, index: int, trial: nn.Module, prefix: str, hidden: Tensor, site: Found, factors_C: Tensor) -> bool:
    """Whether scaling the producer and its consumers against each other leaves the block's output as it was.

    It does not when something else reads the producer too, a router's experts for instance.
    """
    before = runner.run(index, trial, hidden)
    module = trial.get_submodule(site.module.removeprefix(prefix))
    consumers = [trial.get_parameter(name.removeprefix(prefix)) for name in site.consumers]
    saved = [p.data.clone() for p in consumers]
    try:
        with _scaled(module, factors_C, site.offset):
            for p in consumers:
                owner = trial.get_submodule(next(n for n, q in trial.named_parameters() if q is p).rpartition(".")[0])
                columns = p.data.T if isinstance(owner, Conv1D) else p.data
                columns.div_((factors_C if site.tie_K is None else factors_C[site.tie_K]).to(p.device))
            after = runner.run(index, trial, hidden)
    finally:
        for p, value in zip(consumers, saved, strict=True):
            p.data.copy_(value)
    return float((after - before).norm() / before.norm().clamp_min(1e-30)) < MATCH


def _inputs(runner: Runner, index: int, block: nn.Module, prefix: str, hidden: Tensor) -> dict[str, Tensor]:
    """The input of every matrix of the block, a few tokens of it, by parameter name."""
    weights = Weights({prefix + n: p for n, p in block.named_parameters() if p.ndim >= 2})
    seen: dict[str, Tensor] = {}

    def note(slot: tuple[str, int | None], x: Tensor) -> None:
        seen.setdefault(slot[0], x.reshape(-1, x.shape[-1])[:64].cpu())

    with Tape(weights, note, frozenset(n for n, _ in weights.by_address.values())):
        runner.run(index, block, _float_arguments(runner, index, hidden))
    return seen


def _float_arguments(runner: Runner, index: int, hidden: Tensor) -> Tensor:
    """Makes sure the block's other arguments exist in float32 too: a float32 copy of a block refuses half-precision masks."""
    key = (index, len(hidden))
    runner.arguments[key] = _as_float(runner.arguments[key], hidden.dtype)
    return hidden


def _as_float(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_as_float(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _as_float(v, dtype) for k, v in value.items()}
    return value


def _factors(weight: Tensor) -> Tensor:
    """Distinct positive factors, one per output channel, in an order that no permutation repeats."""
    count = weight.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return torch.logspace(-0.3, 0.3, count, dtype=torch.float64)[order].float()


class _scaled:  # noqa: N801  (a context manager that reads as a verb)
    """Inside it, the outputs of a module are multiplied by factors, by way of its parameters."""

    def __init__(self, module: nn.Module, factors_C: Tensor, offset: bool) -> None:
        self.module, self.factors_C, self.offset = module, factors_C, offset
        self.saved: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        for leaf in ("weight", "bias"):
            value = self.module._parameters.get(leaf)
            if value is not None:
                self.saved[leaf] = value.data.clone()
                scale_parameter(value.data, self.factors_C, self.offset and leaf == "weight")

    def __exit__(self, *exception: object) -> None:
        for leaf, value in self.saved.items():
            self.module._parameters[leaf].data.copy_(value)  # type: ignore[union-attr]


def scale_parameter(value: Tensor, factors_C: Tensor, offset: bool) -> Tensor:
    """Multiplies output channels in place: rows of a matrix, entries of a vector, around -1 for norms with an offset."""
    factors = factors_C.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
    return value.add_(1).mul_(factors).sub_(1) if offset else value.mul_(factors)


def _tie(before: Tensor, after: Tensor, factors_C: Tensor) -> Tensor | None:
    """Which factor each input was multiplied by, int64 [K]; None when the input did not follow the factors."""
    if before.shape != after.shape:
        return None
    power_K = before.square().sum(0)
    live_K = power_K > 1e-12
    if not bool(live_K.any()) or torch.equal(before, after):
        return None
    ratio_K = torch.where(live_K, (before * after).sum(0) / power_K.clamp_min(1e-30), 1.0)
    if float((after - before * ratio_K).norm() / after.norm().clamp_min(1e-30)) > MATCH:
        return None
    if len(ratio_K) == len(factors_C) and torch.allclose(ratio_K[live_K], factors_C[live_K], rtol=MATCH):
        return torch.arange(len(factors_C))
    ordered, where = factors_C.sort()
    place = torch.searchsorted(ordered, ratio_K).clamp(1, len(ordered) - 1)
    left_is_nearer = (ratio_K - ordered[place - 1]).abs() < (ordered[place] - ratio_K).abs()
    tie_K = where[place - left_is_nearer.long()]
    spacing = 10 ** (0.6 / max(1, len(factors_C) - 1)) - 1
    near = ((ratio_K / factors_C[tie_K] - 1).abs() < spacing / 4) | ~live_K
    # Every channel must be read, and dead inputs would leave its place unknown.
    return tie_K if bool(near.all()) and bool(live_K.all()) and len(torch.unique(tie_K)) == len(factors_C) else None


def apply_scales(
    structure: Structure,
    runner: Runner,
    index: int,
    block: nn.Module,
    matrices: list[Matrix],
    stages: Mapping[str, list[StageSpec]],
    sources: Sources,
    activations: Activations,
    batches: int,
) -> list[dict[str, Any]]:
    """Runs the scale stages of a block: finds its sites, lets the stage choose, folds. Returns a report row per site.

    Raises:
        BadInput: a scale stage is asked for, and the block has no site that it could use.
        RunFailed: folding changed what the block computes.
    """
    chosen = {m.name: spec for m in matrices for spec in stages[m.name] if spec.kind == "scale"}
    if not chosen:
        return []
    before = runner.run(index, block, activations[0])
    kept_arguments = dict(runner.arguments)
    sites = find_sites(runner, index, block, activations[0])
    runner.arguments.update(kept_arguments)
    by_parameter: dict[str, list[Matrix]] = {}
    for m in structure.matrices:
        if m.block == index:
            by_parameter.setdefault(m.parameter, []).append(m)
    wanted = [s for s in sites if any(m.name in chosen for name in s.consumers for m in by_parameter.get(name, []))]
    if not wanted:
        raise BadInput(
            f"no producer in {structure.block_names[index]} can take up the scales of a scale stage; leave that stage out for a"
            f" {structure.config.model_type} model"
        )
    names = sorted({name for site in wanted for name in site.consumers if name in by_parameter})
    statistics = BlockStatistics(runner, index, block, names, activations, batches)
    rows = []
    for site in wanted:
        consumers = [m for name in site.consumers for m in by_parameter.get(name, [])]
        rows.append(_fold_site(structure, site, consumers, by_parameter, statistics, stages, chosen, sources))
    materialise(structure.model, structure.block_groups(index), sources.fetch, runner.dtype)
    after = runner.run(index, block, activations[0])
    change = float((after.float() - before.float()).norm() / before.float().norm())
    if not change < INVARIANCE[runner.dtype]:
        raise RunFailed(
            f"folding scales changed the output of {structure.block_names[index]} by {change:.1%}; leave the scale stage out"
            " for this model and report it"
        )
    return rows


def unscaled(
    layers: Mapping[str, Layer], stages: Mapping[str, list[StageSpec]], rows: Iterable[Mapping[str, Any]]
) -> dict[str, Layer]:
    """The layers of a block that a scale stage targets and no site (report rows `rows`) reaches, with a note that says so."""
    reached = {name for row in rows for name in row["consumers"]}
    targeted = [name for name in layers if any(spec.kind == "scale" for spec in stages[name])]
    return {name: layers[name].with_(notes={"scale": NO_SITE}) for name in targeted if name not in reached}


def _fold_site(
    structure: Structure,
    site: Found,
    consumers: list[Matrix],
    by_parameter: Mapping[str, list[Matrix]],
    statistics: BlockStatistics,
    stages: Mapping[str, list[StageSpec]],
    chosen: Mapping[str, StageSpec],
    sources: Sources,
) -> dict[str, Any]:
    widths = {m.parameter: m.k for m in consumers}
    slots = [(m.parameter, m.expert) for m in consumers]
    stats = statistics.collect(slots, widths.__getitem__, cross=False)
    layers = []
    grids = []
    for m in consumers:
        weight = m.take(sources.fetch(m.tensor)).to(torch.float32, copy=True).contiguous()
        layers.append(Layer(name=m.name, weight_NK=weight, stats=stats[statistics.leader(m.parameter), m.expert]))
        grids.append(next((s.stage.grid for s in stages[m.name] if s.kind == "quantize"), None))
    spec = next(chosen[m.name] for m in consumers if m.name in chosen)
    tie_K = site.tie_K.to(layers[0].weight_NK.device) if site.tie_K is not None else None
    solved: Site = spec.stage(Site(name=site.module, consumers=tuple(layers), grids=tuple(grids), tie_K=tie_K))
    inverse_C = solved.producer_scale()
    if inverse_C is None or solved.scale_K is None:
        return {"site": site.module, "consumers": [m.name for m in consumers], **solved.notes}
    real_C = _scale_producer(structure, site, inverse_C, by_parameter, sources)
    scale_K = 1 / (real_C if site.tie_K is None else real_C[site.tie_K.to(real_C.device)])
    _scale_consumers(structure, site.consumers, by_parameter, scale_K, stages, sources)
    return {"site": site.module, "consumers": [m.name for m in consumers], **solved.notes}


def _scale_producer(
    structure: Structure, site: Found, inverse_C: Tensor, by_parameter: Mapping[str, list[Matrix]], sources: Sources
) -> Tensor:
    """Scales the producer's parameters; returns the factors that rounding to the stored type really left, [C]."""
    real_C = inverse_C
    for leaf in ("weight", "bias"):
        parameter = f"{site.module}.{leaf}"
        group = next((g for g in structure.groups if parameter in g.outputs), None)
        if group is None:
            continue
        name = group.sources[0][0]
        old = sources.fetch(name)
        matrix = next(iter(by_parameter.get(parameter, [])), None)
        if matrix is None:
            new = scale_parameter(old.float().clone(), real_C, site.offset and leaf == "weight").to(old.dtype)
            if leaf == "weight" and old.ndim == 1:
                shift = 1.0 if site.offset else 0.0
                plain = old.float() + shift
                real_C = torch.where(plain != 0, (new.float() + shift) / torch.where(plain != 0, plain, 1.0), real_C)
            sources.tensors[name] = new
        else:
            # The matrix is rounded later from what stands here, so it is kept in float32 until then.
            wide = old.float().clone()
            scale_parameter(matrix.take(wide), real_C, False)
            sources.tensors[name] = wide
    return real_C


def _scale_consumers(
    structure: Structure,
    parameters: Iterable[str],
    by_parameter: Mapping[str, list[Matrix]],
    scale_K: Tensor,
    stages: Mapping[str, list[StageSpec]],
    sources: Sources,
) -> None:
    for parameter in parameters:
        matrices = by_parameter.get(parameter, [])
        if matrices:
            for name in {m.tensor for m in matrices}:
                old = sources.fetch(name)
                treated = all(any(s.kind == "quantize" for s in stages[m.name]) for m in matrices if m.tensor == name)
                wide = old.float().clone()
                for m in matrices:
                    if m.tensor == name:
                        m.take(wide).mul_(scale_K)
                sources.tensors[name] = wide if treated else wide.to(old.dtype)
            continue
        group = next(g for g in structure.groups if parameter in g.outputs)
        if group.converter is not None:
            raise RunFailed(f"{parameter} reads a scaled site but is assembled from several tensors; leave the scale stage out")
        name = group.sources[0][0]
        old = sources.fetch(name)
        sources.tensors[name] = (old.float() * scale_K).to(old.dtype)


def sites_of(runner: Runner, index: int, hidden: Tensor, read: Callable[[str], Tensor]) -> list[Found]:
    """The sites of one block, for looking at a model: `find_sites` with the block loaded and released around it."""
    runner.fetch = read
    block = runner.load_block(index)
    try:
        return find_sites(runner, index, block, hidden)
    finally:
        runner.release_block(index)
