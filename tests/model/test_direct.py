"""Packed Llamas without transformers' modules: the same tokens as with them, what is refused, and what is not imported."""

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
from tests.model.test_loading import make
from tests.model.tiny import RTN, recipe
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aerogel.errors import BadInput
from aerogel.kernels.decode.direct import Direct, DirectSession
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.decode.sample import Sampling
from aerogel.kernels.linear import round_activations
from aerogel.kernels.native import library
from aerogel.model.compress import compress
from aerogel.model.direct import NotDirect, frequencies, load_to_decode
from aerogel.model.direct import load as load_directly
from aerogel.model.loading import load
from aerogel.model.stored_bits import at_bits
from aerogel.pack.export import export_layout
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import IntGrid

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
PROMPTS = [torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length)) for length in (19, 1, 7)]
GRIDS: dict[str, Any] = {
    "int4": IntGrid(bits=4, group_size=16),
    "int3 with zero points": IntGrid(bits=3, group_size=16, symmetric=False),
    "nf4": Nf4(group_size=16),
    "fp8": Float(kind="e4m3"),
    "codebooks": KMeans(rounds=3),
}


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def steps(model: Any, loop: Any, prompts: list[torch.Tensor], **sampling: Any) -> list[list[int | None]]:
    return list(Decoder(model, loop).stream(prompts, 12, sampling=Sampling(**sampling)))


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_the_same_tokens_as_through_transformers(tmp_path: Path, name: str, grid: str) -> None:
    packed = make(tmp_path, name, grid_of=lambda m: GRIDS[grid]).packed
    change(packed, sliding_window=None)
    direct, usual = load_to_decode(packed), load(packed, merge=True)
    assert isinstance(direct, Direct)
    for prompts in (PROMPTS[:1], PROMPTS[1:2], PROMPTS):
        assert steps(direct, "auto", prompts) == steps(usual, "plain", prompts), len(prompts)
    assert steps(direct, "direct", PROMPTS, temperature=0.8, seed=3) == steps(usual, "fused", PROMPTS, temperature=0.8, seed=3)


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_prompts_are_those_of_the_model(tmp_path: Path, dtype: torch.dtype, grid: str) -> None:
    packed = make(tmp_path, "qwen2", dtype=dtype, grid_of=lambda m: GRIDS[grid]).packed
    direct, usual = load_directly(packed), load(packed)
    assert direct.dtype == usual.dtype == dtype
    ids = torch.stack([PROMPTS[0], PROMPTS[0].flip(0)])
    for start in ([0, 0], [5, 0]):
        start_B = torch.tensor(start)
        found = DirectSession(direct, 2, 64).fill(ids, start_B)
        mask = (torch.arange(19)[None] >= start_B[:, None]).long()
        with torch.no_grad():
            wanted = usual(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits[:, -1]
        assert (found - wanted).float().norm() < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.float().norm()


@pytest.mark.parametrize("layout", ["portable", "native-cpu"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_embeddings_heads_and_layouts(tmp_path: Path, layout: str, tied: bool) -> None:
    model = zoo.build("llama")
    model.config.tie_word_embeddings = tied
    model.tie_weights() if tied else None
    model.save_pretrained(tmp_path / "dense")  # float32: rounding to int8 makes large differences of bfloat16's small ones
    target = "Embedding" if tied else "lm_head"
    head = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "targets": [target], "ignore": []}}
    compress(tmp_path / "dense", recipe(None, RTN, head), tmp_path / "out")
    place = tmp_path / "out"
    if layout != "portable":
        export_layout(place, tmp_path / "native", layout)
        place = tmp_path / "native"
    direct, usual = load_directly(place), load(place, merge=True)
    assert steps(direct, "direct", PROMPTS) == steps(usual, "fused", PROMPTS)
    for each in (direct, usual):
        assert round_activations(each) > 0  # type: ignore[arg-type]
    assert steps(direct, "direct", PROMPTS) == steps(usual, "fused", PROMPTS)


def test_arithmetic_and_threads_may_change_between_prompts(tmp_path: Path) -> None:
    direct = load_directly(make(tmp_path, "llama").packed)
    decoder, count = Decoder(direct), torch.get_num_threads()
    exact = list(decoder.stream(PROMPTS[:1], 6))
    round_activations(direct)
    rounded = list(decoder.stream(PROMPTS[:1], 6))
    assert rounded == list(Decoder(direct).stream(PROMPTS[:1], 6))
    try:
        torch.set_num_threads(3)
        assert list(decoder.stream(PROMPTS[:1], 6)) == rounded
    finally:
        torch.set_num_threads(count)
    assert exact == list(Decoder(load_directly(tmp_path / "packed")).stream(PROMPTS[:1], 6))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown setting": ({"attention_multiplier": 2.0}, "attention_multiplier"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "a window": ({"sliding_window": 16}, "sliding_window"),
    "layers that differ": ({"layer_types": ["full_attention", "sliding_attention"]}, "layers"),
    "another class": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "another rotation": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    "a part of the rotation": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotation"),
    "nothing packed": ({"quantization_config": None}, "not packed"),
    "bfloat8": ({"dtype": "float8_e4m3fn"}, "dtype"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_known_is_refused(tmp_path: Path, what: str) -> None:
    packed = make(tmp_path, "llama").packed
    settings, reason = REFUSED[what]
    change(packed, **settings)
    with pytest.raises(NotDirect, match=reason):
        load_directly(packed)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    packed = make(tmp_path, "llama").packed
    file = packed / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, file)
    with pytest.raises(NotDirect, match="q_norm"):
        load_directly(packed)


def test_a_tensor_of_another_shape_is_bad_input(tmp_path: Path) -> None:
    packed = make(tmp_path, "llama").packed
    file = packed / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(31)}, file)
    with pytest.raises(BadInput, match=r"model\.norm"):
        load_directly(packed)


