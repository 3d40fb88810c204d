"""Reads checkpoints in the compressed-tensors layout: ours, and what llm-compressor and others wrote.

Formats: pack-quantized (symmetric and not, per group or channel, with or without activation order), int-quantized,
float-quantized (e4m3), naive-quantized, which stores the same as the latter two, the microscaling formats (NVFP4, MXFP4,
MXFP8), our own table-packed and planes. What differs from the files we write is brought into their shape: one scale for a
whole tensor, zero points that are not packed, a `weight_g_idx`. KV-cache schemes and transforms are refused by
name.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import bits
from aerogel.pack.config import find_group, format_of
from aerogel.pack.format import take
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme, parse_group
from aerogel.pack.source import Columns, Source, arranged, integer_grid, scale_dtype
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.sidecars import NAMES as SIDECARS


class CompressedTensors(Source):
    """A `quantization_config` with `config_groups`."""

    markers: ClassVar[frozenset[str]] = frozenset({"weight_packed", "weight_scale"})
    index: ClassVar[str] = "weight_g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise NotServed("a compressed-tensors config without 'config_groups' is not read by aerogel")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            value = config.get(key)
            if value and not (key == "sparsity_config" and value.get("format") == "dense"):
                raise NotServed(f"a compressed-tensors config with {key} is {NOT_SERVED}")
        if config.get("quantization_status", "compressed") != "compressed":
            raise NotServed(f"quantization_status {config['quantization_status']!r} is {NOT_SERVED}, only 'compressed'")
        self._groups: Mapping[str, Mapping[str, Any]] = groups
        self._format = config.get("format")
        self._schemes = {name: parse_group(group, self._format) for name, group in groups.items()}
        local_names = (format_of(scheme.format).names for scheme in self._schemes.values())
        self.suffixes = frozenset({self.index, *SIDECARS}).union(*local_names)

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """The scheme of the group that claims the weight; with a single group, that one."""
        group = find_group(self._groups, names, class_names)
        if group is None and len(self._groups) == 1:
            # The packed tensors are there, so the weight is quantized, and there is only one way it can be.
            group = next(iter(self._groups.values()))
        if group is None:
            raise BadInput(
                f"{names[0]} is packed in the file, but no group of the quantization config has a target that matches it;"
                " add its name to the targets of its group in config.json"
            )
        scheme = self._schemes[next(name for name, held in self._groups.items() if held is group)]
        if not isinstance(scheme.grid, IntGrid | Fp8Grid):
            return scheme  # its config says the type of its scales
        return scheme.with_scale_dtype(scale_dtype(header, "weight_scale", names[0]))

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        fmt = format_of(scheme.format)
        if isinstance(scheme.grid, Fp8Grid):
            # Loaders may hand an e4m3 tensor over in a wider type; going back is exact.
            tensors = {**tensors, "weight": tensors["weight"].to(torch.float8_e4m3fn)}
            tensors["weight_scale"] = _fp8_scale(tensors["weight_scale"], scheme.grid)
            return Columns(fmt.to_codes(tensors, scheme.grid))
        if not isinstance(scheme.grid, IntGrid):
            return Columns(fmt.to_codes(tensors, scheme.grid))
        tensors = _regular(tensors, scheme)
        codes = fmt.to_codes(tensors, scheme.grid)
        index = tensors.get(self.index)
        return arranged(codes.values_NK, codes.scale_NG, codes.zero_NG, integer_grid(scheme), index)


def _fp8_scale(scale: Tensor, grid: Fp8Grid) -> Tensor:
    """Scales of other writers in the shape we use: [1] per tensor, [N, 1] per channel."""
    if grid.strategy == "tensor":
        return scale.reshape(1)
    return scale.unsqueeze(1) if grid.strategy == "channel" and scale.ndim == 1 else scale


def _regular(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Integer tensors with the variations of other writers undone: shared scales spread, zero points packed or not."""
    grid = integer_grid(scheme)
    found = dict(tensors)
    packed = scheme.format == "pack-quantized"
    weight = found.get("weight_packed" if packed else "weight")
    scale = found.get("weight_scale")
    if weight is None or scale is None:
        raise BadInput(f"a {scheme.format} weight has only the tensors {', '.join(sorted(found))}; the file is not whole")
    N = weight.shape[0]
    if scale.numel() == 1 and N > 1:
        scale = scale.reshape(1, 1).expand(N, 1)
    found["weight_scale"] = scale.unsqueeze(1) if scale.ndim == 1 else scale
    zero = found.get("weight_zero_point")
    if zero is not None and not grid.symmetric:
        zero = zero.reshape(1, 1).expand(N, 1) if zero.numel() == 1 and N > 1 else zero
        zero = zero.unsqueeze(1) if zero.ndim == 1 else zero
        if packed and zero.dtype == torch.int8:
            zero = bits.pack_rows(bits.signed_to_unsigned(zero, grid.bits), grid.bits)
        found["weight_zero_point"] = zero
    if packed and "weight_shape" in found:
        take(found, "weight_shape", (2,), (torch.int64, torch.int32))
    return found
