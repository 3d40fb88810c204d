"""The walk: block after block, each linear meets its stages with statistics that already see what was compressed before.

For each block: read its tensors, run the calibration data through it wave by wave, give every `Layer` to its stages, put
the compressed weight back (so that the next wave, and the next block, see it), encode what is to be stored, let go. The
walk is a generator: one `Part` per block, then one for what lies outside the blocks. It writes nothing and draws nothing.

What runs is what is stored: the weight put back into the model is decoded from the very tensors that go to the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.capture import Accumulator
from aerogel.model.gradients import NEEDS
from aerogel.model.layer import Layer, Stats
from aerogel.model.naming import materialise
from aerogel.model.runner import Activations, Runner
from aerogel.model.shared_factor import Factors, shared_factors, two_level_grid, with_factor
from aerogel.model.sites import apply_scales, unscaled
from aerogel.model.sources import Sources
from aerogel.model.statistics import BlockStatistics
from aerogel.model.storage import Job, Storage
from aerogel.model.structure import Matrix, Structure
from aerogel.model.tape import Slot


@dataclass(frozen=True, slots=True)
class Part:
    """A finished piece of the checkpoint: `tensors` as they go to the file, `row` for the report.

    seconds is kept apart from the row, which must be the same in every run.
    """

    name: str
    tensors: dict[str, Tensor]
    row: dict[str, Any]
    seconds: float


class Walk:
    """One pass over a model. `parts` is the generator; everything else serves it.

    Args:
        structure, runner: the model.
        job: what to do.
        activations: hidden states, filled by the runner's prologue; None when no stage needs data.
        dense: the same for the uncompressed stream, where some stage needs the cross moment.
    """

    def __init__(
        self,
        structure: Structure,
        runner: Runner | None,
        job: Job,
        activations: Activations | None,
        batches: int,
        dense: Activations | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.structure, self.runner, self.job, self.storage = structure, runner, job, Storage(job)
        self.activations, self.batches, self.dense = activations, batches, dense
        self.device = device or torch.device("cpu")
        self.by_block: dict[int | None, list[Matrix]] = {}
        for matrix in structure.matrices:
            self.by_block.setdefault(matrix.block, []).append(matrix)
        self.factors: Factors = {}

    def parts(self, finished: Callable[[str], Mapping[str, Tensor] | None]) -> Iterator[Part]:
        """The blocks in order, then `outer`. `finished(name)` returns the stored tensors of a part that is already done."""
        for index in range(len(self.structure.block_names)):
            name = f"block-{index:05d}"
            done = finished(name)
            if done is None:
                yield self._block(index, name)
            elif self.runner is not None:
                self._replay(index, done)
        if finished("outer") is None:
            yield self._outer()

    # ---- one block ------------------------------------------------------------------------------------------------

    def _block(self, index: int, name: str) -> Part:
        start = time.perf_counter()
        groups = self.structure.block_groups(index)
        sources = Sources(self.structure.reader, self.device)
        matrices = [m for m in self.by_block.get(index, []) if self.job.stages[m.name]]
        treated = {m.tensor for m in matrices}
        for group in groups:
            for source, _ in group.sources:
                value = sources.fetch(source)
                if source not in treated:
                    sources.tensors[source] = self.job.kept(value)
        row: dict[str, Any] = {"index": index, "name": self.structure.block_names[index]}
        if self.runner is None or self.activations is None:
            self._share_factors(matrices, sources)
            layers = {m.name: self._solve([m], [self._layer(m, sources, None)])[0] for m in matrices}
        else:
            layers, facts = self._calibrated(index, matrices, sources)
            row |= facts
        tensors, rows = self.storage.part(groups, matrices, layers, sources)
        return Part(name, tensors, {**row, "layers": rows}, time.perf_counter() - start)

    def _calibrated(self, index: int, matrices: list[Matrix], sources: Sources) -> tuple[dict[str, Layer], dict[str, Any]]:
        runner, activations = self.runner, self.activations
        if runner is None or activations is None:
            raise RunFailed("a stage needs calibration data and the walk has none; this is a mistake in aerogel, report it")
        runner.fetch = sources.fetch
        block = runner.load_block(index)
        sites = apply_scales(
            self.structure, runner, index, block, matrices, self.job.stages, sources, activations, self.batches
        )
        self._share_factors(matrices, sources)
        statistics = BlockStatistics(
            runner,
            index,
            block,
            sorted({m.parameter for m in matrices}),
            activations,
            self.batches,
            hidden_dense=self.dense,
            top_up=self.job.experts_top_up,
            min_expert_tokens=self.job.min_expert_tokens,
        )
        layers: dict[str, Layer] = {}
        for wave in statistics.waves():
            layers |= self._wave(wave, [m for m in matrices if m.parameter in wave], statistics, sources)
            self._put_back(wave, sources)
            statistics.final.update(wave)
        layers |= unscaled(layers, self.job.stages, sites)
        # The first batch stands for the block's output error.
        first = statistics.output(0)
        error = _relative_error(first, statistics.first_output)
        if index < len(self.structure.block_names) - 1 or self._head_needs_data():
            statistics.advance(activations, first)
            runner.release_block(index)
            self._advance_dense(index)
        runner.release_block(index)
        facts: dict[str, Any] = {"relative_error": error}
        if sites:
            facts["sites"] = sites
        if statistics.expert_tokens:
            facts["experts"] = statistics.expert_rows()
        return layers, facts

    def _wave(self, wave: list[str], matrices: list[Matrix], statistics: BlockStatistics, sources: Sources) -> dict[str, Layer]:
        """The layers of one wave, solved. Linears that share an input are solved together."""
        widths = {m.parameter: m.k for m in matrices}
        needs = {need for m in matrices for spec in self.job.stages[m.name] for need in spec.needs}
        slots = sorted({(m.parameter, m.expert) for m in matrices}, key=lambda s: (wave.index(s[0]), s[1] or 0))
        cross = "cross_moment" in needs
        done: dict[str, Layer] = {}
        for portion in statistics.portions(slots, widths.__getitem__, cross):
            stats = statistics.collect(portion, widths.__getitem__, cross=cross) if needs else {}
            together: dict[Slot, list[Matrix]] = {}
            for m in matrices:
                if (m.parameter, m.expert) in set(portion):
                    together.setdefault((statistics.leader(m.parameter), m.expert), []).append(m)
            for leader, members in together.items():
                layers = [
                    self._layer(m, sources, stats.pop(leader, None) if len(members) == 1 else stats.get(leader))
                    for m in members
                ]
                stats.pop(leader, None)
                for m, layer in zip(members, self._solve(members, layers), strict=True):
                    done[m.name] = layer
                    sources.put(m, layer.weight_NK)
        return done

    def _layer(self, matrix: Matrix, sources: Sources, stats: Stats | None) -> Layer:
        weight = matrix.take(sources.fetch(matrix.tensor)).to(torch.float32, copy=True).contiguous()
        layer = Layer(name=matrix.name, weight_NK=weight, stats=stats)
        gradients, needs = self.job.gradients, {need for spec in self.job.stages[matrix.name] for need in spec.needs}
        if gradients is None or not needs & NEEDS:
            return layer
        fisher = gradients.fisher(matrix) if "fisher" in needs else None
        return layer.with_(rows_R=gradients.rows.get(matrix.name), fisher_NK=None if fisher is None else fisher.to(self.device))

    def _share_factors(self, matrices: list[Matrix], sources: Sources) -> None:
        """Decides the factors of this block's two-level scales."""
        grids = ((m, two_level_grid(self.job.stages[m.name])) for m in matrices)
        self.factors = shared_factors((g, m.take(sources.fetch(m.tensor))) for m, g in grids if g is not None)

    def _stages(self, members: list[Matrix], layers: list[Layer]) -> list[Layer]:
        """Layers through their prune and quantize stages; equal stages on a shared input are solved in one go."""
        stages = (self.job.stages[m.name] for m in members)
        plans = [[with_factor(s, self.factors) for s in specs if s.kind != "scale"] for specs in stages]
        if all(plan == plans[0] for plan in plans):
            for spec in plans[0]:
                many = getattr(spec.stage, "call_group", None)
                layers = many(layers) if many is not None and len(layers) > 1 else [spec.stage(layer) for layer in layers]
            return layers
        for i, plan in enumerate(plans):
            for spec in plan:
                layers[i] = spec.stage(layers[i])
        return layers

    def _solve(self, members: list[Matrix], layers: list[Layer]) -> list[Layer]:
        """Layers through their stages and as they will be stored: what runs from here on is what the file decodes to."""
        return [self.storage.settled(m, layer) for m, layer in zip(members, self._stages(members, layers), strict=True)]

    def _put_back(self, wave: Iterable[str], sources: Sources) -> None:
        """Rebuilds the parameters of a wave from the compressed weights."""
        if self.runner is not None:
            names = set(wave)
            groups = [g for g in self.structure.groups if names.intersection(g.outputs)]
            materialise(self.structure.model, groups, sources.fetch, self.runner.dtype)

    # ---- what is not a block ---------------------------------------------------------------------------------------

    def _head_needs_data(self) -> bool:
        return any(spec.needs for m in self.by_block.get(None, []) for spec in self.job.stages[m.name])

    def _outer(self) -> Part:
        """Embeddings, final norm, head, and tensors that the architecture does not use: all kept unless a stage says not."""
        start = time.perf_counter()
        sources = Sources(self.structure.reader, self.device)
        self.factors = {}
        matrices = [m for m in self.by_block.get(None, []) if self.job.stages[m.name]]
        layers: dict[str, Layer] = {}
        for m in matrices:
            needs = {need for spec in self.job.stages[m.name] for need in spec.needs}
            stats = self._head_stats(m, sources) if needs else None
            (layers[m.name],) = self._solve([m], [self._layer(m, sources, stats)])
        tied = [m for m in matrices if m.tied]
        untied = [m for m in matrices if not m.tied]
        tensors, rows = self.storage.part(self.structure.outer_groups, untied, layers, sources)
        for m in tied:
            if layers[m.name].codes is None:
                raise BadInput(f"{m.name} is tied to the embedding; it can be quantized, which unties it, but not only pruned")
            stored, row = self.storage.codes(m, layers[m.name], sources.tensors[m.tensor].dtype)
            tensors |= stored
            rows.append(row)
        for name in self.structure.unused:
            tensors[name] = self.job.kept(self.structure.reader.read(name))
        return Part("outer", tensors, {"name": "outer", "layers": rows}, time.perf_counter() - start)

    def _head_stats(self, matrix: Matrix, sources: Sources) -> Stats:
        """Statistics of what arrives at the output head."""
        if not self.structure.is_head(matrix) or self.runner is None or self.activations is None:
            raise BadInput(f"{matrix.name} lies outside the blocks; only the output head can be calibrated there")
        self.runner.fetch = sources.fetch
        total = Accumulator(matrix.k, cross=False, device=self.device)
        hidden = (self.activations[batch] for batch in range(self.batches))
        for x in self.runner.epilogue(hidden):
            total.add(x)
        return total.stats(matrix.name)

    def _replay(self, index: int, stored: Mapping[str, Tensor]) -> None:
        """Runs a block that an earlier run finished, so that the activations stand where they stood."""
        if self.runner is None or self.activations is None:
            return
        sources = Sources(self.structure.reader, self.device)
        weights = {m: self.storage.weight(m, stored) for m in self.by_block.get(index, [])}
        coded = {m.tensor for m, weight_NK in weights.items() if weight_NK is not None}
        for group in self.structure.block_groups(index):
            for source, _ in group.sources:
                sources.tensors[source] = sources.fetch(source) if source in coded else stored[source].to(self.device)
        for m, weight_NK in weights.items():
            if weight_NK is not None:
                sources.put(m, weight_NK.to(self.device))
        self.runner.fetch = sources.fetch
        block = self.runner.load_block(index)
        for batch in range(self.batches):
            self.activations[batch] = self.runner.run(index, block, self.activations[batch])
        self.runner.release_block(index)
        self._advance_dense(index)

    def _advance_dense(self, index: int) -> None:
        """The uncompressed stream through a block, from the weights on disk: walked and replayed alike."""
        if self.runner is None or self.dense is None:
            return
        treated = {m.tensor for m in self.by_block.get(index, []) if self.job.stages[m.name]}

        def fetch(name: str) -> Tensor:
            value = self.structure.reader.read(name, finite=True)
            return (value if name in treated else self.job.kept(value)).to(self.device)

        self.runner.fetch = fetch
        block = self.runner.load_block(index)
        for batch in range(self.batches):
            self.dense[batch] = self.runner.run(index, block, self.dense[batch])
        self.runner.release_block(index)


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, Frobenius, in float32."""
    wanted = wanted.float()
    return float((got.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
