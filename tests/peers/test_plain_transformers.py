"""What aerogel writes, in plain transformers with compressed-tensors: no aerogel, another process, the same numbers.

Asymmetric pack-quantized is the one case where the versions matter: docs/compatibility.md tells why, and the last test
here fails when that changes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tests import zoo
from tests.model.tiny import IDS, recipe

from aerogel.kernels.linear import Linear
from aerogel.model.compress import compress
from aerogel.model.loading import load

pytestmark = pytest.mark.peers
pytest.importorskip("compressed_tensors")

SHIPPED: dict[str, dict[str, Any]] = {
    "pack-quantized-4": {"bits": 4, "group_size": 16},
    "pack-quantized-3": {"bits": 3, "group_size": 16},
    "pack-quantized-5-channel": {"bits": 5, "group_size": None},
    "pack-quantized-8": {"bits": 8, "group_size": 16},
    "int-quantized": {"bits": 8, "group_size": None, "activations": "int8"},
    "float-quantized": {"format": "fp8", "activations": "fp8"},
}
ASYMMETRIC = {"asymmetric-4": {"bits": 4, "group_size": 16}, "asymmetric-3-channel": {"bits": 3, "group_size": None}}
TOLERANCE = {"int-quantized": 5e-2}
"""int8 inputs: compressed-tensors scales a token by max|x| / 127.5, we and servers by max|x| / 127."""
SCRIPT = """
import sys
sys.modules["aerogel"] = None  # whoever imports it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

ids, folders = torch.tensor(IDS), FOLDERS
for folder in folders:
    found, own = {}, {"quantization_config": CompressedTensorsConfig(dequantize=True)} if DEQUANTIZE else {}
    for dtype in ("auto", torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **own)
        with torch.no_grad():
            found["logits"] = model(ids).logits
        if dtype == "auto":
            found |= {name: weight.clone() for name, weight in model.named_parameters() if name.endswith("proj.weight")}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{folder}/found.safetensors")
"""


def plain(folders: list[Path], dequantize: bool = False) -> subprocess.CompletedProcess[str]:
    """Loads and runs each folder; what it finds goes into `found.safetensors` beside the checkpoint."""
    script = SCRIPT.replace("IDS", repr(IDS.tolist())).replace("FOLDERS", repr([str(folder) for folder in folders]))
    command = [sys.executable, "-W", "ignore", "-c", script.replace("DEQUANTIZE", str(dequantize))]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def written(folder: Path, stages: dict[str, dict[str, Any]], **more: Any) -> list[Path]:
    """A tiny model through the whole pipeline, once for each stage."""
    dense = zoo.save("llama", folder / "dense", dtype=torch.bfloat16)
    for name, numbers in stages.items():
        compress(dense, recipe(None, {"quantize": {"method": "rtn", **numbers, **more}}), folder / name)
    return [folder / name for name in stages]


def same(folder: Path, tolerance: float = 1e-5) -> None:
    """What the other process found is what we have: weights bit for bit, logits in float32."""
    found = load_file(folder / "found.safetensors")
    model = load(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(IDS).logits
    error = float((found.pop("logits") - wanted).norm() / wanted.norm())
    assert error <= TOLERANCE.get(folder.name, tolerance), (folder.name, error)
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert set(layers) == set(found) and len(found) == 14
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16, (folder.name, name)
        assert torch.equal(layers[name].dequantize(weight.dtype), weight), (folder.name, name)


def test_every_symmetric_format_loads_and_agrees(tmp_path: Path) -> None:
    folders = written(tmp_path, SHIPPED)
    done = plain(folders)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        same(folder)


def test_asymmetric_files_load_and_agree_when_transformers_decodes_while_it_loads(tmp_path: Path) -> None:
    folders = written(tmp_path, ASYMMETRIC, symmetric=False)
    done = plain(folders, dequantize=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        # It decodes in the dtype of the scales, bfloat16, also where the model is float32.
        same(folder, tolerance=2e-2)


def test_asymmetric_files_stay_packed_only_where_transformers_does_not_compare_shapes(tmp_path: Path) -> None:
    """When this fails, upstream has changed: correct docs/compatibility.md and the versions here."""
    folders = written(tmp_path, ASYMMETRIC, symmetric=False)
    done = plain(folders)
    if Version(transformers.__version__) < Version("5.23"):
        assert done.returncode == 0, done.stderr[-3000:]
        for folder in folders:
            same(folder)
    else:
        assert done.returncode != 0 and "weight_zero_point" in done.stderr and "MISMATCH" in done.stderr
        assert "ckpt: torch.Size([2, 2]) vs model:torch.Size([16, 2])" in done.stderr
