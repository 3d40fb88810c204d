"""Every recipe that ships, from a dense model to tokens: planned, compressed, loaded, run on a kernel of its own, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.model.tiny import IDS, error, ids_file, logits
from transformers import LlamaConfig, LlamaForCausalLM

from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.model.plan import plan
from aerogel.recipes.schema import Recipe, shipped

WORSE = {"1": 0.8, "2": 0.5, "3": 0.3, "4": 0.15}
"""First digit of a name to the largest error of the logits of a random model; 0.1 from five bits on."""
PRUNED = ("prune-50", "w4-sparse24")
NOT_PACKED = ("lossless", "prune-50")
DECODED = ("w1-complex",)
"""Recipes of formats without a kernel of their own."""
UPPER = {"outliers": ("sigma",), "columns": ("threshold",)}
"""Rules that look at weights or inputs: the plan knows the most that there can be."""
NEAR = 0.005
"""Where the loss chooses rows among layers the plan counts as many in each. Their number rounds up or down, and the indices and
scales of short ones take more beside as many weights."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Llama block in bfloat16 that groups of 128 fit into."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def small(name: str, folder: Path) -> Recipe:
    """The recipe with a few random tokens to calibrate on, and without measurements."""
    content: dict[str, Any] = yaml.safe_load(shipped()[name].read_text("utf-8"))
    if content.get("calibration"):
        content["calibration"] = {"source": ids_file(folder), "samples": 8, "sequence_length": 16}
    content.pop("gate", None)
    return Recipe.load({**content, "evaluate": None, "bench": None})


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_makes_a_model_that_runs(name: str, dense: Path, tmp_path: Path) -> None:
    recipe, out = small(name, tmp_path), tmp_path / "out"
    planned = plan(dense, recipe)
    report = compress(dense, recipe, out)
    most = name == "lossless" or any(spec.options.get(key) in rules for spec in recipe.stages for key, rules in UPPER.items())
    expected, written = planned["size"]["bytes"], report["size"]["bytes"]
    if any(spec.options.get("rows") == "loss" for spec in recipe.stages):
        assert abs(written / expected - 1) < NEAR, (written, expected)
    else:
        assert (written <= expected) if most else (written == expected), (written, expected)
    wanted, model = logits(load(dense, dtype=torch.float32)), load(out, dtype=torch.float32)
    bound = 0.0 if name == "lossless" else 0.6 if name in PRUNED else WORSE.get(name[1], 0.1)
    assert error(logits(model), wanted) <= bound
    by = {module.kernel_name for module in model.modules() if isinstance(module, Linear)}
    assert bool(by) == (name not in NOT_PACKED)
    if library.missing() is None and name not in DECODED:
        assert not by & {"torch-chunked", "reference"}, "what ships has a kernel"
    steps = list(Decoder(model).stream([IDS[0]], 3))
    assert steps == list(Decoder(load(out, dtype=torch.float32, merge=True)).stream([IDS[0]], 3))


ON_GPU = {"w1-binary": "cuda-plane", "w3-bcq": "cuda-planes", "w3-bitmod": "cuda", "w4-kmeans": "cuda"}
"""Recipes whose numbers are tables or planes, and the kernel that runs them; some 20 seconds each, for compiling."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(ON_GPU))
def test_what_a_recipe_makes_is_the_same_model_on_a_gpu(name: str, dense: Path, tmp_path: Path) -> None:
    """Loaded, merged, read and decoded: kernels have tests of their own, which never meet a model."""
    compress(dense, small(name, tmp_path), tmp_path / "out")
    model = load(tmp_path / "out", device="cuda", dtype=torch.bfloat16, merge=True)
    assert {module.kernel_name for module in model.modules() if isinstance(module, Linear)} == {ON_GPU[name]}
    with torch.no_grad():
        found = model(IDS.cuda()).logits.float().cpu()
    assert error(found, logits(load(tmp_path / "out", dtype=torch.float32))) <= 0.04
    decoder = Decoder(model)
    tokens = [step[0] for step in decoder.stream([IDS[0]], 5)]
    assert decoder.way == "fused", decoder.reasons
    assert len(tokens) == 5 and tokens[0] == int(found[0, -1].argmax())