def test_others_are_loaded_through_transformers_and_say_why(tmp_path: Path) -> None:
    packed = make(tmp_path, "qwen3").packed
    decoder = Decoder(load_to_decode(packed))
    assert len(list(decoder.stream(PROMPTS[:1], 3))) == 3
    assert "qwen3" in decoder.facts()["not"]["direct"] and decoder.facts()["loop"] == "fused"
    with pytest.raises(BadInput, match=r"loop direct cannot run this model.*qwen3"):
        load_to_decode(packed, loop="direct")
    for given, reason in (({"loop": "plain"}, "plain"), ({"merge": False}, "merged")):
        model: Any = load_to_decode(make(tmp_path / reason, "llama").packed, **given)
        assert reason in model.not_direct
    with pytest.raises(BadInput, match="planes"), at_bits(2):
        load_to_decode(make(tmp_path / "bits", "llama").packed)


def test_a_loop_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    packed = make(tmp_path, "llama").packed
    with pytest.raises(BadInput, match="loop fused is not one of a Direct"):
        Decoder(load_directly(packed), "fused")
    with pytest.raises(BadInput, match="loop direct is not one of a Llama"):
        Decoder(load(packed), "direct")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotations_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    if rope["rope_type"] == "default":
        wanted = 5e5 ** -(torch.arange(0, 128, 2).double() / 128)
    else:
        wanted = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")[0].double()
    torch.testing.assert_close(frequencies(config.to_dict(), 128).double(), wanted, rtol=1e-6, atol=0)


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    packed = make(tmp_path, "llama").packed
    code = (
        "import sys, torch\n"
        "from aerogel.kernels.decode.loop import Decoder\n"
        "from aerogel.model.direct import load_to_decode\n"
        "import aerogel.cli.generate, aerogel.eval.run, aerogel.model.pipeline\n"
        f"steps = list(Decoder(load_to_decode({str(packed)!r})).stream([torch.tensor([3, 4])], 3))\n"
        "heavy = 'transformers torch._dynamo torch._inductor sympy scipy triton accelerate'.split()\n"
        "found = set(heavy) & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(found)) or int(len(steps) != 3))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
