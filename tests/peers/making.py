"""What the scripts that make peers' checkpoints share: a tiny model, its inputs, and how a case is recorded.

These scripts run in the environments of the peers, which know nothing of aerogel: only torch, transformers and
safetensors may be imported here. One case is a folder

    PEER/CASE/checkpoint/      what the peer wrote
    PEER/CASE/decoded.safetensors   every quantized weight as the peer decodes it (`NAME.weight` [N, K]),
                                    and `logits` [2, 11, vocabulary] of the peer's own loaded model for `ids` [2, 11],
                                    in the dtype in which it computed them
    PEER/CASE/case.json        versions, and in words what decoded and what computed
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
"""Whole 128 x 128 blocks, since compressed-tensors decodes no others."""


def save_tiny(folder: Path, dtype: torch.dtype) -> Path:
    """A random two-block Llama with a tokenizer, large enough weights that each of them matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    words |= {f"w{index}": index for index in range(len(words), VOCABULARY)}
    tool = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tool, **special).save_pretrained(folder)
    return folder


def calibration(vocabulary: int, rows: int = 16, length: int = 64) -> torch.Tensor:
    """Random token ids, int64 [rows, length]."""
    return torch.randint(4, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def test_ids(vocabulary: int) -> torch.Tensor:
    """The ids whose logits are compared, int64 [2, 11]."""
    return torch.randint(4, vocabulary, (2, 11), generator=torch.Generator().manual_seed(0))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """[2, 11, vocabulary] of `test_ids`, in the dtype that the model computes in."""
    with torch.no_grad():
        return model(test_ids(model.config.vocab_size)).logits


def dense_with(folder: Path, *weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The dense model in `folder`, in float32, with what `weights` name replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in (item for some in weights for item in some.items()):
            if name in own:
                own[name].copy_(weight)
    return model


def record(case: Path, weights: Mapping[str, torch.Tensor], logits: torch.Tensor, vocabulary: int, **about: Any) -> None:
    """Writes what the peer decodes and computes beside its checkpoint."""
    tensors = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
    save_file({**tensors, "logits": logits.cpu().contiguous(), "ids": test_ids(vocabulary)}, case / "decoded.safetensors")
    names = ("torch", "transformers", "compressed-tensors", "llmcompressor", "auto-round", "gptqmodel", "hqq")
    names += ("nvidia-modelopt", "gpt-oss")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    (case / "case.json").write_text(json.dumps({"versions": versions, **about}, indent=1))


def main(peer: str, cases: Mapping[str, Any], make: Callable[[Path, Path, Any], None], dtype: torch.dtype) -> None:
    """Makes the cases into OUT/PEER: of the tiny model, or with `--model` of another one.

    A case that fails is recorded with its error and ends the script with 1 once the others are done.
    """
    parser = argparse.ArgumentParser(description=f"Checkpoints made by {peer}.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="a checkpoint to compress in place of the tiny random model")
    parser.add_argument("--case", action="append", choices=list(cases), help="only these")
    given = parser.parse_args()
    root = given.out / peer if given.model is None else given.out / f"{peer}-{given.model.name}"
    source = given.model or save_tiny(given.out / f"dense-{str(dtype).removeprefix('torch.')}", dtype)
    failed = []
    for name in given.case or cases:
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            make(source, folder, cases[name])
        except Exception as error:
            failed.append(name)
            (folder / "failed.txt").write_text(f"{type(error).__name__}: {error}\n")
            print(f"{peer} {name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{root}: {len(given.case or cases) - len(failed)} made, {len(failed)} failed {failed or ''}")
    sys.exit(bool(failed))


def tokenizer_of(source: Path) -> Any:
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(source)
