"""Reads checkpoints in the layouts of NVIDIA ModelOpt, `quant_method: modelopt`, as `export_hf_checkpoint` writes them.

    FP8 ...   weight          float8_e4m3fn [N, K]      W = f * weight_scale, which is
              weight_scale    float32 []                FP8: one number for the weight
                              float32 [N]               FP8_PER_CHANNEL_PER_TOKEN: one per output; inputs are rounded per token
                              float32 [N/128, 1, K/128, 1]  fp8_pb_wo: one per block (two axes, or none for one block, as well)
    NVFP4 ... weight          uint8 [N, K/2]            two e2m1 codes a byte, the even column low
              weight_scale    float8_e4m3fn [N, K/16]   K/32 in W4A8_NVFP4_FP8
              weight_scale_2  float32 []                multiplies every scale:  W = f * (weight_scale * weight_scale_2)
    mxfp4     weight uint8 [N, K/2], weight_scale uint8 [N, K/32]           scale = 2^(u - 127)
    MXFP8     weight float8_e4m3fn [N, K], weight_scale uint8 [N, K/32]     the same
    W4A..AWQ  weight          uint8 [N/2, K]            signed nibbles, two rows of the weight in a byte, the even row low
              weight_scale    float32 [N, G]            W = q * weight_scale
    W8A..     weight          int8 [N, K]               W = q * weight_scale[n]
              weight_scale    float32 [N]

Experts in one tensor (gpt-oss, Llama 4; FP8 with one scale, and NVFP4) have the names NAME, NAME_weight_scale, ... and matrices
that are turned: e4m3 [E, K, N], uint8 [E, K/2, N] with scales [E, K/16, N].

    input_scale      float32 []  of inputs rounded with a fixed scale: used with FP8 and W8A8
    pre_quant_scale  [K]         multiplies inputs before anything else (`quantize/input_factor.py`)
    k_scale, v_scale float32 []  of a cache in eight or four bits; not used

Inputs in four bits or MX floats, and any beside weights of four bits, stay as they are. The second level of W4A8_AWQ (there
weight_scale_2 is the unit in which ModelOpt's model rounds q * weight_scale to e4m3 once more) is not applied: the file holds
the integers, and kernels multiply with those.

`weight_scale_2` is our `factor` as it stands, so NVFP4 is kept as table-packed, which stores it without a reciprocal. The one
scale of FP8 is kept for every output, so that weights whose scales differ can still be joined into one (experts).
Groups are what the shapes say: config.json does not always have their size. In mixed checkpoints (`quant_algo:
MIXED_PRECISION`) the config lists the algorithm of each layer, or of a whole module of experts. Source: ModelOpt 0.47.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.format import SCALE_DTYPES, take
from aerogel.pack.microscaling import unpack_pairs
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme
from aerogel.pack.source import Columns, Source
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.tables import TableGrid

if TYPE_CHECKING:
    from aerogel.model.reader import Entry

logger = logging.getLogger(__name__)

FILE = "hf_quant_config.json"
"""Where ModelOpt writes what it did; older versions there alone, newer ones in config.json as well."""
NVFP4 = Scheme(format="table-packed", grid=Nvfp4())
MXFP4 = Scheme(format="mxfp4-pack-quantized", grid=Mx())
INT4 = Scheme(format="pack-quantized", grid=IntGrid(bits=4, group_size=128, scale_dtype=torch.float32))
INT8 = Scheme(format="int-quantized", grid=IntGrid(bits=8, group_size=None, scale_dtype=torch.float32))
FP8_BLOCKS = Scheme(format="float-quantized", grid=Fp8Grid(strategy="block"))
ALGORITHMS: dict[str, Scheme] = {
    "FP8": Scheme(format="float-quantized", grid=Fp8Grid(strategy="channel")),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(format="float-quantized", grid=Fp8Grid(strategy="channel"), activations="fp8"),
    "FP8_PB_WO": FP8_BLOCKS,
    "FP8_PB_REAL": FP8_BLOCKS,
    "NVFP4": NVFP4,
    "NVFP4_AWQ": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "W4A8_NVFP4_FP8": NVFP4,
    "MXFP4": MXFP4,
    "W4A8_MXFP4_FP8": MXFP4,
    "MXFP8": Scheme(format="mxfp8-quantized", grid=Mx(kind="e4m3")),
    "W4A16_AWQ": INT4,
    "W4A8_AWQ": INT4,
    "W8A16": INT8,
    "W8A8_SQ_PER_CHANNEL": INT8,
}
"""ModelOpt's `quant_algo`, which it writes in small letters where it has no name for one, -> how its weights are kept."""
STATIC = {"FP8": "fp8-static", "W8A8_SQ_PER_CHANNEL": "int8-static"}
"""Algorithms whose inputs are rounded with `input_scale`, where that is stored."""
AS_THEY_ARE = ("NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8", "MXFP8", "W4A8_AWQ")
"""Algorithms that ask for inputs in floats of four or eight bits, which we leave alone."""
MIXED = "MIXED_PRECISION"
STACKED = ("FP8", "NVFP4")
"""Algorithms that experts in one tensor may have."""


