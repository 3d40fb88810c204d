"""Reads HQQ checkpoints in safetensors, `quant_method: hqq`: what transformers' HqqConfig and the library's own writer save.

    W_q     uint8 [P, g], int32 for 3 bits     codes of R = N K / g groups, in rows, several rows in a word
    scale   [R, 1], zero [R, 1]                floats of one type
    nbits, group_size, axis, shape, ...        scalars, and bytes of text: what the layer was made with

    W = ((codes - zero) * scale) as [N, K]     axis 1: a group is g consecutive inputs of one output

A word holds the rows r, r + P, r + 2 P, ..., the first in its highest bits: 8 / b rows of b = 1, 2, 4 or 8 bits in a byte, ten
rows of 3 bits in 32 bits; 5 and 6 bits take a byte each, and 1.58 bits (codes 0, 1, 2) are stored as 2. These are the
numbers of `affine-packed`, and stay packed as such. HQQ multiplies in the type of the scales and rounds the difference to it;
here only the product is rounded.

The config says bits and groups, for all layers or by tags (a layer's name without `model`, `layers` and numbers). With axis 0
a group runs over outputs of one input, which no kernel here has; pickled checkpoints are not read.
Source: hqq 0.2.8, transformers 5.17.

Shape legend: N out features, K in features, G groups along K, R = N G groups of g inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.format import SCALE_DTYPES, take
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme
from aerogel.pack.source import Columns, Source, scale_dtype
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.affine import Affine

STORED_BITS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 8: 8}
"""Bits of a code -> bits that it takes in a word."""
TERNARY = 1.58
PARTS = ("nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero")
NOTES = ("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero")


class Hqq(Source):
    """A `quantization_config` with `quant_method: hqq`."""

    suffixes: frozenset[str] = frozenset({"W_q", "scale", "zero", *PARTS, *NOTES})
    markers: ClassVar[frozenset[str]] = frozenset({"W_q"})
    index: ClassVar[str] = "g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        said = config.get("quant_config")
        if not isinstance(said, Mapping) or not said:
            raise NotServed(f"an HQQ config without quant_config is {NOT_SERVED}")
        single = "weight_quant_params" in said
        self._grids = {tag: _grid(layer) for tag, layer in ({"": said} if single else said).items() if layer is not None}

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """By the layer's tag. Raises `BadInput` where the config does not name it, `NotServed` for scales that are codes."""
        found = next((self._grids[tag] for tag in ("", *map(tag_of, names)) if tag in self._grids), None)
        if found is None:
            raise BadInput(f"{names[0]} is quantized, but quant_config has no entry for {tag_of(names[0])!r}; add it there")
        if "zero" not in header:
            raise NotServed(f"{names[0]} has no plain zero; HQQ's quantized scales and zero points are {NOT_SERVED}")
        dtype = scale_dtype(header, "scale", names[0])
        return Scheme(format="affine-packed", grid=Affine(bits=found.bits, group_size=found.group_size, scale_dtype=dtype))

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight. Raises `BadInput` where its tensors contradict each other or the config."""
        grid = scheme.grid
        if not isinstance(grid, Affine):
            raise BadInput(f"HQQ holds integers with floating zero points, not {grid}")
        N, K = (int(size) for size in take(tensors, "shape", (2,), (torch.int64,)))
        size = grid.group_size or K
        if K % size:
            raise BadInput(f"HQQ groups of {size} do not divide {K} inputs; groups that run over outputs are {NOT_SERVED}")
        _agree(tensors, grid, size)
        R = N * K // size
        scale, zero = (take(tensors, name, (R, 1), SCALE_DTYPES).reshape(N, -1) for name in ("scale", "zero"))
        return Columns(
            Codes(
                values_NK=unpack_rows(tensors["W_q"], grid.bits, R, size).reshape(N, K), scale_NG=scale, zero_NG=zero, grid=grid
            )
        )


def tag_of(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` as `self_attn.q_proj`."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def unpack_rows(words: Tensor, bits: int, R: int, size: int) -> Tensor:
    """Codes uint8 [R, size] of words [P, size], which may have been viewed as floats.

    Raises:
        BadInput: a shape that so many codes do not have.
    """
    kind = torch.int32 if bits == 3 else torch.uint8
    words = words.view(kind) if words.dtype.is_floating_point else words
    width = STORED_BITS[bits]
    per = 10 if bits == 3 else 8 // width
    take({"W_q": words}, "W_q", (-(-R // per), size), (kind,))
    mask = (1 << width) - 1
    return torch.cat([((words >> (width * i)) & mask).to(torch.uint8) for i in reversed(range(per))])[:R].contiguous()


def _agree(tensors: Mapping[str, Tensor], grid: Affine, size: int) -> None:
    """What the layer says of itself, where it does, is what the config says of it."""
    said = {name: float(tensors[name]) for name in ("nbits", "group_size", "axis") if name in tensors}
    meant = {"nbits": float(grid.bits), "group_size": float(size), "axis": 1.0}
    wrong = [name for name, value in said.items() if value != meant[name] and not (name == "nbits" and 1 < value < 2)]
    if wrong:
        raise BadInput(
            f"an HQQ layer has {wrong[0]} {said[wrong[0]]:g}, its config says {meant[wrong[0]]:g};"
            " the config does not belong to this file"
        )


def _grid(layer: Mapping[str, Any]) -> Affine:
    numbers = layer.get("weight_quant_params")
    if not isinstance(numbers, Mapping):
        raise NotServed(f"an HQQ layer without weight_quant_params is {NOT_SERVED}")
    if layer.get("scale_quant_params") or layer.get("zero_quant_params"):
        raise NotServed(f"HQQ's quantized scales and zero points are {NOT_SERVED}")
    if numbers.get("axis", 0) != 1:
        raise NotServed(f"HQQ groups along axis {numbers.get('axis', 0)}, over outputs, are {NOT_SERVED}; quantize with axis=1")
    if not numbers.get("channel_wise", True):
        raise NotServed(f"one HQQ scale for a whole weight is {NOT_SERVED}; quantize with channel_wise=True")
    bits, size = numbers.get("nbits", 4), numbers.get("group_size", 64)
    bits = 2 if bits == TERNARY else bits
    if bits not in STORED_BITS:
        raise NotServed(f"HQQ with {bits} bits is {NOT_SERVED}, only {', '.join(map(str, STORED_BITS))} and {TERNARY}")
    return Affine(bits=int(bits), group_size=None if size is None else int(size))
