"""Merged linears: the same outputs, the same state dict, codes and dense weights of every part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo import build, save

from aerogel.errors import BadInput
from aerogel.kernels.decode.merge import Merged, Part, merge, merging
from aerogel.kernels.linear import Linear

IDS = torch.arange(3, 17).reshape(2, 7)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "groups"), [("llama", 4), ("qwen2", 4), ("gemma3_text", 6), ("opt", 2), ("phi3", 0), ("deepseek_v3", 4)]
)
def test_dense_groups_are_found_and_nothing_changes(name: str, groups: int) -> None:
    model = build(name)
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    found = merge(model)
    assert len(found) == groups
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert merge(model) == [], "a second time finds nothing"


def test_the_groups_of_a_llama_are_qkv_and_gate_up() -> None:
    found = merge(build("llama"))
    assert [name.rpartition(".")[2] for name in found[0] + found[1]] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


def test_a_merged_model_moves_and_casts(tmp_path: Path) -> None:
    model = build("qwen2")
    before = logits(model)
    merge(model)
    model.double()
    assert logits(model).dtype == torch.float64
    assert torch.allclose(logits(model).float(), before, rtol=1e-4, atol=1e-5)
    model.float().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(logits(again), before, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_parts() -> None:
    model: Any = build("llama")
    merge(model)
    model(input_ids=IDS).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module", params=["w4-fast", "w8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from aerogel.model.compress import compress
    from aerogel.recipes.schema import Recipe

    folder = tmp_path_factory.mktemp("packed")
    overrides = ["quantize.group_size=16"] if request.param == "w4-fast" else []
    compress(save("llama", folder / "dense"), Recipe.load(request.param, overrides), folder / "out")
    return folder / "out"


def test_packed_parts_keep_their_codes_weights_and_state(packed: Path) -> None:
    from aerogel.model.loading import load

    apart, together = load(packed), load(packed, merge=True)
    assert torch.allclose(logits(together), logits(apart), rtol=1e-3, atol=1e-4)
    parts = {name: module for name, module in together.named_modules() if isinstance(module, Part)}
    assert len(parts) == 10
    assert sum(isinstance(module, Merged) for module in together.modules()) == 4
    for name, part in parts.items():
        alone: Any = apart.get_submodule(name)
        assert torch.equal(part.dequantize(), alone.dequantize())
        assert torch.equal(part.columns().codes.values_NK, alone.columns().codes.values_NK)
        alone.restore()
        assert {key: tensor.shape for key, tensor in part.stored().items()} == {
            key: tensor.shape for key, tensor in alone.named_buffers()
        }
        assert all(torch.equal(tensor, alone.get_buffer(key)) for key, tensor in part.stored().items())
        alone.prepare()
    state = together.state_dict()
    assert not [name for name in state if ".merged." in name]
    assert torch.equal(
        state["model.layers.0.mlp.up_proj.weight_scale"], parts["model.layers.0.mlp.up_proj"].stored()["weight_scale"]
    )
    with pytest.raises(BadInput, match="merged with its siblings"):
        together.load_state_dict(state)


def test_merging_later_gives_the_same(packed: Path) -> None:
    from transformers import AutoModelForCausalLM

    from aerogel.model.loading import load

    before = logits(load(packed, merge=True))
    later = load(packed)
    assert len(merge(later)) == 4
    assert torch.equal(logits(later), before)
    with merging():
        model = AutoModelForCausalLM.from_pretrained(packed)
    assert sum(isinstance(module, Merged) for module in model.modules()) == 4
    later.to(torch.bfloat16)
    whole = next(module for module in later.modules() if isinstance(module, Merged))
    assert whole.compute_dtype == torch.bfloat16
    assert all(module.kernel_name for module in later.modules() if isinstance(module, Linear))
