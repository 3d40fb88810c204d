"""What the loss feels of each weight, block by block: equal to whole-model autograd, and true to the divergence it predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import zoo
from tests.model.tiny import ids_file, recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

from aerogel.errors import BadInput
from aerogel.model.calibration import load_tokens
from aerogel.model.experts import rows_of
from aerogel.model.gradients import Gradients, drawn, measure
from aerogel.model.plan import plan
from aerogel.model.structure import Structure, discover
from aerogel.quantize.grids import IntGrid, quantized
from aerogel.recipes.assign import assign

STAGE = {"quantize": {"method": "gptq", "bits": 3, "group_size": 16, "rows": "loss", "row_bits": 6, "clip": "fisher"}}


def run(dense: Path, tmp_path: Path, rows: int = 4) -> tuple[Structure, Gradients, Tensor]:
    structure = discover(dense)
    chosen = recipe(ids_file(tmp_path), STAGE)
    ids = load_tokens(ids_file(tmp_path), lambda: None, rows=rows, length=16, seed=0).ids
    stages = assign(chosen.stages, structure.modules)
    folder = tmp_path / "gradients"
    return structure, measure(structure, stages, ids, torch.device("cpu"), folder, seed=0, spill=None), ids


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_equal_to_autograd_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    dense = zoo.save(kind, tmp_path / "dense")
    structure, found, ids = run(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    squares: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}
    matrices = [m for m in structure.matrices if m.block is not None and m.kind in ("Linear", "Conv1D", "Expert")]
    takes = {m.name: rows_of(structure, m) for m in matrices}
    for m in matrices:  # what is taken out of the model's parameter is what the file has
        assert torch.equal(takes[m.name](model.get_parameter(m.parameter)), m.take(structure.reader.read(m.tensor)).float())
    for text in ids:
        logits = model(input_ids=text[None]).logits[0]
        labels = drawn(logits.detach(), torch.rand(16, generator=draw, dtype=torch.float64))
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for m in matrices:
            parameter = model.get_parameter(m.parameter)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            g, w = takes[m.name](gradient), takes[m.name](parameter.detach())
            grid = IntGrid(bits=3, group_size=16)
            error = quantized(grid, w, grid.fit(w, None, None, "mse")).decode() - w
            squares[m.name] = squares.get(m.name, 0) + g.square() / ids.numel()
            costs[m.name] = costs.get(m.name, 0) + (g * error).sum(1).double().square() / 2 / ids.numel()
    for m in matrices:
        fisher = found.fisher(m)
        assert fisher is not None
        torch.testing.assert_close(fisher, squares[m.name], rtol=2e-3, atol=1e-3 * float(squares[m.name].max()))
    least_chosen = min(float(costs[n][r].min()) / w for n, r, w in _rows(structure, found) if len(r))
    left = [(costs[n][~mask(len(costs[n]), r)], w) for n, r, w in _rows(structure, found) if len(r) < len(costs[n])]
    most_left = max(float(cost.max()) / w for cost, w in left)
    assert most_left < least_chosen * 1.01


def _rows(structure: Structure, found: Gradients) -> list[tuple[str, Tensor, int]]:
    return [(m.name, found.rows[m.name], m.k) for m in structure.matrices if m.name in found.rows]


def mask(N: int, rows: Tensor) -> Tensor:
    return torch.zeros(N, dtype=torch.bool).index_fill(0, rows, True)


def test_the_cost_of_a_row_is_the_divergence_that_rounding_it_causes(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    structure, found, _ = run(dense, tmp_path, rows=8)
    ids = load_tokens(ids_file(tmp_path), lambda: None, rows=8, length=16, seed=0).ids
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    chosen = next(m for m in structure.matrices if m.name in found.rows and "down_proj" in m.name)
    cost = load_file(found.folder / f"block-{chosen.block:05d}.safetensors")[f"{chosen.name}.cost"]
    weight = model.get_parameter(chosen.parameter).data
    grid = IntGrid(bits=3, group_size=16)
    rounded = quantized(grid, weight.float(), grid.fit(weight.float(), None, None, "mse")).decode().double()
    with torch.no_grad():
        p = model(input_ids=ids).logits.log_softmax(-1)
        kept = weight.clone()
        divergence = []
        for row in range(len(weight)):
            weight[row] = rounded[row]
            q = model(input_ids=ids).logits.log_softmax(-1)
            divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
            weight[row] = kept[row]
    measured = torch.tensor(divergence, dtype=torch.float64)
    # Eight texts tell each row's cost to a factor of about two, the sum of all rows much better.
    assert 0.6 < float(cost.sum() / measured.sum()) < 1.7
    ranks = torch.stack([cost.argsort().argsort(), measured.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.5


def test_a_killed_run_reads_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    _, first, _ = run(dense, tmp_path)
    monkeypatch.setattr("aerogel.model.gradients._Pass", None)
    _, again, _ = run(dense, tmp_path)
    assert all(torch.equal(first.rows[name], again.rows[name]) for name in first.rows)


def test_labels_follow_the_prediction() -> None:
    logits_TV = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20000, 1)
    labels = drawn(logits_TV, torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(labels, minlength=3) / 20000
    torch.testing.assert_close(share, logits_TV[0].softmax(0), atol=0.01, rtol=0)


def test_the_head_is_refused(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    stage = {"quantize": {**STAGE["quantize"], "ignore": []}}
    with pytest.raises(BadInput, match="no gradient of its own"):
        plan(dense, recipe(ids_file(tmp_path), stage))
