"""One file of nested planes is several models: a prefix loads alone, in a fresh process, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import ids_file, logits, recipe
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.model.compress import compress
from aerogel.model.loading import at_bits, load

NESTED = {"quantize": {"method": "nested", "bits": 4, "group_size": 16}}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("nested")
    dense = zoo.save("llama", folder / "dense", dtype=torch.bfloat16)
    out = folder / "out"
    compress(dense, recipe(ids_file(folder), NESTED), out)
    return dense, out


def divergence(found: Tensor, dense: Tensor) -> float:
    """KL of the dense model's next token from the other's, in nats per token."""
    p, q = dense.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_more_planes_are_a_better_model(made: tuple[Path, Path]) -> None:
    dense, out = made
    wanted = logits(load(dense, dtype=torch.float32))
    found = [divergence(logits(load(out, bits=bits, dtype=torch.float32)), wanted) for bits in (2, 3, 4)]
    assert found[0] > 1.5 * found[1] > 2.25 * found[2] > 0
    with at_bits(3):
        assert torch.equal(logits(load(out)), logits(load(out, bits=3)))
        assert torch.equal(logits(load(dense)), logits(load(dense, bits=None)))
    assert torch.equal(logits(load(out)), logits(load(out, bits=4)))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "aerogel" and config["format"] == "planes"


def test_a_prefix_needs_only_its_own_planes_on_the_disk(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = made
    tensors = load_file(out / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_2", "_3"))}
    assert len(first) < len(tensors)
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    save_file(first, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(tmp_path, bits=2)), logits(load(out, bits=2)))


def test_a_fresh_process_decodes_the_same_bits(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = made
    code = (
        "import sys, torch; from aerogel.model.loading import load; from aerogel.kernels.linear import Linear\n"
        f"m = load({str(out)!r}, bits=3)\n"
        "torch.save({n: l.dequantize(torch.float32) for n, l in m.named_modules() if isinstance(l, Linear)}, sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.pt")], check=True, env=environment, capture_output=True)
    elsewhere = torch.load(tmp_path / "w.pt")
    here = {n: x.dequantize(torch.float32) for n, x in load(out, bits=3).named_modules() if isinstance(x, Linear)}
    assert here.keys() == elsewhere.keys() and here
    assert all(torch.equal(here[name], elsewhere[name]) for name in here)


def test_what_has_no_planes_cannot_be_narrowed(made: tuple[Path, Path], tmp_path: Path) -> None:
    dense, out = made
    with pytest.raises(BadInput, match="between 1 and 8"):
        load(out, bits=0)
    rtn = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}
    compress(dense, recipe(None, rtn), tmp_path / "plain")
    with pytest.raises(BadInput, match="one width only"):
        load(tmp_path / "plain", bits=2)
