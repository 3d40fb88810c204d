"""HQQ checkpoints as models, and the numbers of the library that made the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import error, logits
from tests.pack.test_hqq import config, words_of

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.model.inspect import inspect
from aerogel.model.loading import load
from aerogel.pack.export import export_dense
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.hqq_floating import fit_floating


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_a_checkpoint_is_its_weights(bits: int, tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float16)
    plain = load_file(dense / "model.safetensors")
    packed, grid = dict(plain), Affine(bits=bits, group_size=16, scale_dtype=torch.float16)
    for name in [name for name in plain if name.endswith("proj.weight")]:
        w_NK = packed.pop(name).float()
        codes = quantized(grid, w_NK, fit_floating(grid, w_NK, 0.7, 10.0, 20))
        assert codes.zero_NG is not None
        plain[name] = codes.decode(torch.float16)
        stem = name.removesuffix(".weight")
        packed |= {
            f"{stem}.W_q": words_of(codes.values_NK.reshape(-1, 16).tolist(), bits),
            f"{stem}.scale": codes.scale_NG.reshape(-1, 1),
            f"{stem}.zero": codes.zero_NG.reshape(-1, 1),
            f"{stem}.shape": torch.tensor(w_NK.shape),
            f"{stem}.nbits": torch.tensor(bits, dtype=torch.int32),
            f"{stem}.packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
            f"{stem}.encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        }
    said = json.loads((dense / "config.json").read_text())
    for folder, tensors, extra in (("plain", plain, {}), ("packed", packed, {"quantization_config": config(bits, 16)})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({**said, **extra}))
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "packed", dtype=torch.float32)
    held = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(held) == 14 and {module.scheme.format for module in held} == {"affine-packed"}
    assert error(logits(model), logits(load(tmp_path / "plain", dtype=torch.float32))) < 2e-3
    exported = load_file(export_dense(tmp_path / "packed", tmp_path / "exported") / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in plain.items() if name.endswith("proj.weight"))
    facts = inspect(tmp_path / "packed")
    assert facts["quantization"]["layers"] == 14 and facts["parameters"] == sum(tensor.numel() for tensor in plain.values())


def test_what_is_pickled_is_refused(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float16)
    said = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**said, "quantization_config": config(4, 16)}))
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="pickled"):
        load(dense)
