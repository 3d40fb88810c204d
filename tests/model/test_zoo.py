"""Every architecture, from a dense checkpoint through compression and back, with every byte accounted for."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.tiny import GPTQ, RTN, digest, error, ids_file, logits, recipe
from transformers import AutoModelForCausalLM

import aerogel
from aerogel.errors import BadInput, RunFailed
from aerogel.model.compress import compress
from aerogel.model.plan import plan
from aerogel.model.reader import CheckpointReader
from aerogel.model.structure import discover
from aerogel.pack.config import choose_format
from aerogel.pack.export import export_dense
from aerogel.quantize.grids import IntGrid

MOE = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
EXPERTS_PER_BLOCK = 4
IGNORED = {"opt": ["lm_head", "re:.*project_"], "gpt_neox": ["embed_out"]}


@dataclass
class Case:
    dense: Path
    out: Path
    exported: Path
    recipe: Any
    report: dict[str, Any]
    grid: IntGrid


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compresses an architecture once per module: `case("llama")`, `case("llama", "rtn", 8, "bfloat16")`."""

    @functools.cache
    def make(name: str, method: str = "gptq", bits: int = 4, dtype: str = "float32") -> Case:
        folder = tmp_path_factory.mktemp(f"{name}-{method}")
        dense = zoo.save(name, folder / "dense", dtype=getattr(torch, dtype))
        stage = json.loads(json.dumps(GPTQ if method == "gptq" else RTN))
        stage["quantize"] |= {"bits": bits, "ignore": IGNORED.get(name, ["lm_head"])}
        chosen = recipe(ids_file(folder), stage)
        report = compress(dense, chosen, folder / "out")
        exported = export_dense(folder / "out", folder / "exported")
        grid = IntGrid(bits=bits, group_size=16, scale_dtype=getattr(torch, dtype))
        return Case(dense, folder / "out", exported, chosen, report, grid)

    return make


def check(made: Case, tolerance: float) -> None:
    """Logits through both ways of loading equal those of the dense export; its weights are the decoded ones, bit for bit."""
    wanted = logits(AutoModelForCausalLM.from_pretrained(made.exported, dtype="auto", experts_implementation="eager"))
    assert error(logits(aerogel.load(made.out)), wanted) <= tolerance
    assert error(logits(AutoModelForCausalLM.from_pretrained(made.out, dtype="auto")), wanted) <= tolerance
    structure = discover(made.dense)
    stored, exported, source = (CheckpointReader(p) for p in (made.out, made.exported, made.dense))
    assert set(exported.names) == set(source.names)
    coded = {}
    form = choose_format(made.grid, "none")
    layers = {row["name"]: row for block in made.report["blocks"] for row in block["layers"]}
    for m in structure.matrices:
        if m.name not in layers:
            continue
        start = f"{m.name}."
        local = {n.removeprefix(start): stored.read(n) for n in stored.names if n.startswith(start) and n != f"{start}bias"}
        decoded = form.decode(local, made.grid).to(source.entry(m.tensor).dtype)
        assert torch.equal(m.take(exported.read(m.tensor)), decoded), m.name
        assert layers[m.name]["bytes"] == sum(t.nbytes for t in local.values())
        coded[m.tensor] = coded.get(m.tensor, 0) + 1
    for entry in source:
        if entry.name in coded:
            slices = entry.shape[0] if len(entry.shape) == 3 else 1
            assert coded[entry.name] == slices, entry.name
        else:
            assert torch.equal(exported.read(entry.name), source.read(entry.name)), entry.name


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "gptq") for name in zoo.ZOO), *((name, "rtn") for name in ("llama", "gpt2", "mixtral"))]
)
def test_what_loads_is_what_was_stored(case: Any, name: str, method: str) -> None:
    check(case(name, method), 2e-5)


