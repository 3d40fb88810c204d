from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.zoo import save

from aerogel.errors import BadInput
from aerogel.model.compress import compress
from aerogel.model.inspect import collapse, inspect
from aerogel.model.plan import plan
from aerogel.recipes.schema import Recipe

FAST = Recipe.load("w4-fast", ["quantize.group_size=16"])


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "gpt_oss"])
def test_the_plan_is_exact_and_inspect_agrees(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "dense")
    planned = plan(folder, FAST)
    report = compress(folder, FAST, tmp_path / "out")
    assert planned["size"]["bytes"] == report["size"]["bytes"]
    rows = {row["name"]: (row["fate"], row["bytes"]) for row in report["tensors"]}
    assert {row["name"]: (row["fate"], row["bytes"]) for row in planned["tensors"]} == rows
    dense, small = inspect(folder), inspect(tmp_path / "out")
    assert small["parameters"] == dense["parameters"]
    assert small["bytes"] == report["size"]["bytes"]
    assert small["bits_per_weight"] == pytest.approx(planned["size"]["bits_per_weight"])


def test_experts_are_linears(tmp_path: Path) -> None:
    rows = plan(save("mixtral", tmp_path), FAST)["tensors"]
    experts = [row for row in rows if ".experts." in row["name"]]
    assert experts
    assert all(row["fate"] == "compressed" for row in experts)
    assert all(row["fate"] == "kept" for row in rows if row["role"] == "router")


def test_a_head_that_stops_being_tied(tmp_path: Path) -> None:
    folder = save("gemma2", tmp_path)
    tied = plan(folder, FAST)
    untied = plan(folder, Recipe.load(FAST, ["quantize.ignore=[]"]))
    added = [row for row in untied["tensors"] if row["name"] == "lm_head.weight"]
    assert [row["fate"] for row in added] == ["compressed"]
    assert untied["size"]["bytes"] == tied["size"]["bytes"] + added[0]["bytes"]


def test_a_recipe_of_other_types(tmp_path: Path) -> None:
    folder = save("gemma2", tmp_path / "dense")
    full = plan(folder, FAST)["size"]["bytes"]
    half = plan(folder, Recipe.load(FAST, ["pack.dtype=bfloat16"]))["size"]["bytes"]
    assert half < full
    report = compress(folder, Recipe.load(FAST, ["pack.dtype=bfloat16"]), tmp_path / "out")
    assert report["size"]["bytes"] == half


def test_memory_and_time_are_made_of_their_parts(tmp_path: Path) -> None:
    found = plan(save("gemma2", tmp_path), "w4")
    memory, time = found["memory"], found["time"]
    parts = ("block_bytes", "activations_bytes", "statistics_bytes")
    assert memory["peak_bytes"] == sum(memory[part] for part in parts)
    assert all(memory[part] > 0 for part in parts)
    parts = ("forward_seconds", "solver_seconds", "rounding_seconds")
    assert math.isclose(time["seconds"], sum(time[part] for part in parts))


def test_no_data_needs_no_activations(tmp_path: Path) -> None:
    memory = plan(save("gemma2", tmp_path), "w8")["memory"]
    assert memory["activations_bytes"] == 0
    assert memory["statistics_bytes"] == 0


def test_a_report_that_is_broken(tmp_path: Path) -> None:
    folder = save("gemma2", tmp_path)
    (folder / "aerogel_report.json").write_text("{")
    with pytest.raises(BadInput, match=r"aerogel_report.json is not JSON"):
        inspect(folder)


def test_a_gptq_checkpoint_of_somebody_else(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    n, k, groups = 32, 64, 2
    stem = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}.qweight": torch.zeros(k // 8, n, dtype=torch.int32),
        f"{stem}.qzeros": torch.zeros(groups, n // 8, dtype=torch.int32),
        f"{stem}.scales": torch.zeros(groups, n, dtype=torch.float16),
        f"{stem}.g_idx": torch.zeros(k, dtype=torch.int32),
        f"{stem}.bias": torch.zeros(n),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert found["parameters"] == n * k + n
    assert found["quantization"]["layers"] == 1
    assert found["quantization"]["schemes"][0] == {
        "format": "gptq",
        "type": "int",
        "kind": None,
        "bits": 4,
        "strategy": None,
        "group_size": 32,
        "symmetric": True,
        "activation_bits": None,
        "activation_type": None,
        "targets": 1,
    }


def test_block_and_expert_numbers_are_collapsed() -> None:
    assert collapse("model.layers.12.mlp.experts.3.up.weight") == "model.layers.*.mlp.experts.*.up.weight"


def test_what_stands_beside_codes_is_planned_in_the_checkpoint_s_type(tmp_path: Path) -> None:
    """Scales of rows of more bits are bfloat16 as the others are; what data decide is not called exact."""
    folder = save("llama", tmp_path, dtype=torch.bfloat16)
    rows = ["quantize.group_size=16", "quantize.rows=loss", "quantize.row_share=0.5", "quantize.row_bits=6"]
    size = plan(folder, Recipe.load("w4", rows))["size"]
    assert size == plan(folder, Recipe.load("w4", [*rows, "quantize.scale_dtype=bfloat16"]))["size"]
    assert size["basis"] == "about: rows of more bits counted at the same share of every weight"
    assert plan(folder, FAST)["size"]["basis"] == "exact"
    assert plan(folder, Recipe.load("lossless"))["size"]["basis"] == "before entropy coding"
