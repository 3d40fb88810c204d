"""One checkpoint in vLLM, in a process that knows nothing of aerogel: `served.py` starts it.

    python benchmarks/served_vllm.py FOLDER PROMPTS.safetensors FOUND --new 16

Generates greedily behind every prompt and keeps the whole distribution of every token, of the prompt too. FOUND gets

    FOUND.safetensors   ids [B, T + new]          prompts and what was generated
                        logprobs [B, T + new - 1, vocabulary]   float32, of the token that follows
    FOUND.json          vLLM's version, and for each kind of layer the scheme and the kernel that vLLM chose
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is looked into from this process
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # the likeliest token needs none, and it is imported for any

import torch
from safetensors.torch import load_file, save_file

CACHE_BYTES = 64 << 20
"""Keys and values; given, so that vLLM does not measure free memory, which others that run beside it change."""


def chosen(model: torch.nn.Module) -> dict[str, int]:
    """How many layers run how: the method and scheme of each, and the kernel inside it where there is one."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(module, "scheme", None) or method
        inner = [type(scheme).__name__, *_kernels(scheme), *(() if scheme is method else _kernels(method))]
        found[f"{type(module).__name__}: {' / '.join(dict.fromkeys(inner))}"] += 1
    return dict(sorted(found.items()))


def _kernels(holder: object) -> list[str]:
    """Names of what a method holds that multiplies: kernels of linears, and the backend of experts."""
    named = []
    for name, value in vars(holder).items():
        if name.endswith("backend") and value is not None:
            named.append(str(value))
        elif "kernel" in name or type(value).__name__.endswith("Kernel"):
            named.append(type(value).__name__)
    return [name for name in named if name not in ("NoneType", "bool", "str")]


def rows(distributions: list[Any], vocabulary: int) -> torch.Tensor:
    """[len(distributions), vocabulary] from vLLM's mappings of token to logarithm of probability."""
    found = torch.full((len(distributions), vocabulary), float("nan"))
    for row, distribution in zip(found, distributions, strict=True):
        tokens = list(distribution)
        row[tokens] = torch.tensor([distribution[token].logprob for token in tokens])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path, help="safetensors with int64 `ids` [B, T]")
    parser.add_argument("found", type=Path)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--attention", default=None, help="an attention backend of vLLM's, such as TRITON_ATTN")
    asked = parser.parse_args()

    import vllm

    ids = load_file(asked.prompts)["ids"]
    attention = {} if asked.attention is None else {"attention_config": {"backend": asked.attention}}
    server = vllm.LLM(
        str(asked.folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=ids.shape[1] + asked.new,
        max_num_seqs=8,
        max_logprobs=-1,
        gpu_memory_utilization=0.02,
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
        **attention,
    )
    vocabulary = json.loads((asked.folder / "config.json").read_text("utf-8"))["vocab_size"]
    wanted = vllm.SamplingParams(
        temperature=0.0, max_tokens=asked.new, ignore_eos=True, logprobs=-1, prompt_logprobs=-1, detokenize=False
    )
    outputs = server.generate([{"prompt_token_ids": row} for row in ids.tolist()], wanted, use_tqdm=False)
    both = [[*one.prompt_token_ids, *one.outputs[0].token_ids] for one in outputs]
    distributions = [rows([*one.prompt_logprobs[1:], *one.outputs[0].logprobs], vocabulary) for one in outputs]
    save_file({"ids": torch.tensor(both), "logprobs": torch.stack(distributions)}, asked.found.with_suffix(".safetensors"))
    facts = {"vllm": vllm.__version__, "layers": server.apply_model(chosen)[0]}
    asked.found.with_suffix(".json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
