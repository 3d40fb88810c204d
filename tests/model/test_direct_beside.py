"""Packed Llamas with something beside their codes, without transformers' modules: outliers, columns, rows, rotated inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.test_direct import PROMPTS, steps
from tests.model.tiny import ids_file, recipe

from aerogel.errors import BadInput
from aerogel.eval.decode import facts
from aerogel.kernels.decode.direct import Direct
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.decode.merge_beside import MergedBeside
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.native import library
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.compress import compress
from aerogel.model.direct import NotDirect, load_to_decode
from aerogel.model.direct import load as load_directly
from aerogel.model.loading import load
from aerogel.quantize.outliers import NAMES as OUTLIERS
from aerogel.quantize.rotation import NAMES as ROTATION

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
ROTATED = {"transform": "hadamard", "transform_block": 16}
STAGES: dict[str, dict[str, Any]] = {
    "outliers": {"outliers": "sigma", "outlier_sigma": 2.0},
    "outliers beside tables": {"format": "nf4", "outliers": "sigma", "outlier_sigma": 2.0},
    "columns": {"columns": "largest", "column_share": 0.05},
    "rows": {"method": "gptq", "rows": "loss", "row_share": 0.3},
    "rotation": ROTATED,
    "rotated nf4": {"format": "nf4", **ROTATED},
}
LAYOUTS = [(name, "portable") for name in STAGES] + [("outliers", "native-cpu"), ("rotation", "native-cpu")]


def made(folder: Path, stage: dict[str, Any], layout: str = "portable") -> Path:
    """A tiny Llama with one stage for all its linears."""
    bits = {} if "format" in stage else {"bits": 4}
    quantize = {"quantize": {"method": "rtn", "group_size": 16, **bits, **stage}}
    dense = zoo.save("llama", folder / "dense")
    compress(dense, recipe(ids_file(folder), quantize, pack={"layout": layout}), folder / "out")
    return folder / "out"


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_the_same_tokens_as_through_transformers(tmp_path: Path, name: str, layout: str) -> None:
    packed = made(tmp_path, STAGES[name], layout)
    direct, usual = load_to_decode(packed), load(packed, merge=True)
    assert isinstance(direct, Direct)
    wholes = [module for module in direct.modules() if isinstance(module, MergedBeside)]
    assert len(wholes) == 2 * len(direct.layers)
    wanted = steps(load(packed), "plain", PROMPTS)
    assert steps(direct, "direct", PROMPTS) == wanted == steps(usual, "fused", PROMPTS)
    assert steps(direct, "direct", PROMPTS[:1]) == steps(usual, "plain", PROMPTS[:1])


def test_a_rotation_is_one_operation_for_linears_that_read_the_same_input(tmp_path: Path) -> None:
    counts = []
    for stage in ({}, ROTATED):
        decoder = Decoder(load_to_decode(made(tmp_path / str(len(counts)), stage)))
        assert len(list(decoder.stream(PROMPTS[:1], 3))) == 3
        counts.append(decoder.facts()["operators"])
        model: Any = decoder.model
        assert sum(facts(decoder)["kernels"].values()) == 4 * len(model.layers)
    assert counts[1] - counts[0] == 4 * len(model.layers)  # before q, k and v; the output; gate and up; down


@pytest.mark.parametrize("name", ["outliers", "rotation"])
def test_a_tied_head_has_them_too_and_its_embedding_is_in_the_model_s_basis(tmp_path: Path, name: str) -> None:
    model = zoo.build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    shared = {"method": "rtn", "bits": 8, "group_size": 16, **STAGES[name]}
    head = {"quantize": {**shared, "targets": ["Embedding"], "ignore": []}}
    compress(tmp_path / "dense", recipe(None, {"quantize": shared}, head), tmp_path / "out")
    direct = load_directly(tmp_path / "out")
    assert isinstance(direct.head, SidecarLinear) and isinstance(direct.embedding, PackedEmbedding)
    assert steps(direct, "direct", PROMPTS) == steps(load(tmp_path / "out", merge=True), "fused", PROMPTS)


def test_a_fresh_process_reads_them_without_transformers(tmp_path: Path) -> None:
    for name in ("outliers", "rotation"):
        packed = made(tmp_path / name, STAGES[name])
        code = (
            "import json, sys, torch\n"
            "from aerogel.kernels.decode.loop import Decoder\n"
            "from aerogel.model.direct import load_to_decode\n"
            f"decoder = Decoder(load_to_decode({str(packed)!r}, loop='direct'))\n"
            f"print(json.dumps(list(decoder.stream([torch.tensor({PROMPTS[0].tolist()})], 12))))\n"
            "heavy = 'transformers torch._dynamo torch._inductor sympy scipy triton accelerate'.split()\n"
            "sys.exit(', '.join(sorted(set(heavy) & set(sys.modules))) or 0)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == steps(load(packed), "plain", PROMPTS[:1])


def test_columns_that_depend_on_the_inputs_are_refused(tmp_path: Path) -> None:
    stage = {"bits": 8, "group_size": None, "activations": "int8", "columns": "dynamic", "column_threshold": 1.5}
    with pytest.raises(NotDirect, match=r"beside|kernel"):
        load_directly(made(tmp_path, stage))


def test_damage_is_found(tmp_path: Path) -> None:
    for name, local, word in (("outliers", OUTLIERS[1], "damaged"), ("rotation", ROTATION[0], "signs")):
        packed = made(tmp_path / name, STAGES[name])
        file = packed / "model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if key.endswith(local))
        tensors[key] = torch.full_like(tensors[key], 7 if name == "rotation" else 3000)
        save_file(tensors, file)
        with pytest.raises(BadInput, match=word):
            load_directly(packed)
