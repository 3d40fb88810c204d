"""Tiny random models, one per architecture: the smallest configs that still have every part of the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ZOO: dict[str, dict[str, Any]] = {
    "llama": {**SMALL},
    "mistral": {**SMALL, "sliding_window": 16},
    "qwen2": {**SMALL},
    "qwen3": {**SMALL, **HEADS, "tie_word_embeddings": True},
    "gemma2": {**SMALL, **HEADS, "sliding_window": 16},
    "gemma3_text": {**SMALL, **HEADS, "sliding_window": 16, "num_hidden_layers": 3, "sliding_window_pattern": 2},
    "phi3": {**SMALL},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24},
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**SMALL},
    "falcon": {**SMALL, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": {**SMALL},
    "granite": {**SMALL, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "mixtral": {**SMALL, **MOE},
    "qwen3_moe": {**SMALL, **HEADS, **MOE},
    "deepseek_v3": {
        **SMALL,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {**SMALL, **HEADS, **MOE, "sliding_window": 16},
    "mamba2": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model called `name`, with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ZOO[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """The tiny model as an ordinary checkpoint in `folder`."""
    build(name, seed).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
