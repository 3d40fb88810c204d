"""What the loss feels of each weight: one pass backwards through the dense model, block by block.

The texts are answered by the model itself: a label is drawn from its own prediction at every token. The gradient of such an
answer's negative log likelihood, squared and averaged, is the Fisher information, which is the curvature of the divergence
from the dense model; with the text's own next tokens it would also measure how badly the model knows the text.

Two things are kept, for those weights whose stages ask for them. With G the gradient of one text of T tokens:

    Fisher diagonal    mean of G^2 / T, float32 [N, K]                          weighs codebooks (SqueezeLLM) and ranges
    cost of a row      mean of (G_n . D_n)^2 / 2T in nats per token, [N]        D = Q(W) - W at the row's few bits (MixLLM)

Memory: one block with its gradients, and what enters each block for every text. Nothing is read from the head but the
gradient of its input. The results lie in one file per block until the run is over, so that a killed run goes on.

Shape legend: N out features, K in features, T tokens of a text, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.model.experts import rows_of
from aerogel.model.runner import Activations, Runner
from aerogel.model.structure import Matrix, Structure
from aerogel.model.trim import trim
from aerogel.model.writer import disk_errors, write_tensors
from aerogel.quantize.grids import quantized
from aerogel.quantize.rows import choose_rows
from aerogel.recipes.stages import StageSpec

NEEDS = frozenset({"row_loss", "fisher"})
"""Needs that this file serves."""
Stages = Mapping[str, list[StageSpec]]


@dataclass(frozen=True)
class Gradients:
    """What was found: the rows of each weight that get more bits, and where Fisher diagonals lie.

    rows: int64 [R] by matrix name. folder: of the files, one per block.
    """

    rows: Mapping[str, Tensor]
    folder: Path

    def fisher(self, matrix: Matrix) -> Tensor | None:
        """float32 [N, K], None where no stage of the matrix asked for it."""
        found = load_file(_file(self.folder, matrix.block))
        return found.get(f"{matrix.name}.fisher")


def gradients_wanted(stages: Stages) -> bool:
    """Whether any stage asks for what is found here."""
    return any(spec.needs & NEEDS for specs in stages.values() for spec in specs)


def measure(
    structure: Structure, stages: Stages, ids_RT: Tensor, device: torch.device, folder: Path, *, seed: int, spill: Path | None
) -> Gradients:
    """Runs the texts `ids_RT` forwards and backwards through the dense model, or reads what an earlier run left in `folder`.

    spill: folder for what enters the blocks; None keeps it in memory. seed: of the labels that are drawn.
    """
    wanted = {m.name: {need for spec in stages[m.name] for need in spec.needs} & NEEDS for m in structure.matrices}
    blocks: dict[int, list[Matrix]] = {}
    for matrix in structure.matrices:
        if wanted[matrix.name] and matrix.block is not None:
            blocks.setdefault(matrix.block, []).append(matrix)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not _file(folder, min(blocks)).is_file():
        _Pass(structure, stages, ids_RT, device, spill).run(blocks, wanted, folder, seed)
    costs: dict[str, Tensor] = {}
    for index in blocks:
        found = load_file(_file(folder, index))
        costs |= {m.name: found[f"{m.name}.cost"] for m in blocks[index] if f"{m.name}.cost" in found}
    return Gradients(_chosen(structure, stages, costs), folder)


def _chosen(structure: Structure, stages: Stages, costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows by matrix: those of one stage compete with each other, wherever they are."""
    by_stage: dict[int, tuple[float, dict[str, Tensor]]] = {}
    for name, cost in costs.items():
        spec = next(spec for spec in stages[name] if "row_loss" in spec.needs)
        by_stage.setdefault(id(spec), (spec.stage.more.row_share, {}))[1][name] = cost
    widths = {m.name: m.k for m in structure.matrices}
    rows: dict[str, Tensor] = {}
    for share, mine in by_stage.values():
        rows |= choose_rows(mine, widths, share)
    return rows


def _file(folder: Path, block: int | None) -> Path:
    return folder / f"block-{block:05d}.safetensors"


