from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.zoo import build
from torch import nn

from aerogel.errors import BadInput
from aerogel.eval import memory, speed
from aerogel.eval.decode import decode, facts
from aerogel.eval.machine import machine, versions
from aerogel.eval.settings import BenchSettings, QualitySettings
from aerogel.eval.significance import Spread
from aerogel.kernels.decode.loop import Decoder

Make = Callable[..., Any]


@pytest.mark.parametrize("loop", ["auto", "fused", "masked", "plain"])
def test_decoding_is_greedy_and_equals_the_whole_forward_pass(tiny_llama: Make, windows: Make, loop: Any) -> None:
    model, ids = tiny_llama(), windows(2, 6)
    decoder = Decoder(model, loop)
    result = decode(decoder, ids, 5)
    assert facts(decoder)["loop"] == ("fused" if loop == "auto" else loop)
    expected = ids
    with torch.inference_mode():
        for _ in range(5):
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(result.tokens_BR, expected[:, 6:])
    assert result.first_seconds > 0
    assert result.rest_seconds > 0


@pytest.mark.parametrize("name", ["gpt2", "falcon", "gemma2", "mixtral", "mamba2"])
def test_every_kind_of_cache_is_carried_along(name: str) -> None:
    model, ids = build(name), torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = ids
    with torch.inference_mode():
        for _ in range(3):
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(decode(Decoder(model), ids, 3).tokens_BR, expected[:, 6:])


def test_dense_and_compressed_take_turns(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"dense": tiny_llama(), "compressed": tiny_llama(noise=0.1)}
    turns: list[str] = []
    clock = iter(range(1, 100))

    def measured(decoder: Decoder, ids: torch.Tensor, settings: BenchSettings) -> dict[str, float]:
        turns.append(next(name for name, candidate in models.items() if candidate is decoder.model))
        assert tuple(ids.shape) == (2, settings.prompt)
        return dict.fromkeys(speed.QUANTITIES, float(next(clock)))

    monkeypatch.setattr(speed, "measure", measured)
    settings = BenchSettings(batch=(2,), prompt=4, new_tokens=2, repeats=3, warmup=1, loads=1)
    found: Any = speed.time_models({name: (lambda model=model: model) for name, model in models.items()}, settings)
    assert turns == ["dense", "compressed", "compressed", "dense"] * 2
    row = found["rows"][0]
    assert row["dense"]["decode_tokens_per_second"]["samples"] == [4, 5, 8]
    assert row["compressed"]["decode_tokens_per_second"]["samples"] == [3, 6, 7]
    assert row["speedup"]["decode"]["samples"] == pytest.approx([3 / 4, 6 / 5, 7 / 8])
    assert row["speedup"]["first_token"]["median"] == pytest.approx(8 / 7)


def test_a_tiny_benchmark_end_to_end(tiny_llama: Make) -> None:
    steps: list[str] = []
    settings = BenchSettings(batch=(1, 3), prompt=6, new_tokens=3, repeats=2, warmup=0, loads=2)
    found: Any = speed.time_models(
        {"dense": tiny_llama, "compressed": tiny_llama}, settings, lambda stage, done, total, *_: steps.append(stage)
    )
    assert [row["batch"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        for name in ("dense", "compressed"):
            assert row[name]["ran"]["loop"] == "fused"
            for quantity in speed.QUANTITIES:
                spread = row[name][quantity]
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]
                assert len(spread["samples"]) == 2
    assert len(found["load_seconds"]["compressed"]["samples"]) == 2
    assert found["interleaved"]
    assert found["memory"]["dense"] == found["memory"]["compressed"]
    assert {"load", "bench: batch 3"} <= set(steps)


def test_one_model_alone_has_no_speedup(tiny_llama: Make) -> None:
    settings = BenchSettings(prompt=4, new_tokens=2, repeats=1, warmup=0, loads=1)
    found: Any = speed.time_models({"model": tiny_llama}, settings)
    assert "speedup" not in found["rows"][0]
    assert not found["interleaved"]


def test_more_tokens_than_positions_are_refused(tiny_llama: Make) -> None:
    with pytest.raises(BadInput, match="2048 positions"):
        speed.time_models({"dense": tiny_llama}, BenchSettings(prompt=2000, new_tokens=100, loads=1))


def test_prompts_come_from_the_seed() -> None:
    assert torch.equal(speed.prompt(100, 2, 5, 3), speed.prompt(100, 2, 5, 3))
    assert not torch.equal(speed.prompt(100, 2, 5, 3), speed.prompt(100, 2, 5, 4))


@pytest.mark.parametrize(
    "bad",
    [
        {"batch": ()},
        {"batch": (0,)},
        {"new_tokens": 1},
        {"repeats": 0},
        {"warmup": -1},
        {"loop": "none"},
        {"numerics": "half"},
    ],
)
def test_settings_that_cannot_be_measured(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"bench.{next(iter(bad))}"):
        BenchSettings(**bad)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"limit": 0}, {"shots": -1}, {"numerics": "half"}])
def test_quality_settings_that_cannot_be_measured(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"evaluate.{next(iter(bad))}"):
        QualitySettings(**bad)


def test_storages_are_counted_once() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(8, 4))
    module.tied = module.weight
    module.register_buffer("view", module.weight.detach()[2:4])
    module.register_buffer("other", torch.zeros(3, dtype=torch.int8))
    assert memory.tensor_bytes(module) == 8 * 4 * 4 + 3


def test_disk_counts_weights_apart_and_hidden_files_not(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"x" * 10)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "other.safetensors").write_bytes(b"x" * 1000)
    assert memory.disk_bytes(tmp_path) == {"total": 110, "weights": 100}
    assert memory.disk_bytes(tmp_path / "model.safetensors") == {"total": 100, "weights": 100}


def test_peak_memory_is_at_least_what_torch_needs() -> None:
    assert (memory.peak_bytes() or 1 << 30) > 50 << 20


def test_machine_facts_name_no_place_and_no_person() -> None:
    facts = machine()
    assert facts["cores"]
    assert not any(part in str(facts) for part in ("/home", "/root", "hostname"))
    assert versions()["torch"] == torch.__version__


def test_spread_of_equal_values_is_zero() -> None:
    assert Spread.of([2.0] * 4).iqr == 0
