"""Makes gpt-oss checkpoints in MXFP4: `python tests/peers/make_gpt_oss.py OUT`, in its own environment.

Nobody publishes the writer of these files, so codes are chosen here, by the OCP rule, and laid out twice: under the names of
transformers, and under those of OpenAI's own release (its folder `original`, which we refuse). OpenAI's `Checkpoint` decodes
the second; transformers' `Mxfp4Config(dequantize=True)` the first, and the script stops unless both give the same bits. The
logits are those of transformers' dequantized model in float32, and the script stops unless OpenAI's model, which computes in
bfloat16, is within 10 % of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out

import making
import torch
from gpt_oss.torch.model import Transformer
from gpt_oss.torch.weights import FP4_VALUES, Checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

GROUP, CPU = 32, torch.device("cpu")
SHAPE = {
    "vocab_size": making.VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "pad_token_id": 3,
    "eos_token_id": 2,
}
CASES: dict[str, int] = {"mxfp4": 0, "mxfp4-wide": 24}
"""How many binades, up and down, the scales of groups are spread over beside what the weights give."""
OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
INSIDE = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
"""OpenAI's names and those of transformers; q, k and v are one there."""
LEFT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def make(source: Path, case: Path, binades: int) -> None:
    """One case: encode, write both layouts, decode and compute with both readers, record."""
    del source  # a Llama
    torch.manual_seed(0)
    config = GptOssConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "bias" in name or parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = encoded(tensor.transpose(1, 2).float(), binades)
        else:
            tensors[name] = tensor.contiguous()
    written = write(case / "checkpoint", tensors, said(config))
    original = write(case / "original", renamed(tensors, config), original_words(config))
    loaded = AutoModelForCausalLM.from_pretrained(
        written, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    found = {}
    checkpoint = Checkpoint(str(original), CPU)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in (("gate_up_proj", "mlp1_weight"), ("down_proj", "mlp2_weight")):
            name = f"model.layers.{layer}.mlp.experts.{ours}"
            found[name] = checkpoint.get(f"block.{layer}.mlp.{theirs}").transpose(1, 2)
            if not torch.equal(found[name], loaded.get_parameter(name).data):
                raise RuntimeError(f"transformers and OpenAI decode {name} differently")
    logits = making.logits_of(loaded.float())
    with torch.no_grad():
        own = torch.stack([Transformer.from_checkpoint(str(original), CPU)(row) for row in making.test_ids(config.vocab_size)])
    apart = float((own.float() - logits).norm() / logits.norm())
    if apart > 0.1:
        raise RuntimeError(f"the logits of OpenAI's model are {apart:.3f} from those of transformers")
    by = "transformers, dequantized, in float32"
    making.record(
        case, found, logits, config.vocab_size, decoded_by="gpt_oss.torch.weights", computed_by=by, openai_logits_apart=apart
    )


def encoded(w_ENK: torch.Tensor, binades: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks uint8 [E, N, G, 16] and scales uint8 [E, N, G] of weights: 2^(floor(log2 peak) - 2), the nearest number each."""
    grouped = w_ENK.unflatten(2, (-1, GROUP))
    exponent = torch.floor(torch.log2(grouped.abs().amax(3))) - 2
    places = torch.arange(exponent.numel()).reshape(exponent.shape)
    numbers = torch.tensor(FP4_VALUES)
    codes = (grouped / torch.exp2(exponent)[..., None]).unsqueeze(-1).sub(numbers).abs().argmin(-1).to(torch.uint8)
    if binades:
        exponent = exponent + places % (2 * binades + 1) - binades - 10  # small ones mostly: logits stay finite
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def said(config: GptOssConfig) -> dict[str, Any]:
    """config.json in the layout of transformers."""
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": LEFT}
    words = {**config.to_dict(), "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    return {**words, "quantization_config": quantization}


def original_words(config: GptOssConfig) -> dict[str, Any]:
    """config.json of OpenAI's own layout."""
    shared = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads")
    rope = config.rope_parameters
    return {
        **{name: getattr(config, name) for name in (*shared, "num_key_value_heads", "sliding_window")},
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "swiglu_limit": 7.0,
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def renamed(tensors: Mapping[str, torch.Tensor], config: GptOssConfig) -> dict[str, torch.Tensor]:
    """The same tensors under OpenAI's names, q, k and v in one."""
    found = {ours: tensors[theirs] for ours, theirs in OUTSIDE.items()}
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        found |= {f"block.{layer}.{ours}": tensors[f"{stem}.{theirs}"] for ours, theirs in INSIDE.items()}
        for leaf in ("weight", "bias"):
            parts = [tensors[f"{stem}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            found[f"block.{layer}.attn.qkv.{leaf}"] = torch.cat(parts)
    return found


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """A folder with both files."""
    folder.mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    making.main("gpt-oss", CASES, make, torch.bfloat16)
