"""Inputs rounded with one stored scale: measured by calibration, written as other tools do, and run as the formula says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import error, ids_file, logits, recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import aerogel
from aerogel.errors import BadInput
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.linear import Linear
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.compress import compress
from aerogel.model.plan import plan
from aerogel.pack.export import export_dense

STAGES: dict[str, dict[str, Any]] = {
    "int8-static": {"method": "gptq", "bits": 8, "group_size": None, "activations": "int8-static"},
    "fp8-static": {"method": "rtn", "format": "fp8", "activations": "fp8-static"},
    "w4": {"method": "rtn", "bits": 4, "group_size": 16, "activations": "int8-static"},
    "outliers": {"method": "rtn", "bits": 8, "activations": "int8-static", "outliers": "sigma", "outlier_sigma": 2.0},
}


def rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The formula, in float32."""
    if kind == "fp8-static":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return (x / scale).round().clamp(-127, 127) * scale


def scales_of(folder: Path) -> dict[str, Tensor]:
    held = load_file(folder / "model.safetensors")
    return {name.removesuffix(".input_scale"): t for name, t in held.items() if name.endswith(".input_scale")}


def rounding_inputs(model: Any, scales: dict[str, Tensor], kind: str) -> Any:
    """A dense model whose linears see rounded inputs."""
    for name, scale in scales.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, s=scale: (rounded(given[0], s, kind),))
    return model


@pytest.mark.parametrize("name", STAGES)
def test_compressed_planned_loaded_and_generated(name: str, tmp_path: Path) -> None:
    options = STAGES[name]
    kind = options["activations"]
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), {"quantize": options})
    report = compress(dense, chosen, tmp_path / "out")
    if name != "outliers":
        bits = plan(dense, chosen)["size"]["bits_per_weight"]
        assert bits == pytest.approx(report["size"]["bits_per_weight"], rel=1e-9)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"]
    (group,) = config["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"], inputs["num_bits"], inputs["symmetric"]) == (False, "tensor", 8, True)
    assert config["quant_method"] == ("aerogel" if name == "outliers" else "compressed-tensors")
    scales = scales_of(tmp_path / "out")
    assert len(scales) == sum(len(block["layers"]) for block in report["blocks"])
    q, k = (scales[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert torch.equal(q, k), "they read the same input"
    model: Any = aerogel.load(tmp_path / "out")
    kept = [module for module in model.modules() if isinstance(module, SidecarLinear)]
    assert len(kept) == len(scales) and all("input_scale" in module.operands() for module in kept)
    exported = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    if name != "outliers":  # those see their inputs as they are
        assert error(logits(model), logits(rounding_inputs(exported, scales, kind))) < 2e-5
    merged = aerogel.load(tmp_path / "out", merge=True)
    # Outliers beside a merged weight may be added in another order.
    assert error(logits(merged), logits(model)) < (1e-6 if name == "outliers" else 1e-12)
    model.generation_config.eos_token_id = None
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert [token for (token,) in Decoder(model, "fused").stream([ids[0]], 6)] == expected


def test_the_scale_is_the_peak_of_the_calibration_inputs(tmp_path: Path) -> None:
    """Of the first block's first linear, whose inputs no compressed layer stands before."""
    dense, source = zoo.save("llama", tmp_path / "dense"), ids_file(tmp_path)
    compress(dense, recipe(source, {"quantize": STAGES["int8-static"]}), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    peak = torch.zeros(())

    def watch(module: nn.Module, given: Any) -> None:
        nonlocal peak
        peak = torch.maximum(peak, given[0].abs().max())

    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(watch)
    with torch.no_grad():
        model(load_file(source.removesuffix(":ids"))["ids"])
    scale = scales_of(tmp_path / "out")["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(scale[0], peak / 127, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_of_other_tools_may_hold_the_scale_without_axes_and_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    compress(dense, recipe(ids_file(tmp_path), {"quantize": STAGES["fp8-static"]}), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    held = {n: t.reshape(()).to(dtype) if n.endswith("input_scale") else t for n, t in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})
    model = aerogel.load(tmp_path / "out")
    wanted = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    scales = {name: scale.float() for name, scale in scales_of(tmp_path / "out").items()}
    assert error(logits(model), logits(rounding_inputs(wanted, scales, "fp8-static"))) < 2e-5


def test_a_damaged_scale_is_refused_by_name(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    compress(dense, recipe(ids_file(tmp_path), {"quantize": STAGES["int8-static"]}), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    held["model.layers.1.mlp.up_proj.input_scale"].fill_(torch.nan)
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"input_scale of model\.layers\.1\.mlp\.up_proj"):
        aerogel.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "rtn", "format": "fp8", "strategy": "block", "activations": "fp8-static"}, "blocks"),
        ({"method": "rtn", "bits": 4, "activations": "int8-static", "rows": "loss"}, "static activations"),
        ({"method": "rtn", "bits": 8, "activations": "fp8-static"}, "fp8-static"),
    ],
)
def test_what_does_not_go_together_is_said(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    with pytest.raises(BadInput, match=said):
        plan(dense, recipe(ids_file(tmp_path), {"quantize": options}))


def test_without_a_stored_scale_a_static_layer_says_what_is_missing() -> None:
    from aerogel.kernels.gemm.ref import Reference
    from aerogel.kernels.problem import Problem
    from aerogel.quantize.grids import IntGrid, quantized

    grid = IntGrid(bits=8)
    codes = quantized(grid, w := torch.randn(16, 32), grid.fit(w))
    problem = Problem(format="int-quantized", grid=grid, N=16, K=32, activations="int8-static")
    with pytest.raises(BadInput, match="needs the stored input_scale"):
        Reference.run(torch.randn(2, 32), problem.stored.encode(codes), problem)
    assert Linear(32, 16, _scheme(grid)).scheme.activations == "int8-static"


def _scheme(grid: Any) -> Any:
    from aerogel.pack.scheme import Scheme

    return Scheme(format="int-quantized", grid=grid, activations="int8-static")
