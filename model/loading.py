"""Loads compressed checkpoints into transformers models that run on aerogel's kernels.

There is one mechanism, transformers' own: `register` puts an HfQuantizer in the place of the stock ones for
compressed-tensors, gptq and awq, and adds one for "aerogel". `AutoModelForCausalLM.from_pretrained` then does the rest:

    config.json --quantization_config--> a `Source` (or the stock quantizer, for what aerogel does not run)
    headers of the files --plan--> linears replaced by `kernels.Linear`, still on the meta device
    tensors --`Decoder`, a weight conversion--> packed buffers, or decoded into a fused parameter
    after loading --`prepare`--> each layer in the layout of the kernel that will run it

No optional package is needed for any of it. Memory is that of the packed weights, plus one weight while it is converted.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aerogel.errors import BadInput
from aerogel.kernels.decode.merge import merge as merge_linears
from aerogel.kernels.decode.merge import merging
from aerogel.model.quantizer import first_line, register
from aerogel.model.source import check_config
from aerogel.model.stored_bits import at_bits, bits_wanted
from aerogel.model.trim import trim
from aerogel.pack.modelopt import config_beside
from aerogel.pack.planes import narrowed

__all__ = ["at_bits", "load", "register"]


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    merge: bool = False,
    bits: int | None = None,
) -> PreTrainedModel:
    """A compressed (or dense) checkpoint as a model ready to run.

    Args:
        path: a local folder or a hub id.
        device: where the weights go.
        dtype: of everything that is not packed, and of activations; the checkpoint's own unless given.
        merge: make one linear of those that read the same input (q, k, v; gate, up), which decodes faster. The model
            keeps its modules and its state dict, but takes no new weights.
        bits: how many planes to read of weights that are stored as bit planes; the rest is not read from the disk. All
            of them unless given here or by `at_bits`.

    Returns:
        The model in eval mode, packed linears as `aerogel.kernels.linear.Linear`.

    Raises:
        BadInput: no such checkpoint, or one that cannot be loaded as it is; the message says why.
    """
    register()
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            check_config(Path(path), trust_remote_code=True)  # which knows more of what it may be instead
        raise BadInput(f"{path} is not a checkpoint transformers can read ({first_line(error)})") from error
    bits = bits_wanted() if bits is None else bits
    stored = getattr(config, "quantization_config", None)
    if stored is None and (beside := config_beside(Path(path))) is not None:
        config.quantization_config = beside
    if bits is not None and stored is not None:
        config.quantization_config = narrowed(stored, bits)
    name = (config.architectures or [""])[0]
    family = getattr(transformers, name, AutoModelForCausalLM)
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    with merging(merge):
        loaded: Any = family.from_pretrained(path, config=config, dtype=dtype or "auto", output_loading_info=True, **placed)
    model, report = loaded
    if report["missing_keys"]:
        absent = sorted(report["missing_keys"])
        raise BadInput(f"{path} lacks {absent[0]!r} ({len(absent)} weights missing); the checkpoint is not whole, get it again")
    found: PreTrainedModel = model
    if merge:
        merge_linears(found)  # dense ones; the packed ones were merged on their way into their layout
    trim()  # a weight that was brought into another layout has left its old memory behind
    return found
