"""Checkpoints as ModelOpt 0.47 was seen to write them (`make peer-test PEERS=modelopt`), made here from the equations alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.test_direct import PROMPTS, steps
from tests.model.test_loading import close, logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from aerogel.errors import BadInput
from aerogel.kernels.experts import ExpertLinear
from aerogel.kernels.linear import Linear
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.direct import load_to_decode
from aerogel.model.inspect import inspect
from aerogel.model.loading import load
from aerogel.model.structure import discover
from aerogel.pack.export import export_dense
from aerogel.pack.scheme import NotServed

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors of a weight by local name, and what they decode to, float32 [N, K]."""


def int4(w_NK: Tensor, group: int = 16) -> Stored:
    grouped = w_NK.unflatten(1, (-1, group))
    scale = grouped.abs().amax(2) / 7
    q = (grouped / scale[..., None]).round().clamp(-8, 7).flatten(1)
    low, high = q[0::2].to(torch.int8) & 15, q[1::2].to(torch.int8) & 15
    return {"weight": (low | high << 4).view(torch.uint8), "weight_scale": scale}, q * scale.repeat_interleave(group, 1)


def int8(w_NK: Tensor) -> Stored:
    scale = w_NK.abs().amax(1) / 127
    q = (w_NK / scale[:, None]).round()
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale[:, None]


