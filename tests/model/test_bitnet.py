"""BitNet checkpoints: packed by transformers they run on the kernels for integers; written by us they run in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import error, logits, recipe
from torch.nn.functional import linear
from transformers.integrations.bitnet import BitLinear, pack_weights, unpack_weights
from typer.testing import CliRunner

from aerogel.cli.app import app
from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.model.reader import CheckpointReader
from aerogel.pack.export import export_dense
from aerogel.pack.to_bitnet import export_bitnet


def test_a_bitnet_checkpoint_is_its_ternary_weights(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float32)
    config = json.loads((dense / "config.json").read_text())
    plain = load_file(dense / "model.safetensors")
    packed = dict(plain)
    for name in [name for name in plain if name.endswith("proj.weight")]:
        scale = plain[name].abs().mean()
        codes = (plain[name] / scale).round().clamp(-1, 1)
        plain[name] = codes * scale
        packed[name], packed[f"{name}_scale"] = pack_weights(codes.to(torch.int8)), (1 / scale).reshape(1)
    for folder, tensors, extra in [
        ("plain", plain, {}),
        ("packed", packed, {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}}),
    ]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "packed")
    held = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(held) == 14 and all(module.scheme.grid.bits == 2 for module in held)
    assert error(logits(model), logits(load(tmp_path / "plain"))) < 5e-6


TERNARY = {"quantize": {"method": "rtn", "format": "ternary", "scales": "tensor"}}


def test_what_is_exported_is_what_transformers_unpacks(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float32)
    compress(dense, recipe(None, TERNARY), tmp_path / "own")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "own"), "--to", "bitnet", "-o", str(tmp_path / "bitnet"), "--quiet"]
    )
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "bitnet" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitnet" and config["modules_to_not_convert"] == ["lm_head"]
    decoded = load_file(export_dense(tmp_path / "own", tmp_path / "decoded") / "model.safetensors")
    held = load_file(tmp_path / "bitnet" / "model.safetensors")
    names = [name.removesuffix("_scale") for name in held if name.endswith("weight_scale")]
    assert len(names) == 14
    for name in names:
        codes = unpack_weights.__wrapped__(held[name], torch.float32)
        assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
        torch.testing.assert_close(codes / held[f"{name}_scale"], decoded[name], rtol=1e-6, atol=0)
    for name in decoded.keys() - set(names):
        assert torch.equal(held[name], decoded[name]), name
    assert error(logits(load(tmp_path / "bitnet")), logits(load(tmp_path / "own"))) < 5e-6


def test_their_linear_gives_our_product_but_for_the_rounding_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.bitnet.unpack_weights", unpack_weights.__wrapped__)
    for name in ("activation_quant", "post_quant_process"):
        monkeypatch.setattr(BitLinear, name, vars(BitLinear)[name].__wrapped__)
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float32)
    compress(dense, recipe(None, TERNARY), tmp_path / "own")
    reader = CheckpointReader(export_bitnet(tmp_path / "own", tmp_path / "bitnet"))
    name = "model.layers.0.mlp.down_proj"
    theirs = BitLinear(48, 32, bias=False, dtype=torch.float32)
    theirs.weight, theirs.weight_scale = reader.read(f"{name}.weight"), reader.read(f"{name}.weight_scale")
    x_MK = torch.randn(3, 48)
    x8_MK = (x_MK * 127 / x_MK.abs().amax(1, keepdim=True)).round() * x_MK.abs().amax(1, keepdim=True) / 127
    ours = load(tmp_path / "bitnet").get_submodule(name)
    torch.testing.assert_close(theirs(x_MK), linear(x8_MK, ours.dequantize(torch.float32)), rtol=1e-4, atol=1e-5)


def test_what_bitnet_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float32)
    compress(dense, recipe(None, {"quantize": {"method": "rtn", "bits": 4}}), tmp_path / "four")
    with pytest.raises(BadInput, match=r"proj is not ternary"):
        export_bitnet(tmp_path / "four", tmp_path / "no")
    with pytest.raises(BadInput, match="dense already"):
        export_bitnet(dense, tmp_path / "no")
    turned = zoo.save("gpt2", tmp_path / "gpt2", dtype=torch.float32)
    compress(turned, recipe(None, TERNARY), tmp_path / "conv")
    with pytest.raises(BadInput, match="no plain linear"):
        export_bitnet(tmp_path / "conv", tmp_path / "no")
    assert not (tmp_path / "no").exists()