class _Pass:
    """One text at a time through the model in float32: all forwards, then all backwards."""

    def __init__(self, structure: Structure, stages: Stages, ids_RT: Tensor, device: torch.device, spill: Path | None) -> None:
        self.structure, self.stages, self.spill = structure, stages, spill
        self.texts = list(torch.split(ids_RT, 1))
        self.runner = Runner(structure, lambda name: structure.reader.read(name, finite=True).to(device), torch.float32, device)

    def run(self, blocks: Mapping[int, list[Matrix]], wanted: Mapping[str, set[str]], folder: Path, seed: int) -> None:
        """Writes a file for every block that has something to keep, from the last to the first."""
        count = len(self.structure.block_names)
        entering = [Activations(self.spill) for _ in range(count + 1)]
        try:
            self.runner.prologue(self.texts, entering[0])
            for index in range(count):
                block = self.runner.load_block(index)
                for text in range(len(self.texts)):
                    entering[index + 1][text] = self.runner.run(index, block, entering[index][text])
                self.runner.release_block(index)
            pulls = self._head(entering[count], seed)
            for index in range(count - 1, min(blocks) - 1, -1):
                entering[index + 1].close()
                kept = self._block(index, entering[index], pulls, blocks.get(index, []), wanted)
                if kept:
                    write_tensors(_file(folder, index), kept)
        finally:
            for held in entering:
                held.close()

    def _head(self, leaving: Activations, seed: int) -> list[Tensor]:
        """Gradients of each text's negative log likelihood with respect to what leaves the last block."""
        draw = torch.Generator().manual_seed(seed)
        pulls = []
        with self.runner.whole_head():
            for text in range(len(self.texts)):
                hidden = leaving[text].detach().requires_grad_()
                with torch.enable_grad():
                    logits_TV = self.runner.logits(hidden)[0].float()
                    chance_T = torch.rand(len(logits_TV), generator=draw, dtype=torch.float64).to(hidden.device)
                    nn.functional.cross_entropy(logits_TV, drawn(logits_TV.detach(), chance_T), reduction="sum").backward()  # type: ignore[no-untyped-call]
                if hidden.grad is None:
                    raise BadInput("the model's loss does not depend on its last block, so rows cannot be ranked by it")
                pulls.append(hidden.grad)
        return pulls

    def _block(
        self, index: int, entering: Activations, pulls: list[Tensor], mine: list[Matrix], wanted: Mapping[str, set[str]]
    ) -> dict[str, Tensor]:
        """Takes `pulls` from behind a block to before it; returns what is kept of the weights in it."""
        block = self.runner.load_block(index)
        tokens = self.texts[0].shape[1]
        sums = [self._sums(m, wanted[m.name]) for m in mine]
        parameters = [self.structure.model.get_parameter(m.parameter).requires_grad_() for m in mine]
        for text in range(len(self.texts)):
            hidden = entering[text].detach().requires_grad_()
            args, kwargs = self.runner.arguments[index, 1]
            with torch.enable_grad():
                result = block(hidden, *args, **kwargs)
                output: Tensor = result[0] if isinstance(result, tuple) else result
                output.backward(pulls[text])  # type: ignore[no-untyped-call]
            for one, parameter in zip(sums, parameters, strict=True):
                one.add(parameter.grad)
            for parameter in parameters:  # one may hold the experts of a whole layer
                parameter.grad = None
            pulls[text] = hidden.grad if hidden.grad is not None else torch.zeros_like(hidden)
        self.runner.release_block(index)
        trim()
        return {key: value for one in sums for key, value in one.found(len(self.texts) * tokens).items()}

    def _sums(self, matrix: Matrix, wanted: set[str]) -> _Sums:
        take = rows_of(self.structure, matrix)
        if take is None:
            raise BadInput(f"{matrix.name} has no gradient of its own; leave out what needs one (rows: loss, clip: fisher)")
        w_NK = take(self.structure.model.get_parameter(matrix.parameter).data).float()
        return _Sums(matrix, take, self._error(matrix, w_NK) if "row_loss" in wanted else None, "fisher" in wanted)

    def _error(self, matrix: Matrix, w_NK: Tensor) -> Tensor:
        """Q(W) - W, rounded to nearest on the grid of the matrix' quantize stage."""
        grid = next(spec.stage.grid for spec in self.stages[matrix.name] if spec.kind == "quantize")
        return quantized(grid, w_NK, grid.fit(w_NK, None, None, "mse")).decode() - w_NK


class _Sums:
    """What is summed over the texts for one weight."""

    def __init__(self, matrix: Matrix, take: Callable[[Tensor], Tensor], error_NK: Tensor | None, fisher: bool) -> None:
        self.matrix, self.take, self.error_NK, self.fisher = matrix, take, error_NK, fisher
        self.squares_NK: Tensor | None = None
        self.cost_N: Tensor | None = None

    def add(self, gradient: Tensor | None) -> None:
        """One text; a weight that it did not reach adds nothing."""
        if gradient is None:
            return
        g_NK = self.take(gradient)
        if self.fisher:
            self.squares_NK = g_NK.square() if self.squares_NK is None else self.squares_NK.addcmul_(g_NK, g_NK)
        if self.error_NK is not None:
            cost_N = (g_NK * self.error_NK).sum(1).double().square_() / 2
            self.cost_N = cost_N if self.cost_N is None else self.cost_N + cost_N

    def found(self, tokens: int) -> dict[str, Tensor]:
        """Means per token, by stored name."""
        name, shape = self.matrix.name, (self.matrix.n, self.matrix.k)
        kept = {}
        if self.fisher:
            kept[f"{name}.fisher"] = torch.zeros(shape) if self.squares_NK is None else self.squares_NK / tokens
        if self.error_NK is not None:
            kept[f"{name}.cost"] = torch.zeros(shape[0]).double() if self.cost_N is None else self.cost_N / tokens
        return kept


def drawn(logits_TV: Tensor, chance_T: Tensor) -> Tensor:
    """A label for every token, int64 [T], drawn from the model's prediction by numbers in [0, 1)."""
    sums_TV = logits_TV.double().softmax(-1).cumsum(-1)
    wanted_T1 = (chance_T * sums_TV[:, -1])[:, None]
    return torch.searchsorted(sums_TV, wanted_T1, right=True)[:, 0].clamp_(max=logits_TV.shape[1] - 1)