def pairs(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    code = (w_NK[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return code[:, 0::2] | code[:, 1::2] << 4, E2M1[code.long()]


def nvfp4(w_NK: Tensor, group: int = 16, second: Tensor | None = None) -> Stored:
    second = w_NK.abs().max() / (6 * 448) if second is None else second
    scale = (w_NK.unflatten(1, (-1, group)).abs().amax(2) / 6 / second).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    unit = (scale.float() * second).repeat_interleave(group, 1)
    packed, f = pairs(w_NK / unit)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": second}, f * unit


def exponents(w_NK: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    exponent = (w_NK.unflatten(1, (-1, 32)).abs().amax(2) / largest).log2().ceil()
    return (exponent + 127).to(torch.uint8), torch.exp2(exponent).repeat_interleave(32, 1)


def mxfp4(w_NK: Tensor) -> Stored:
    scale, unit = exponents(w_NK, 6)
    packed, f = pairs(w_NK / unit)
    return {"weight": packed, "weight_scale": scale}, f * unit


def mxfp8(w_NK: Tensor) -> Stored:
    scale, unit = exponents(w_NK, 448)
    f = (w_NK / unit).to(torch.float8_e4m3fn)
    return {"weight": f, "weight_scale": scale}, f.float() * unit


def fp8(w_NK: Tensor) -> Stored:
    scale = w_NK.abs().max() / 448
    f = (w_NK / scale).to(torch.float8_e4m3fn)
    return {"weight": f, "weight_scale": scale}, f.float() * scale


def fp8_in_one_block(w_NK: Tensor) -> Stored:
    """All of a weight in one block: ModelOpt then drops the axes of its scale."""
    return fp8(w_NK)


def save(
    folder: Path,
    store: Callable[[str, Tensor], Stored],
    smooth: Callable[[str], bool] = lambda name: False,
    name: str = "llama",
    **config: Any,
) -> tuple[Path, Path]:
    """A checkpoint in ModelOpt's layout, and a dense one with what it decodes to.

    store: of the name of a weight and the weight. smooth: which weights have a pre_quant_scale.
    """
    dense = zoo.save(name, folder / "dense", dtype=torch.bfloat16)
    held = load_file(dense / "model.safetensors")
    packed, decoded = dict(held), dict(held)
    generator = torch.Generator().manual_seed(1)
    for tensor_name in [n for n in held if n.endswith("proj.weight")]:
        stem = tensor_name.removesuffix(".weight")
        tensors, w_NK = store(stem, held[tensor_name].float())
        if smooth(stem):
            tensors["pre_quant_scale"] = torch.rand(w_NK.shape[1], generator=generator).add(0.5).bfloat16()
            w_NK = w_NK * tensors["pre_quant_scale"].float()
        packed |= {f"{stem}.{local}": tensor.clone() for local, tensor in tensors.items()}
        decoded[tensor_name] = w_NK.contiguous()
    out, wanted = folder / "packed", folder / "wanted"
    for path, contents in ((out, packed), (wanted, decoded)):
        path.mkdir()
        save_file(contents, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text((dense / "config.json").read_text())
    words = json.loads((dense / "config.json").read_text())
    words["quantization_config"] = {
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt"},
        "quant_method": "modelopt",
        **config,
    }
    (out / "config.json").write_text(json.dumps(words))
    return out, wanted


def late(name: str) -> bool:
    """What ModelOpt cannot multiply into a norm."""
    return name.endswith(("o_proj", "down_proj"))


CASES: dict[str, tuple[Callable[[Tensor], Stored], str, float]] = {
    "W4A16_AWQ": (int4, "pack-quantized", 4),
    "W4A8_AWQ": (
        lambda w: ({**int4(w)[0], "weight_scale_2": torch.tensor(0.01), "input_scale": torch.tensor(0.1)}, int4(w)[1]),
        "pack-quantized",
        4,
    ),
    "W8A16": (int8, "int-quantized", 8),
    "W8A8_SQ_PER_CHANNEL": (int8, "int-quantized", 8),
    "NVFP4_AWQ": (nvfp4, "table-packed", 4),
    "W4A16_NVFP4": (nvfp4, "table-packed", 4),
    "W4A8_NVFP4_FP8": (lambda w: nvfp4(w, 32), "table-packed", 4),
    "mxfp4": (mxfp4, "mxfp4-pack-quantized", 4),
    "W4A8_MXFP4_FP8": (mxfp4, "mxfp4-pack-quantized", 4),
    "MXFP8": (mxfp8, "mxfp8-quantized", 8),
    "fp8_pb_wo": (fp8_in_one_block, "float-quantized", 8),
    "fp8_pb_real": (fp8_in_one_block, "float-quantized", 8),
}


@pytest.fixture(autouse=True)
def whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs in whole groups of 32."""
    monkeypatch.setitem(zoo.ZOO, "llama", {**zoo.ZOO["llama"], "intermediate_size": 64})


@pytest.mark.parametrize("algorithm", CASES)
def test_what_modelopt_writes_loads_packed_and_decodes_to_its_equation(tmp_path: Path, algorithm: str) -> None:
    store, kept, bits = CASES[algorithm]
    packed, wanted = save(tmp_path, lambda _, w: store(w), late, quant_algo=algorithm)
    model = load(packed, dtype=torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert len(layers) == 14 and {layer.scheme.format for layer in layers.values()} == {kept}
    assert {name for name, layer in layers.items() if isinstance(layer, SidecarLinear)} == {n for n in layers if late(n)}
    dense = load_file(wanted / "model.safetensors")
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.float32), dense[f"{name}.weight"]), name
    reference = AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32)
    close(logits(model), logits(reference), 2e-5)
    exported = load_file(export_dense(packed, tmp_path / "exported") / "model.safetensors")
    assert exported.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.equal(exported[name], tensor.bfloat16()), name
    facts = inspect(packed)
    assert facts["parameters"] == sum(tensor.numel() for tensor in dense.values())
    assert facts["quantization"]["layers"] == 14 and bits < facts["bits_per_weight"] < bits + 3
    assert facts["quantization"]["beside"]["factors of inputs"] == 4


def test_merged_linears_multiply_their_inputs_once_and_only_where_they_share_them(tmp_path: Path) -> None:
    factor = torch.linspace(0.5, 1.5, 32).bfloat16()

    def store(name: str, w: Tensor) -> Stored:
        tensors, w = int4(w)
        if "self_attn" not in name or late(name):
            return tensors, w
        mine = factor if "layers.0" in name else factor.roll("qkv".index(name[-6]))
        return {**tensors, "pre_quant_scale": mine}, w * mine.float()

    packed, wanted = save(tmp_path, store, quant_algo="W4A16_AWQ")
    apart, merged = load(packed, dtype=torch.float32), load(packed, dtype=torch.float32, merge=True)
    names = [type(block.self_attn.q_proj).__name__ for block in merged.model.layers]
    assert names == ["PartBeside", "SidecarLinear"]  # one for all three, and three that differ
    close(logits(merged), logits(apart), 1e-6)
    close(logits(merged), logits(AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32)), 2e-5)


def test_factors_of_inputs_come_before_their_rounding(tmp_path: Path) -> None:
    unit = torch.tensor(4 / 127)
    packed, _ = save(
        tmp_path, lambda _, w: ({**int8(w)[0], "input_scale": unit}, int8(w)[1]), late, quant_algo="W8A8_SQ_PER_CHANNEL"
    )
    model = load(packed, dtype=torch.float32)
    held, x = load_file(packed / "model.safetensors"), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj"
    seen = (x * held[f"{name}.pre_quant_scale"].float() / unit).round().clamp(-127, 127) * unit
    w_NK = held[f"{name}.weight"].float() * held[f"{name}.weight_scale"][:, None]
    close(model.get_submodule(name)(x), seen @ w_NK.T, 1e-5)


def test_a_factor_that_is_not_positive_or_has_another_length_is_damage(tmp_path: Path) -> None:
    for place, damaged in enumerate((torch.zeros(32), torch.ones(31), torch.full((32,), torch.inf))):
        packed, _ = save(
            tmp_path / str(place),
            lambda name, w, factor=damaged: ({**int4(w)[0], **({"pre_quant_scale": factor} if "o_proj" in name else {})}, w),
            quant_algo="W4A16_AWQ",
        )
        with pytest.raises(BadInput, match=r"pre_quant_scale of model\.layers\.0\.self_attn\.o_proj is .* not 32 positive"):
            load(packed)


def test_a_mixed_checkpoint_that_lists_experts_as_one_module(tmp_path: Path) -> None:
    def store(name: str, w: Tensor) -> Stored:
        return nvfp4(w) if ".experts." in name else fp8(w)

    listed = {f"model.layers.{i}.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in (0, 1)}
    listed |= {f"model.layers.{i}.self_attn.{p}_proj": {"quant_algo": "FP8"} for i in (0, 1) for p in "qkvo"}
    packed, wanted = save(tmp_path, store, name="qwen3_moe", quant_algo="MIXED_PRECISION", quantized_layers=listed)
    model = load(packed, dtype=torch.float32)
    formats = {layer.scheme.format for layer in model.modules() if isinstance(layer, ExpertLinear)}
    assert formats == {"table-packed"}
    close(logits(model), logits(AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32)), 2e-5)
    del listed["model.layers.1.mlp.experts"]
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quantized_layers"] = listed
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"quantized_layers does not name it; add it there"):
        load(packed)


@pytest.mark.parametrize("scheme", [{"dynamic": False, "num_bits": 8, "type": "float"}, "NVFP4"], ids=["8", "4"])
def test_scales_of_a_cache_are_spoken_of_and_kept_by_an_export(
    tmp_path: Path, scheme: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def store(name: str, w: Tensor) -> Stored:
        tensors, w = fp8(w)
        letter = name[-6]
        return ({**tensors, f"{letter}_scale": torch.tensor(0.25)} if name.endswith(("k_proj", "v_proj")) else tensors), w

    packed, wanted = save(tmp_path, store, quant_algo="FP8", kv_cache_scheme=scheme)
    model = load(packed, dtype=torch.float32)
    assert "cache of keys and values; it is not rounded" in caplog.text and "UNEXPECTED" not in caplog.text
    close(logits(model), logits(AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32)), 2e-5)
    exported = load_file(export_dense(packed, tmp_path / "exported") / "model.safetensors")
    assert exported["model.layers.1.self_attn.k_proj.k_scale"] == 0.25


def test_a_folder_with_the_file_of_older_versions_alone(tmp_path: Path) -> None:
    packed, wanted = save(tmp_path, lambda _, w: int4(w))
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="it is dense already"):
        export_dense(packed, tmp_path / "exported")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "exclude_modules": ["lm_head"]}}
    (packed / "hf_quant_config.json").write_text(json.dumps(said))
    close(
        logits(load(packed, dtype=torch.float32)),
        logits(AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32)),
        2e-5,
    )
    export_dense(packed, tmp_path / "exported")
    assert not (tmp_path / "exported" / "hf_quant_config.json").exists()
    assert inspect(packed)["quantization"]["method"] == "modelopt"
    with pytest.raises(BadInput, match=r"already quantized \(modelopt\)"):
        discover(packed)
    (packed / "hf_quant_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"hf_quant_config\.json is not JSON"):
        load(packed)


def test_what_is_not_read_says_what_to_take_instead(tmp_path: Path) -> None:
    packed, _ = save(tmp_path, lambda _, w: fp8(w), quant_algo="NVFP4_SVD")
    with pytest.raises(NotServed, match=r"low-rank part beside its weights.*export NVFP4 or NVFP4_AWQ"):
        load(packed)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_experts_in_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, algorithm: str) -> None:
    """Matrices are [K, N] there, two codes of K in a byte."""
    more = {"intermediate_size_mlp": 64, "num_experts_per_tok": 1} if name == "llama4_text" else {}
    monkeypatch.setitem(zoo.ZOO, name, {**zoo.ZOO["gpt_oss"], "intermediate_size": 64, **more})
    packed, wanted = save(tmp_path, lambda _, w: fp8(w) if algorithm == "FP8" else nvfp4(w), name=name, quant_algo=algorithm)
    held, decoded = (load_file(path / "model.safetensors") for path in (packed, wanted))
    store = fp8 if algorithm == "FP8" else nvfp4
    for stem in [n for n in held if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stack = held.pop(stem)
        experts = [store(w_KN.T.float().contiguous()) for w_KN in stack]
        second = experts[0][0].get("weight_scale_2", experts[0][0]["weight_scale"])
        experts = [rescaled(w_KN.T.float().contiguous(), algorithm, second) for w_KN in stack]
        held[stem] = torch.stack([tensors["weight"].T for tensors, _ in experts]).contiguous()
        decoded[stem] = torch.stack([w_NK.T for _, w_NK in experts]).contiguous()
        if algorithm == "NVFP4":
            held[f"{stem}_weight_scale"] = torch.stack([tensors["weight_scale"].T for tensors, _ in experts]).contiguous()
        held[f"{stem}_weight_scale_2" if algorithm == "NVFP4" else f"{stem}_weight_scale"] = second.clone()
        if algorithm == "NVFP4":
            held[f"{stem}_input_scale"] = torch.tensor(0.01)
    save_file(held, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, wanted / "model.safetensors", metadata={"format": "pt"})
    model = load(packed, dtype=torch.float32)
    assert any(isinstance(module, ExpertLinear) for module in model.modules()) == (name == "gpt_oss")
    reference = AutoModelForCausalLM.from_pretrained(wanted, dtype=torch.float32, experts_implementation="eager")
    close(logits(model), logits(reference), 2e-5)
    assert inspect(packed)["parameters"] == sum(tensor.numel() for tensor in decoded.values())
    exported = load_file(export_dense(packed, tmp_path / "exported") / "model.safetensors")
    for tensor_name, tensor in decoded.items():
        assert torch.equal(exported[tensor_name], tensor.bfloat16()), tensor_name


def rescaled(w_NK: Tensor, algorithm: str, unit: Tensor) -> Stored:
    """As `fp8` and `nvfp4`, in a unit that all experts share."""
    if algorithm == "FP8":
        f = (w_NK / unit).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": f}, f.float() * unit
    return nvfp4(w_NK, second=unit)


def test_experts_in_one_tensor_with_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt's MXFP4 has groups along the outputs there."""
    packed, _ = save(tmp_path, lambda _, w: mxfp4(w), name="gpt_oss", quant_algo="mxfp4")
    held = load_file(packed / "model.safetensors")
    stem = "model.layers.0.mlp.experts.down_proj"
    E, K, N = held[stem].shape
    held[stem] = torch.zeros(E, K, N // 2, dtype=torch.uint8)
    held[f"{stem}_weight_scale"] = torch.zeros(E, K, N // 32, dtype=torch.uint8)
    save_file(held, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotServed, match=r"all experts of a layer in MXFP4 .* start from the dense model"):
        load(packed)


def test_tokens_are_decoded_with_factors_of_inputs_in_every_loop(tmp_path: Path) -> None:
    packed, wanted = save(tmp_path, lambda _, w: int4(w), late, quant_algo="W4A16_AWQ")
    for path in (packed, wanted):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    expected = steps(AutoModelForCausalLM.from_pretrained(wanted), "plain", PROMPTS)
    model = load_to_decode(packed)
    assert "tensors than its format's" in str(model.not_direct)
    assert steps(model, "fused", PROMPTS) == steps(load(packed), "plain", PROMPTS) == expected
