"""Table formats as checkpoints: loaded into models, in a fresh process, and with what servers need of NVFP4."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.test_loading import REPOSITORY, logits, make, reference
from tests.model.tiny import ids_file, recipe
from tests.quantize.test_tables import GRIDS, weight

from aerogel.kernels.linear import Linear
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.pack.config import choose_format, quantization_config
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.bipolar import Bipolar
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4

LOADED: list[Any] = [Nvfp4(), Mx(), Mx(kind="e4m3"), Nf4(scale_dtype=torch.float8_e4m3fn), Bitmod(bits=3, group_size=16)]
LOADED += [KMeans(bits=3), Float(kind="e5m2"), Nvfp4(scale_dtype=torch.uint8)]
LOADED += [Bipolar(bits=4), Bipolar(bits=8), Complex()]


@pytest.mark.parametrize("grid", LOADED, ids=str)
def test_a_model_runs_what_its_files_decode_to(tmp_path: Path, grid: Any) -> None:
    made = make(tmp_path, "llama", grid_of=lambda m: grid)
    model = load(made.packed)
    assert sum(isinstance(module, Linear) for module in model.modules()) == len(made.names)
    wanted = logits(reference(made))
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 1e-5


def test_experts_in_a_table_format(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe", grid_of=lambda m: Nvfp4().pinned(2.0**-13))
    wanted = logits(reference(made))
    assert float((logits(load(made.packed)) - wanted).norm() / wanted.norm()) < 1e-5


FRESH = """
import hashlib, json, sys
from pathlib import Path
from safetensors.torch import load_file
from aerogel.pack.source import open_source
for folder in sorted(Path(sys.argv[1]).iterdir()):
    source = open_source(json.loads((folder / "config.json").read_text()))
    tensors = {name.removeprefix("a."): tensor for name, tensor in load_file(folder / "w.safetensors").items()}
    scheme = source.scheme(("a",), {name: tensor.dtype for name, tensor in tensors.items()}, ("Linear",))
    print(folder.name, hashlib.sha256(source.read(tensors, scheme).dense().numpy().tobytes()).hexdigest())
"""


def test_a_fresh_process_decodes_every_format_to_the_same_bits(tmp_path: Path) -> None:
    wanted = {}
    for number, grid in enumerate(GRIDS):
        w = weight(130, 150 if number % 2 else 128, seed=number)
        codes = quantized(grid, w, grid.fit(w))
        folder = tmp_path / f"{number:03d}"
        folder.mkdir()
        tensors = choose_format(grid).encode(codes)
        save_file({f"a.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "w.safetensors")
        (folder / "config.json").write_text(json.dumps(quantization_config([("a", grid, "none")])))
        wanted[folder.name] = hashlib.sha256(codes.decode().numpy().tobytes()).hexdigest()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH, tmp_path], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == wanted


def test_what_a_server_fuses_shares_one_global_scale(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float32)
    held = load_file(dense / "model.safetensors")
    held["model.layers.0.self_attn.k_proj.weight"] *= 30
    save_file(held, dense / "model.safetensors", metadata={"format": "pt"})
    stage = {"quantize": {"method": "gptq", "format": "nvfp4"}}
    compress(dense, recipe(ids_file(tmp_path), stage), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for block in (0, 1):
        prefix = f"model.layers.{block}."
        names = [n for n in found if n.startswith(prefix) and n.endswith("weight_global_scale")]
        assert len(names) == 7 and len({float(found[n]) for n in names}) == 1
        scales = [found[n.replace("global_scale", "scale")].float().max() for n in names]
        assert 56 < float(max(scales)) <= 448
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_a_modelopt_checkpoint_loads(tmp_path: Path) -> None:
    made = make(tmp_path, "llama", grid_of=lambda m: Nvfp4())
    file = made.packed / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        if name.endswith("weight_global_scale"):
            renamed[name.replace("weight_global_scale", "weight_scale_2")] = (1 / tensor).reshape(())
        else:
            renamed[name.replace("weight_packed", "weight")] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    config = json.loads((made.packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (made.packed / "config.json").write_text(json.dumps(config))
    wanted = logits(reference(made))
    assert float((logits(load(made.packed)) - wanted).norm() / wanted.norm()) < 1e-5


def test_our_own_formats_are_named_after_us() -> None:
    own = quantization_config([("a", Nf4(), "none"), ("b", Mx(), "none")])
    assert own["quant_method"] == "aerogel" and own["format"] == "mixed-precision"
    assert quantization_config([("b", Mx(), "none")])["quant_method"] == "compressed-tensors"
