"""Serves checkpoints with vLLM: `python tests/peers/serve_vllm.py FOLDER...`, in an environment of its own.

Reading the config, choosing a scheme, making room for the tensors, loading them and stacking q, k, v and gate, up is vLLM's own
code, and so is everything around the linears. Its products for CPUs are few, and the int8 one saturates on processors without
VNNI. So each checkpoint is served twice: by vLLM as it is (`own`), and with the products below, which decode what vLLM holds
after loading and multiply in the type of the model (`decoded`). Beside a folder, since vLLM reads all weights in it, come

    FOLDER.json                  {"vllm": version, "own": null or where and why it stopped, "decoded": the same}
    FOLDER.own.safetensors       `logits` [2, 11, vocabulary] in float32 for `making.test_ids`, where it ran
    FOLDER.decoded.safetensors   the same

Shape legend: N out features of a stacked linear, K in features, G groups along K.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps a script's folder out
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")

import making
import torch
import vllm
from safetensors.torch import save_file
from torch import Tensor
from vllm import _custom_ops
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import break_fp4_bytes, dequantize_to_dtype
from vllm.platforms import PlatformEnum

PROMPT_LENGTH = 64
"""Tokens that vLLM makes room for."""
E4M3_MAX = 448.0


class Decoded:
    """A kernel in vLLM's sense that takes everything: what it multiplies with is what `decode` finds in the layer."""

    def __init__(self, config: Any, *_: Any, **named: Any) -> None:
        self.config = config

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def is_supported(cls, _capability: int | None = None) -> tuple[bool, None]:
        return True, None

    @classmethod
    def can_implement(cls, _config: Any) -> tuple[bool, None]:
        return True, None

    def input_quant_key(self) -> None:
        """Nothing before this kernel rounds its inputs."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.decoded_NK = self.decode(layer)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(self.rounded(layer, x), layer.decoded_NK.to(x.dtype), bias)

    def decode(self, layer: Any) -> Tensor:
        """float32 [N, K]."""
        raise NotImplementedError

    def rounded(self, layer: Any, x: Tensor) -> Tensor:
        """The inputs as the scheme wants them."""
        return x


class Packed(Decoded):
    """pack-quantized: a dense stream of bits along each row, zero points along the outputs."""

    def decode(self, layer: Any) -> Tensor:
        width, K = self.config.weight_type.size_bits, self.config.partition_weight_shape[0]
        codes_NK = unpack(layer.weight_packed.data, width, K)
        scale_NG = layer.weight_scale.data.float()
        zero_NG = torch.full_like(scale_NG, 2 ** (width - 1))
        if self.config.zero_points:
            zero_NG = unpack(layer.weight_zero_point.data.t(), width, len(codes_NK)).t().float()
        group = K // scale_NG.shape[1]
        return (codes_NK - zero_NG.repeat_interleave(group, 1)) * scale_NG.repeat_interleave(group, 1)

    def rounded(self, layer: Any, x: Tensor) -> Tensor:
        wanted = getattr(layer, "_humming_input_quant_config", None)
        if wanted is None:
            return x
        assert (wanted["num_bits"], wanted["type"], wanted["strategy"], wanted["symmetric"]) == (8, "int", "token", True)
        return in_int8(x)


class Float8(Decoded):
    """float-quantized: e4m3 with a scale per output, tensor or block of 128 x 128; inputs as they are, or in e4m3."""

    def decode(self, layer: Any) -> Tensor:
        blocks = layer.weight_block_size is not None
        weight_NK = layer.weight.data.float() if blocks else layer.weight.data.t().float()
        scale = next(getattr(layer, name) for name in ("weight_scale", "weight_scale_inv") if hasattr(layer, name)).data.float()
        if blocks:
            for dim, size in enumerate(layer.weight_block_size):
                scale = scale.repeat_interleave(size, dim)
            scale = scale[: weight_NK.shape[0], : weight_NK.shape[1]]
        return weight_NK * scale

    def rounded(self, layer: Any, x: Tensor) -> Tensor:
        if layer.scheme.__class__.__name__ == "CompressedTensorsW8A16Fp8":
            return x
        parts = x if layer.weight_block_size is None else x.unflatten(-1, (-1, layer.weight_block_size[1]))
        scale = layer.input_scale if layer.input_scale is not None else parts.abs().amax(-1, keepdim=True) / E4M3_MAX
        return (in_e4m3(parts, scale)[0].to(x.dtype) * scale).reshape(x.shape)


class Int8(Decoded):
    """int-quantized: 8 bits with a scale per output, inputs in int8 with one for each token or for all."""

    def decode(self, layer: Any) -> Tensor:
        return layer.weight.data.float() * layer.weight_scale.data.float()

    def rounded(self, layer: Any, x: Tensor) -> Tensor:
        return in_int8(x, layer.input_scale)


class Nvfp4(Decoded):
    """nvfp4-pack-quantized; decoded by vLLM."""

    def decode(self, layer: Any) -> Tensor:
        return dequantize_to_dtype(
            layer.weight.data, layer.weight_scale.data, layer.weight_global_scale.data, torch.float32, swizzle=False
        )


class Mxfp4(Decoded):
    """mxfp4-pack-quantized; vLLM's own decoder asks for another package."""

    def decode(self, layer: Any) -> Tensor:
        values_NK = break_fp4_bytes(layer.weight.data, torch.float32)
        return values_NK * torch.exp2(layer.weight_scale.data.float() - 127).repeat_interleave(32, 1)


