"""Tiny random models, a tiny tokenizer and a whole report, made on the spot: what the evaluation tests run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260


def _tiny_llama(seed: int = 0, *, layers: int = 2, noise: float = 0.0, tied: bool = False) -> LlamaForCausalLM:
    """A Llama of two layers and width 32 with a vocabulary of 260; `noise` moves every weight a little."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.train(mode=False)
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return model


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the three special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {
        "<s>": 256,
        "</s>": 257,
        "<pad>": 258,
    }
    tool = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tool.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tool, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )


def _windows(count: int = 5, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 [count, length]."""
    return torch.randint(VOCABULARY - 4, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(seed, noise=..., tied=...)` makes a model."""
    return _tiny_llama


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes."""
    return _byte_tokenizer()


@pytest.fixture(scope="session")
def windows() -> Callable[..., torch.Tensor]:
    """`windows(count, length)` makes token ids."""
    return _windows


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a dense checkpoint and of a slightly different one, with tokenizer."""
    for name, noise in (("dense", 0.0), ("compressed", 0.05)):
        _tiny_llama(noise=noise).save_pretrained(tmp_path / name)
        _byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path / "dense", tmp_path / "compressed"


def _spread(median: float) -> dict[str, Any]:
    return {"median": median, "min": 0.9 * median, "max": 1.1 * median, "iqr": 0.1 * median, "samples": [median] * 3}


def _timings(speed: float) -> dict[str, Any]:
    names = ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
    return {name: _spread(speed) for name in names}


def _tensor(name: str, fate: str, shape: list[int], bits: float) -> dict[str, Any]:
    weights = shape[0] * (shape[1] if len(shape) > 1 else 1)
    sizes = {"bytes": int(weights * bits / 8), "source_bytes": 2 * weights}
    return {"name": name, "fate": fate, "why": "gptq", "shape": shape, "bits_per_weight": bits, **sizes}


@pytest.fixture
def report() -> dict[str, Any]:
    """A report with every part in it."""
    accuracy = {"acc": {"value": 0.5, "se": 0.01}}
    pair = {"both_right": 40, "both_wrong": 40, "lost": 12, "gained": 8, "p": 0.5}
    task = {"documents": 100, "documents_available": 100, "source": "hub: x", "split": "test", "metric": "acc"}
    loss = {"perplexity": 10.0, "perplexity_se": 0.1, "loss": 2.3, "loss_se": 0.01, "loss_by_window": [2.2, 2.4]}
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    layers = [{"name": name, "loss": 0.01, "bytes": 512, "source_bytes": 2048} for name in names]
    return {
        "aerogel": "0.0.1",
        "command": "aerogel run w4.yaml model",
        "model": "maker/model",
        "recipe": {"about": "four bits", "stages": [{"quantize": {"method": "gptq", "bits": 4}}]},
        "machine": {"cpu": "a processor", "cores": 2, "memory": 1 << 34, "gpu": None},
        "versions": {"python": "3.11"},
        "seconds": 12.5,
        "calibration": {"source": "text", "samples": 4, "sequence_length": 8, "seed": 0, "sha256": "0" * 64},
        "blocks": [{"name": "model.layers.0", "relative_error": 0.02, "seconds": 1.5, "layers": layers}],
        "tensors": [
            _tensor("model.embed_tokens.weight", "kept", [260, 32], 16),
            *(_tensor(f"{name}.weight", "compressed", [32, 32], 4.25) for name in names),
            _tensor("model.norm.weight", "kept", [32], 16),
        ],
        "experts": [{"block": 0, "module": "model.layers.0.mlp.experts", "tokens": [3, 9]}],
        "size": {"source_bytes": 4096, "bytes": 1024, "compression": 4.0, "bits_per_weight": 4.25},
        "evaluation": {
            "perplexity": {"source": "text", "windows": 2, "sequence_length": 8, "bos": False, "numerics": "stored"}
            | {"dense": loss, "compressed": loss, "increase": 0.01, "increase_se": 0.001},
            "divergence": {"kl": 0.04, "kl_se": 0.002, "kl_median": 0.03, "kl_p99": 0.2, "top1": 0.9, "top1_se": 0.01}
            | {"kl_by_window": [0.03, 0.05]},
            "tasks": {"piqa": {**task, "dense": accuracy, "compressed": accuracy, "drop": 0.04, "paired": {"acc": pair}}},
            "memory": {"dense": {"bytes": 4000}, "compressed": {"bytes": 1200}},
        },
        "bench": {
            "device": "cpu",
            "threads": 1,
            "prompt": 8,
            "new_tokens": 4,
            "repeats": 3,
            "load_seconds": {"dense": _spread(1.0), "compressed": _spread(0.5)},
            "memory": {"dense": {"bytes": 4000}, "compressed": {"bytes": 1200}},
            "disk": {"dense": {"total": 5000, "weights": 4096}, "compressed": {"total": 2000, "weights": 1024}},
            "rows": [
                {"batch": batch, "dense": _timings(1.0), "compressed": _timings(2.0)}
                | {"speedup": {name: _spread(2.0 / batch**0.5) for name in ("first_token", "prefill", "decode")}}
                for batch in (1, 4)
            ],
        },
    }