def config_beside(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint whose config.json has none, from the file beside it; None without one.

    Raises:
        BadInput: a file that is no JSON.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return {"quant_method": "modelopt", **json.loads(path.read_text("utf-8"))}
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}); get the checkpoint again") from error


class ModelOpt(Source):
    """A `quantization_config` of ModelOpt, as config.json or hf_quant_config.json has it."""

    suffixes: frozenset[str] = frozenset({"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
    markers: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    index: ClassVar[str] = "weight_g_idx"
    turned: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        inner = config.get("quantization")
        said = {**inner, **config} if isinstance(inner, Mapping) else dict(config)
        self._algorithm = str(said.get("quant_algo")).upper()
        listed = (said.get("quantized_layers") or {}) if self._algorithm == MIXED else {}
        self._layers = {name: str(layer.get("quant_algo")).upper() for name, layer in listed.items()}
        named = set(self._layers.values()) or {self._algorithm}
        for name in sorted(named - ALGORITHMS.keys()):
            raise _unknown(name)
        if inputs := sorted(named & set(AS_THEY_ARE)):
            logger.warning("the checkpoint asks for rounded inputs (%s); they are not rounded", ", ".join(inputs))
        if cache := said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme"):
            kind = f"{cache.get('num_bits')}-bit {cache.get('type')}" if isinstance(cache, Mapping) else cache
            logger.warning("the checkpoint asks for a %s cache of keys and values; it is not rounded", kind)

    def groups(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """As any source has them, and experts in one tensor, whose scales have its name with an end."""
        names = set(names)
        found = super().groups(sorted(names))
        for name in sorted(names):
            stem = name.removesuffix("_weight_scale")
            if stem != name and stem in names:
                ends = ("weight_scale", "weight_scale_2", "input_scale")
                found[stem] = {"weight": stem} | {end: f"{stem}_{end}" for end in ends if f"{stem}_{end}" in names}
        return found

    def of_expert(self, tensors: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
        """Matrices are [K, N] in stacks; what has no axes is everybody's."""
        return {local: tensor[expert].T.contiguous() if tensor.ndim == 3 else tensor for local, tensor in tensors.items()}

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """By the algorithm. Raises `BadInput` where a tensor is missing or the config does not name the layer."""
        algorithm = self._algorithm_of(names)
        found = ALGORITHMS[algorithm]
        two_level = isinstance(found.grid, Nvfp4)
        parts = {"weight", "weight_scale", "weight_scale_2"} if two_level else {"weight", "weight_scale"}
        absent = sorted(parts - header.keys())
        if absent:
            raise BadInput(f"{names[0]} has no tensor {absent[0]!r}; the checkpoint is not whole, get it again")
        activations: Any = STATIC.get(algorithm) if "input_scale" in header else None
        found = found if isinstance(found.grid, IntGrid) else found.with_scale_dtype(header["weight_scale"])
        return replace(found, activations=activations or found.activations)

    def scheme_of(self, names: Sequence[str], entries: Mapping[str, Entry], class_names: Sequence[str]) -> Scheme:
        """As `scheme`, in groups of the size that the shapes have."""
        found = super().scheme_of(names, entries, class_names)
        grid = found.grid
        weight, scale = entries["weight"].shape, entries["weight_scale"].shape
        if len(weight) == 3:
            algorithm = self._algorithm_of(names)
            if algorithm not in STACKED or (algorithm == "FP8" and scale):
                raise NotServed(
                    f"{names[0]} holds all experts of a layer in {algorithm} with scales {list(scale)}, {NOT_SERVED} in one"
                    " tensor; start from the dense model (`aerogel compress`)"
                )
        if not isinstance(grid, Nvfp4 | IntGrid) or grid.group_size is None:
            return found
        if len(weight) not in (2, 3) or len(scale) != len(weight) or not scale[1]:
            raise BadInput(f"{names[0]} is {list(weight)} with scales {list(scale)}, not in groups; the file is damaged")
        K = weight[1] if isinstance(grid, IntGrid) else 2 * weight[1]
        return replace(found, grid=replace(grid, group_size=K // scale[1]))

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        grid = scheme.grid
        if isinstance(grid, Fp8Grid):
            return Columns(_fp8(tensors, grid))
        if isinstance(grid, IntGrid):
            return Columns(_integers(tensors, grid))
        if isinstance(grid, TableGrid):
            return Columns(_floats(tensors, grid))
        raise BadInput(f"ModelOpt holds no weights on {grid}")

    def _algorithm_of(self, names: Sequence[str]) -> str:
        """Of a layer, or of the listed module that it is in."""
        if self._algorithm != MIXED:
            return self._algorithm
        for name in names:
            while name:
                if name in self._layers:
                    return self._layers[name]
                name = name.rpartition(".")[0]
        raise BadInput(f"{names[0]} is quantized, but the config's quantized_layers does not name it; add it there")


def _unknown(name: str) -> NotServed:
    """What to say to another algorithm."""
    if name == "NVFP4_SVD":
        return NotServed(
            f"ModelOpt's NVFP4_SVD has a low-rank part beside its weights, {NOT_SERVED}; export NVFP4 or NVFP4_AWQ"
        )
    return NotServed(f"ModelOpt's quant_algo {name!r} is {NOT_SERVED}, only {', '.join(ALGORITHMS)}")


def _floats(tensors: Mapping[str, Tensor], grid: TableGrid) -> Codes:
    """NVFP4, MXFP4 and MXFP8."""
    weight, two_level = tensors["weight"], isinstance(grid, Nvfp4)
    wanted = torch.uint8 if grid.bits == 4 else torch.float8_e4m3fn
    if weight.dtype != wanted or weight.dim() != 2:
        raise BadInput(f"a weight of {grid.bits}-bit floats is a {wanted} matrix, found {weight.dtype} {list(weight.shape)}")
    N, K = weight.shape[0], weight.shape[1] * (8 // grid.bits)
    # Loaders may hand an e4m3 tensor over in a wider type; going back is exact.
    stored = torch.float8_e4m3fn if two_level else torch.uint8
    scale = take({"weight_scale": tensors["weight_scale"].to(stored)}, "weight_scale", (N, grid.groups(K)), (stored,))
    return Codes(
        values_NK=unpack_pairs(weight) if grid.bits == 4 else weight.contiguous().view(torch.uint8),
        scale_NG=scale.contiguous().view(grid.scale_dtype),
        table_TE=grid.tables.to(weight.device),
        factor=tensors["weight_scale_2"].float().reshape(()) if two_level else None,
        grid=grid,
    )


def _integers(tensors: Mapping[str, Tensor], grid: IntGrid) -> Codes:
    """int8, or int4 with the rows 2 i and 2 i + 1 of the weight in row i."""
    weight = tensors["weight"]
    wanted = torch.uint8 if grid.bits == 4 else torch.int8
    if weight.dtype != wanted or weight.dim() != 2:
        raise BadInput(f"a weight of {grid.bits}-bit integers is a {wanted} matrix, found {weight.dtype} {list(weight.shape)}")
    if grid.bits == 4:
        weight = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1)
        weight = (weight.to(torch.int8) ^ 8) - 8
    N, K = weight.shape
    scale = tensors["weight_scale"]
    scale = take({"weight_scale": scale.reshape(N, -1)}, "weight_scale", (N, grid.groups(K)), SCALE_DTYPES)
    return Codes(values_NK=weight, scale_NG=scale.to(grid.scale_dtype).contiguous(), grid=grid)


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
