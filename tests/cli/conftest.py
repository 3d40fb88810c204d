"""A tiny random Llama with a tiny tokenizer, and `aerogel` called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

WORDS = [f"w{i}" for i in range(90)]


@dataclass
class Outcome:
    """What one call of the command line left behind."""

    code: int
    stdout: str
    stderr: str


Aerogel = Callable[..., Outcome]


@pytest.fixture
def aerogel(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Aerogel:
    """Calls `aerogel ARGUMENTS` in an empty working directory, offline."""
    from aerogel.cli.app import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        found = capfd.readouterr()
        return Outcome(code, found.out, found.err)

    return call


def make_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of 96 words with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", "user", "assistant", *WORDS])}
    tool = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tool, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant "
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llama blocks of width 32 in float32, tied, with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty thousand words that the tokenizer knows."""
    import random

    words = random.Random(0).choices(WORDS, k=20_000)
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A recipe that does everything on the tiny model in a second or two."""
    file = tmp_path_factory.mktemp("recipes") / "small.yaml"
    file.write_text(
        "aerogel: 1\n"
        "about: everything, small\n"
        f"calibration: {{source: {json.dumps(str(text))}, samples: 4, sequence_length: 32}}\n"
        "stages:\n"
        "  - quantize: {method: gptq, bits: 4, group_size: 16}\n"
        "evaluate:\n"
        f"  perplexity: {{source: {json.dumps(str(text))}, windows: 2, sequence_length: 16}}\n"
        "bench: {batch: [1], prompt: 4, new_tokens: 3, repeats: 1, warmup: 0, loads: 1}\n"
        "gate: {max_kl: 10.0, min_compression: 1.01}\n"
    )
    return file
