"""Who loads a checkpoint is said before the work, is true of what config.json says, and comes with what to write instead."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.tiny import logits, recipe
from tests.zoo import SMALL, ZOO, save

from aerogel.errors import BadInput
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.model.plan import plan

EVERYONE = ["aerogel", "transformers", "vLLM", "SGLang"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 96 and 160 columns; outputs of q, k, v: 96, 48, 48."""
    sizes = {**SMALL, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "llama", sizes)
        return save("llama", tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


def rtn(**numbers: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **numbers}}


def why(found: dict[str, Any]) -> str:
    return " | ".join(f"{row['in']} {row['why']}; {row['instead']}" for row in found["loads"]["not"])


@pytest.mark.parametrize(
    ("numbers", "loaders", "said"),
    [
        ({"bits": 4, "group_size": 32}, EVERYONE, []),
        ({"bits": 4}, EVERYONE, []),
        ({"format": "nvfp4"}, EVERYONE, []),
        ({"format": "mx"}, EVERYONE[:3], ["['SGLang'] it does not read mxfp4-pack-quantized"]),
        ({"format": "mx", "kind": "e4m3"}, EVERYONE[:3], ["['SGLang'] it does not read mxfp8-quantized"]),
        ({"format": "fp8", "activations": "fp8"}, EVERYONE, []),
        ({"bits": 4, "group_size": 64}, EVERYONE[:1], ["groups of 64 do not divide 96 and 160 inputs", "group_size: 32,"]),
        ({"bits": 4, "group_size": 24}, EVERYONE[:1], ["groups of 24 do not divide 160 inputs", "group_size: 16,"]),
        (
            {"format": "fp8", "strategy": "block", "activations": "fp8"},
            EVERYONE[:1],
            ["blocks of 128 do not divide 96 and 160 inputs", "strategy: channel"],
        ),
        (
            {"format": "fp8", "strategy": "block"},
            EVERYONE[:2],
            ["blocks of 128 do not divide 96", "stacked with others", "and 2 more", "strategy: channel", "activations: fp8"],
        ),
        ({"bits": 3, "group_size": 32}, EVERYONE[:3], ["['SGLang'] it unpacks 4 and 8 bits only"]),
        ({"bits": 2, "group_size": 32, "symmetric": False}, EVERYONE[:3], ["['SGLang'] it unpacks 4 and 8 bits only"]),
        ({"bits": 4, "group_size": 32, "activations": "int8"}, EVERYONE[:3], ["['SGLang'] with rounded inputs", "w8a8"]),
        ({"bits": 8, "group_size": None, "activations": "int8"}, EVERYONE, []),
        ({"format": "fp8", "strategy": "tensor"}, EVERYONE, []),
        (
            {"format": "fp8", "strategy": "tensor", "activations": "fp8"},
            EVERYONE[:2],
            ["rounds the weights again (", " and 1 more)", "strategy: channel (recipe w8a8-fp8)"],
        ),
        ({"format": "nf4", "group_size": 32}, EVERYONE[:1], ["no standard has table-packed"]),
        ({"bits": 4, "group_size": 32, "transform": "hadamard", "transform_block": 32}, EVERYONE[:1], ["rotations"]),
    ],
    ids=str,
)
def test_who_loads(llama: Path, tmp_path: Path, numbers: dict[str, Any], loaders: list[str], said: list[str]) -> None:
    """The plan says it, the report repeats it, and `quant_method` is compressed-tensors just where transformers is named."""
    wanted = recipe(None, rtn(**numbers))
    found = plan(llama, wanted)
    assert found["loads"]["in"] == loaders
    for words in said:
        assert words in why(found)
    report = compress(llama, wanted, tmp_path / "out")
    assert report["loads"] == found["loads"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("compressed-tensors" if "transformers" in loaders else "aerogel")
    assert logits(load(tmp_path / "out", dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize(
    ("refused", "said", "advised"),
    [
        (
            {"bits": 4, "group_size": 32, "activations": "int8-static"},
            "w8a8-static",
            {"bits": 8, "group_size": None, "activations": "int8-static"},
        ),
        (
            {"format": "fp8", "strategy": "block"},
            "activations: fp8",
            {"format": "fp8", "strategy": "block", "activations": "fp8"},
        ),
    ],
    ids=["integers with static inputs", "blocks of weights alone"],
)
def test_what_servers_refuse_of_any_shape(llama: Path, refused: dict[str, Any], said: str, advised: dict[str, Any]) -> None:
    """vLLM 0.32 stops: no scheme for the first, an assertion in its own code for the second. What is written instead loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "llama", {**SMALL, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 1})
        whole = save("llama", llama.parent / "whole")
    found = plan(whole, recipe(None, rtn(**refused)))
    assert found["loads"]["in"] == EVERYONE[:2]
    (row,) = found["loads"]["not"]
    assert row["shown"] and said in row["instead"]
    assert plan(whole, recipe(None, rtn(**advised)))["loads"]["in"] == EVERYONE


def test_servers_find_the_head_by_its_name(llama: Path, tmp_path: Path) -> None:
    """To them it is no Linear: vLLM 0.32 stops at `lm_head.weight_packed` where the config's only target is that class."""
    compress(llama, recipe(None, rtn(bits=4, group_size=32, ignore=[])), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"] and config["ignore"] == []
    assert logits(load(tmp_path / "out", dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("group_size", [64, 24])
def test_the_advice_is_good(llama: Path, group_size: int) -> None:
    """What is written instead loads everywhere."""
    (row,) = plan(llama, recipe(None, rtn(bits=4, group_size=group_size)))["loads"]["not"]
    advised = int(row["instead"].split("group_size: ")[1].split(",")[0])
    assert advised < group_size
    assert plan(llama, recipe(None, rtn(bits=4, group_size=advised)))["loads"] == {"in": EVERYONE, "not": []}


def test_widths_without_a_common_group(llama: Path) -> None:
    """40 and 49 have no common divisor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "llama", {**SMALL, "hidden_size": 40, "intermediate_size": 49, "num_hidden_layers": 1})
        odd = save("llama", llama.parent / "odd")
    found = plan(odd, recipe(None, rtn(bits=4, group_size=32)))
    assert "group_size: null" in why(found)
    assert plan(odd, recipe(None, rtn(bits=4)))["loads"]["in"] == EVERYONE


def test_formats_of_one_group_size_name_what_else_there_is(llama: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "llama", {**SMALL, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 1})
        ragged = save("llama", llama.parent / "ragged")
    for numbers in ({"format": "mx"}, {"format": "nvfp4"}, {"format": "mx", "kind": "e4m3"}):
        found = plan(ragged, recipe(None, rtn(**numbers)))
        assert found["loads"]["in"] == EVERYONE[:1]
        assert "do not divide 72 inputs" in why(found) and "w8-fp8" in why(found)


def test_linears_that_servers_stack(llama: Path) -> None:
    """q, k and v of unlike widths: transformers loads them, servers do not."""
    stages = [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 32, "targets": ["re:.*[qv]_proj"]}},
        {"quantize": {"method": "rtn", "bits": 8, "group_size": 32, "targets": ["re:.*(k|o|up|gate|down)_proj"]}},
    ]
    found = plan(llama, recipe(None, *stages))
    assert found["loads"]["in"] == EVERYONE[:2]
    assert "q_proj + k_proj + v_proj" in why(found)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"bits": 4, "group_size": 32}, ""),
        ({"bits": 4, "group_size": 32, "activations": "int8"}, "packed integers without rounded inputs only"),
        ({"bits": 8, "group_size": None, "activations": "int8"}, ""),
        ({"bits": 8, "group_size": None, "activations": "int8-static"}, "a scale per token of inputs only"),
        ({"format": "fp8"}, "FP8 with rounded inputs only"),
        ({"format": "fp8", "activations": "fp8"}, ""),
        ({"format": "fp8", "activations": "fp8-static"}, ""),
        ({"format": "nvfp4"}, ""),
    ],
    ids=str,
)
def test_experts_that_vllm_does_not_run(tmp_path: Path, numbers: dict[str, Any], said: str) -> None:
    """It has kernels for these in linears."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "mixtral", {**ZOO["mixtral"], "intermediate_size": 64})
        experts = save("mixtral", tmp_path / "mixtral")
    found = plan(experts, recipe(None, rtn(**numbers)))
    rows = [row for row in found["loads"]["not"] if "it reads experts in" in row["why"]]
    assert [row["in"] for row in rows] == ([["vLLM"]] if said else [])
    assert ("vLLM" in found["loads"]["in"]) == (not said)
    if said:
        assert said in rows[0]["why"] and "experts.0.w1" in rows[0]["why"]


def test_a_format_asked_for_by_name_is_refused(llama: Path, tmp_path: Path) -> None:
    """It is for servers, and they would not load it: before any work, with what to write."""
    ragged = recipe(None, rtn(bits=4, group_size=64), pack={"format": "pack-quantized"})
    for run in (lambda: plan(llama, ragged), lambda: compress(llama, ragged, tmp_path / "out")):
        with pytest.raises(BadInput, match=r"pack-quantized.*96 and 160 inputs.*quantize.group_size: 32.*pack.format: auto"):
            run()
    assert not (tmp_path / "out").exists()
    whole = recipe(None, rtn(bits=4, group_size=32), pack={"format": "pack-quantized"})
    assert plan(llama, whole)["loads"]["in"] == EVERYONE


def test_what_pack_makes_of_the_files(llama: Path) -> None:
    for pack, words in (({"layout": "native-cpu"}, "layout native-cpu"), ({"entropy": True}, "entropy coded")):
        found = plan(llama, recipe(None, rtn(bits=4, group_size=32), pack=pack))
        assert found["loads"]["in"] == EVERYONE[:1] and words in why(found)


def test_only_surprises_are_warned_of(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A short last group is no part of the recipe; a rotation is, and rules other loaders out by itself. Before any block."""
    said: list[str] = []

    def watch(*_: object) -> None:
        said.append(caplog.text)

    rotated = {"transform": "hadamard", "transform_block": 32}
    with caplog.at_level(logging.WARNING, logger="aerogel"):
        for name, more in (("shown", rotated), ("surprise", {})):
            compress(llama, recipe(None, rtn(bits=4, group_size=64, **more)), tmp_path / name, progress=watch)
    first = len(said) // 2  # of the second run, before any block
    assert not said[first - 1]
    assert "loads in aerogel only" in said[first] and "group_size: 32" in said[first]