def unpack(words: Tensor, width: int, count: int) -> Tensor:
    """int32 [R, words], a stream of bits from the lowest on -> unsigned codes of `width` bits, int64 [R, count]."""
    stream = (words.long().unsqueeze(-1) >> torch.arange(32)) & 1
    bits = stream.flatten(1)[:, : count * width].unflatten(1, (count, width))
    return (bits << torch.arange(width)).sum(-1)


def in_int8(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x on a grid of 255 numbers, with a scale for each token if none is given."""
    scale = x.abs().amax(-1, keepdim=True) / 127 if scale is None else scale
    return (x / scale).round().clamp(-128, 127) * scale


def in_e4m3(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale, as vLLM's operator of the GPU gives them."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def decode_on_cpu() -> None:
    """Puts the kernels above where vLLM looks for those of a CPU, and an operator that it calls while loading."""
    cpu = PlatformEnum.CPU
    _custom_ops.scaled_fp8_quant = in_e4m3
    kernels._POSSIBLE_INT8_KERNELS[cpu] = [Int8]
    kernels._POSSIBLE_KERNELS[cpu] = [Packed]
    kernels._POSSIBLE_WFP8A16_KERNELS[cpu] = [Float8]
    kernels._POSSIBLE_FP8_KERNELS[cpu] = [Float8]
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[cpu] = [Float8]
    kernels._POSSIBLE_MXFP4_KERNELS[cpu] = [Mxfp4]
    kernels._POSSIBLE_MXFP8_KERNELS[cpu] = [EmulationMxfp8LinearKernel]
    kernels.MarlinNvFp4LinearKernel = Nvfp4  # the one that it takes for weights alone


def serve(folder: Path) -> Tensor:
    """Logits [2, 11, vocabulary] of `making.test_ids`, as a user gets them: the prompt's, and those of the next token."""
    model = vllm.LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=PROMPT_LENGTH,
        max_num_batched_tokens=PROMPT_LENGTH,
        max_num_seqs=2,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
    )
    ids = making.test_ids(making.VOCABULARY)
    wanted = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
    found = model.generate([{"prompt_token_ids": row} for row in ids.tolist()], wanted, use_tqdm=False)
    rows = [[*each.prompt_logprobs[1:], each.outputs[0].logprobs[0]] for each in found]
    return torch.tensor([[[at[token].logprob for token in range(making.VOCABULARY)] for at in row] for row in rows])


def beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{ending}")


def attempt(folder: Path, name: str) -> str | None:
    """Serves, writes the logits, and says why not where it stopped: the error, and the functions of vLLM that it came from."""
    stopped = None
    try:
        save_file({"logits": serve(folder)}, beside(folder, f"{name}.safetensors"))
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "vllm" in frame.filename]
        places = " > ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in own[-4:])
        stopped = f"{places}: {type(error).__name__}: {error}"
    gc.collect()
    cleanup_dist_env_and_memory()
    return stopped


def main() -> None:
    """All folders as vLLM is; then all of them decoded."""
    parser = argparse.ArgumentParser(description="Loads and runs checkpoints in vLLM.")
    parser.add_argument("folders", type=Path, nargs="+")
    folders = parser.parse_args().folders
    own = {folder: attempt(folder, "own") for folder in folders}
    decode_on_cpu()
    for folder in folders:
        said = {"vllm": vllm.__version__, "own": own[folder], "decoded": attempt(folder, "decoded")}
        beside(folder, "json").write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