@pytest.mark.parametrize(
    ("name", "bits", "dtype"), [("llama", 8, "bfloat16"), ("mixtral", 8, "float32"), ("gpt2", 4, "bfloat16")]
)
def test_other_widths_and_types(case: Any, name: str, bits: int, dtype: str) -> None:
    check(case(name, "gptq", bits, dtype), 2e-5 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_tensor_and_every_byte_is_accounted_for(case: Any, name: str) -> None:
    made = case(name)
    rows = {row["name"]: row for row in made.report["tensors"]}
    source, stored = CheckpointReader(made.dense), CheckpointReader(made.out)
    assert set(source.names) <= set(rows)
    assert all(row["why"] and row["fate"] in ("compressed", "kept") for row in rows.values())
    assert sum(row["bytes"] for row in rows.values()) == stored.nbytes == made.report["size"]["bytes"]
    assert sum(row["source_bytes"] for row in rows.values()) == source.nbytes == made.report["size"]["source_bytes"]
    planned = plan(made.dense, made.recipe)
    assert planned["size"]["bytes"] == stored.nbytes
    assert {row["name"]: row["bytes"] for row in planned["tensors"]} == {n: row["bytes"] for n, row in rows.items()}
    compressed = {row["name"] for row in rows.values() if row["fate"] == "compressed"}
    structure = discover(made.dense)
    inside = {m.tensor for m in structure.matrices if m.block is not None}
    assert inside <= compressed
    assert all(math.isfinite(block["relative_error"]) for block in made.report["blocks"][:-1])


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_tied_embeddings_stay_tied(case: Any, name: str) -> None:
    made = case(name)
    dense, found = zoo.build(name), aerogel.load(made.out)
    tied = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (dense, found)]
    assert tied[0] == tied[1] == bool(zoo.ZOO[name].get("tie_word_embeddings", dense.config.tie_word_embeddings))


@pytest.mark.parametrize("name", MOE)
def test_the_report_says_how_many_tokens_each_expert_saw(case: Any, name: str) -> None:
    report = case(name).report
    by_block: dict[int, list[dict[str, Any]]] = {}
    for row in report["experts"]:
        by_block.setdefault(row["block"], []).append(row)
    blocks = [1] if name == "deepseek_v3" else [0, 1]
    assert sorted(by_block) == blocks
    for rows in by_block.values():
        assert len(rows) == 2  # gate with up, and down
        for row in rows:
            assert len(row["tokens"]) == EXPERTS_PER_BLOCK
            assert sum(row["tokens"]) == 2 * 128, "every token is routed to two experts"


def test_starved_experts_are_shown_all_tokens(tmp_path: Path) -> None:
    dense = zoo.save("mixtral", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ, min_expert_tokens=128)
    report = compress(dense, chosen, tmp_path / "out")
    assert any(tokens < 128 for row in report["experts"] for tokens in row["tokens"])
    experts = [row for block in report["blocks"] for row in block["layers"] if ".experts." in row["name"]]
    assert len(experts) == 2 * 3 * EXPERTS_PER_BLOCK
    assert all(row["method"] == "gptq" and 0 < row["loss"] < 0.1 for row in experts)


@pytest.mark.parametrize("name", MOE)
def test_a_starved_expert_fails_the_run_when_routing_is_binding(tmp_path: Path, name: str) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ, experts="routed", min_expert_tokens=128)
    with pytest.raises(
        RunFailed, match=r"expert \d of model\.layers\.[01]\.mlp\.experts\.\w+ saw \d+ .*min_expert_tokens=128"
    ) as caught:
        compress(dense, chosen, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_shards_in_the_source_change_nothing(case: Any, tmp_path: Path, name: str) -> None:
    whole = case(name)
    dense = zoo.save(name, tmp_path / "dense", shard="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 2
    compress(dense, whole.recipe, tmp_path / "out")
    found, wanted = digest(tmp_path / "out"), digest(whole.out)
    assert found.keys() == wanted.keys()
    assert {file for file in found if found[file] != wanted[file]} == {"aerogel_report.json"}  # holds the fingerprint


def test_a_linear_outside_the_blocks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    dense = zoo.save("opt", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    for act in (lambda: plan(dense, chosen), lambda: compress(dense, chosen, tmp_path / "out")):
        with pytest.raises(BadInput, match=r"model\.decoder\.project_(in|out) lies outside the blocks"):
            act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "ids.safetensors"]
