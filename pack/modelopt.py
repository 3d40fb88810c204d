"""Reads NVFP4 checkpoints in the layout of NVIDIA ModelOpt, `quant_method: modelopt`.

    weight          uint8 [N, K/2]            two e2m1 codes a byte, the even column low
    weight_scale    float8_e4m3fn [N, K/16]
    weight_scale_2  float32 []                multiplies every scale
    input_scale     float32 []                of activations in four bits, not used: aerogel is weight-only here

    W = f * (weight_scale * weight_scale_2)

`weight_scale_2` is our `factor` as it stands, so the weight is kept as table-packed, which stores it without a reciprocal.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.format import take
from aerogel.pack.microscaling import unpack_pairs
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme
from aerogel.pack.source import Columns, Source
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.nvfp4 import Nvfp4


class ModelOpt(Source):
    """A `quantization_config` of ModelOpt with `quant_algo: NVFP4`."""

    suffixes: frozenset[str] = frozenset({"weight", "weight_scale", "weight_scale_2", "input_scale"})
    markers: ClassVar[frozenset[str]] = frozenset({"weight_scale_2"})
    index: ClassVar[str] = "weight_g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        inner = config.get("quantization")
        algorithm = config.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else None)
        if algorithm != "NVFP4":
            raise NotServed(f"ModelOpt's quant_algo {algorithm!r} is {NOT_SERVED}, only NVFP4")
        self._scheme = Scheme(format="table-packed", grid=Nvfp4())

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """NVFP4 for every weight that has its tensors. Raises `BadInput` where one of them is missing."""
        absent = {"weight", "weight_scale", "weight_scale_2"} - header.keys()
        if absent:
            raise BadInput(f"{names[0]} has no tensor {sorted(absent)[0]!r}; the checkpoint is not whole, get it again")
        return self._scheme

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        grid = Nvfp4()
        packed = tensors["weight"]
        if packed.dtype != torch.uint8 or packed.dim() != 2:
            raise BadInput(f"an NVFP4 weight is a uint8 matrix, found {packed.dtype} {list(packed.shape)}")
        N, K = packed.shape[0], 2 * packed.shape[1]
        # Loaders may hand an e4m3 tensor over in a wider type; going back is exact.
        scale = {"weight_scale": tensors["weight_scale"].to(torch.float8_e4m3fn)}
        factor = tensors["weight_scale_2"].float().reshape(())
        codes = Codes(
            values_NK=unpack_pairs(packed),
            scale_NG=take(scale, "weight_scale", (N, grid.groups(K)), (torch.float8_e4m3fn,)),
            table_TE=grid.tables.to(packed.device),
            factor=factor,
            grid=grid,
        )
        return Columns(codes)
