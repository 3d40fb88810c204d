"""Reads checkpoints in auto-round's own format: the GPTQ or AWQ layout under `quant_method: auto-round`.

`packing_format` says which layout, `extra_config` which layers differ from the config's own numbers:

    auto_round:auto_gptq                 GPTQ, version 1 (zero points less one); its default for symmetric codes
    auto_round, auto_round:gptqmodel     GPTQ with zero points as they are (version 2)
    auto_round:auto_awq                  AWQ gemm; its default for asymmetric 4-bit codes

So there is nothing to decode here that `gptq.py` and `awq.py` do not decode: this file only translates the config.
Source: auto-round 0.16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aerogel.pack.awq import Awq
from aerogel.pack.gptq import Gptq
from aerogel.pack.scheme import NOT_SERVED, NotServed
from aerogel.pack.source import Source

GPTQ_VERSIONS = {"auto_gptq": "gptq", "gptq": "gptq", "auto_round": "gptq_v2", "gptqmodel": "gptq_v2"}
NUMBERS = ("bits", "group_size", "sym")
KEPT_BITS = 16
"""A layer with this many bits or more is not quantized."""


def auto_round(config: Mapping[str, Any]) -> Source:
    """The reader for a `quantization_config` with `quant_method: auto-round`.

    Raises:
        NotServed: another layout, float codes, quantized activations, or an AWQ layout whose layers differ.
    """
    layout = str(config.get("packing_format") or "auto_round:auto_gptq").removeprefix("auto_round:")
    if not str(config.get("data_type", "int")).startswith("int") or int(config.get("act_bits") or KEPT_BITS) < KEPT_BITS:
        kind = f"data_type {config.get('data_type', 'int')!r} and act_bits {config.get('act_bits')}"
        raise NotServed(f"an auto-round checkpoint with {kind} is {NOT_SERVED}, only int weights with activations as they are")
    base = {name: config[name] for name in NUMBERS if name in config}
    own = {
        pattern: {name: numbers[name] for name in NUMBERS if numbers.get(name) is not None}
        for pattern, numbers in (config.get("extra_config") or {}).items()
        if int(numbers.get("bits") or 0) < KEPT_BITS
    }
    if layout in GPTQ_VERSIONS:
        dynamic = {f"+:{_expression(pattern)}": numbers for pattern, numbers in own.items()}
        return Gptq({**base, "checkpoint_format": GPTQ_VERSIONS[layout], "dynamic": dynamic})
    if layout in ("auto_awq", "awq"):
        if any({**base, **numbers} != base for numbers in own.values()):
            raise NotServed(f"an auto-round checkpoint in the AWQ layout whose layers differ is {NOT_SERVED}")
        return Awq({**base, "version": "gemm", "zero_point": not base.get("sym", True)})
    raise NotServed(f"auto-round packing_format {layout!r} is {NOT_SERVED}, only the GPTQ and AWQ layouts")


def _expression(pattern: str) -> str:
    """A key of `extra_config`, a layer's name or a regular expression, as one that matches whole names."""
    plain = re.fullmatch(r"[\w.]+", pattern)
    return f"(?:{re.escape(pattern) if plain else pattern})$"
