"""Reads checkpoints in the layouts of NVIDIA ModelOpt, `quant_method: modelopt`: NVFP4 and FP8.

    NVFP4     weight          uint8 [N, K/2]            two e2m1 codes a byte, the even column low
              weight_scale    float8_e4m3fn [N, K/16]
              weight_scale_2  float32 []                multiplies every scale:  W = f * (weight_scale * weight_scale_2)
    FP8 ...   weight          float8_e4m3fn [N, K]      W = f * weight_scale, which is
              weight_scale    float32 []                FP8: one number for the weight
                              float32 [N]               FP8_PER_CHANNEL_PER_TOKEN: one per output; inputs are rounded per token
                              float32 [N/128, 1, K/128, 1]  FP8_PB_WO: one per block (two axes are read as well)
    input_scale  float32 []   FP8: of inputs rounded with a fixed scale; not used with NVFP4, whose inputs stay as they are

`weight_scale_2` is our `factor` as it stands, so NVFP4 is kept as table-packed, which stores it without a reciprocal. The one
scale of FP8 is kept for every output, so that weights whose scales differ can still be joined into one (experts).
In mixed checkpoints (`quant_algo: MIXED_PRECISION`) the config lists the algorithm of each layer.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from aerogel.quantize.grids import Fp8Grid

logger = logging.getLogger(__name__)

ALGORITHMS: dict[str, Scheme] = {
    "NVFP4": Scheme(format="table-packed", grid=Nvfp4()),
    "FP8": Scheme(format="float-quantized", grid=Fp8Grid(strategy="channel")),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(format="float-quantized", grid=Fp8Grid(strategy="channel"), activations="fp8"),
    "FP8_PB_WO": Scheme(format="float-quantized", grid=Fp8Grid(strategy="block")),
}
"""ModelOpt's `quant_algo` -> how its weights are kept."""
MIXED = "MIXED_PRECISION"


class ModelOpt(Source):
    """A `quantization_config` of ModelOpt, as config.json or hf_quant_config.json has it."""

    suffixes: frozenset[str] = frozenset({"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
    markers: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    index: ClassVar[str] = "weight_g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        inner = config.get("quantization")
        said = {**inner, **config} if isinstance(inner, Mapping) else dict(config)
        self._algorithm = str(said.get("quant_algo"))
        self._layers: Mapping[str, Any] = (said.get("quantized_layers") or {}) if self._algorithm == MIXED else {}
        named = {str(layer.get("quant_algo")) for layer in self._layers.values()} or {self._algorithm}
        unknown = sorted(named - ALGORITHMS.keys())
        if unknown:
            raise NotServed(f"ModelOpt's quant_algo {unknown[0]!r} is {NOT_SERVED}, only {', '.join(ALGORITHMS)}")
        if said.get("kv_cache_quant_algo"):
            logger.warning(
                "the checkpoint asks for a %s cache of keys and values; it is not rounded", said["kv_cache_quant_algo"]
            )

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """By the algorithm. Raises `BadInput` where a tensor is missing or the config does not name the layer."""
        algorithm = self._algorithm
        if algorithm == MIXED:
            layer = next((self._layers[name] for name in names if name in self._layers), None)
            if layer is None:
                raise BadInput(f"{names[0]} is quantized, but the config's quantized_layers does not name it; add it there")
            algorithm = str(layer["quant_algo"])
        found = ALGORITHMS[algorithm]
        parts = {"weight", "weight_scale", "weight_scale_2"} if algorithm == "NVFP4" else {"weight", "weight_scale"}
        absent = sorted(parts - header.keys())
        if absent:
            raise BadInput(f"{names[0]} has no tensor {absent[0]!r}; the checkpoint is not whole, get it again")
        if "pre_quant_scale" in header:
            raise NotServed(f"{names[0]} has a pre_quant_scale for its input, which is {NOT_SERVED}")
        if algorithm == "NVFP4":
            return found
        static = algorithm == "FP8" and "input_scale" in header
        return replace(
            found.with_scale_dtype(header["weight_scale"]), activations="fp8-static" if static else found.activations
        )

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        return Columns(_fp8(tensors, scheme.grid) if isinstance(scheme.grid, Fp8Grid) else _nvfp4(tensors))


def _nvfp4(tensors: Mapping[str, Tensor]) -> Codes:
    grid, packed = Nvfp4(), tensors["weight"]
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise BadInput(f"an NVFP4 weight is a uint8 matrix, found {packed.dtype} {list(packed.shape)}")
    N, K = packed.shape[0], 2 * packed.shape[1]
    # Loaders may hand an e4m3 tensor over in a wider type; going back is exact.
    scale = {"weight_scale": tensors["weight_scale"].to(torch.float8_e4m3fn)}
    return Codes(
        values_NK=unpack_pairs(packed),
        scale_NG=take(scale, "weight_scale", (N, grid.groups(K)), (torch.float8_e4m3fn,)),
        table_TE=grid.tables.to(packed.device),
        factor=tensors["weight_scale_2"].float().reshape(()),
        grid=grid,
    )


def _fp8(tensors: Mapping[str, Tensor], grid: Fp8Grid) -> Codes:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dim() != 2:
        raise BadInput(f"an FP8 weight is a matrix, found {weight.dtype} {list(weight.shape)}")
    N, K = weight.shape
    if grid.strategy == "channel":
        fits = scale.numel() in (1, N)
        scale = scale.reshape(-1, 1).expand(N, 1) if fits else scale
    else:
        wanted = (-(-N // 128), -(-K // 128))
        fits = scale.numel() == wanted[0] * wanted[1]
        scale = scale.reshape(wanted) if fits else scale
    if not fits:
        raise BadInput(
            f"an FP8 weight [{N}, {K}] has a weight_scale of {list(scale.shape)}; the config belongs to another file"
        )
    return Codes(values_NK=weight.to(torch.float8_e4m3fn), scale_NG=scale.contiguous(), grid=grid)
