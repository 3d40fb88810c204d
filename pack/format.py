"""What every stored format can say about itself: which tensors, of which shapes, how many bits, and how to decode them.

A format is a class without state; what varies from layer to layer is the grid (bits, groups, zero point), which the
codes carry when they are written and the config tells when they are read. A format knows no device and no kernel.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.arguments import activation_arguments
from aerogel.quantize.grids import Codes, Grid

__all__ = [
    "MATMUL_TOLERANCE",
    "ROW_STEP",
    "SCALE_DTYPES",
    "Activations",
    "Format",
    "Grid",
    "Shapes",
    "Tolerance",
    "take",
    "with_bias",
]

Activations = Literal["none", "int8", "fp8", "int8-static", "fp8-static"]
"""How a linear's input is rounded at run time: not at all, int8 per token, or e4m3 per token (per token and 128 columns
where the weight has blocks). Static: in units of one stored number, `quantize/input_scale.py`."""
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tolerance = Mapping[torch.dtype, float]

MATMUL_TOLERANCE: Tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Relative Frobenius error that a kernel may have against `kernels/gemm/ref.py` in float32, by the activations' dtype.
A few roundings of each factor: bfloat16 keeps 8 bits, so one rounding is up to 2^-9 = 0.002."""


class Format(ABC):
    """A stored representation of a linear's weight. Never instantiated; every method is pure and, data aside, runs on meta."""

    name: ClassVar[str]
    tolerance: ClassVar[Tolerance]
    names: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    )
    """Local names that its tensors may have."""
    standard: ClassVar[bool] = True
    """Whether compressed-tensors defines it; what it does not is stored as quant_method "aerogel"."""

    @staticmethod
    @abstractmethod
    def refuses(grid: Grid, activations: Activations = "none") -> str | None:
        """Why this format cannot store `grid` with `activations`; None when it can."""

    @staticmethod
    @abstractmethod
    def encode(codes: Codes) -> dict[str, Tensor]:
        """Local tensor names (`weight_packed`, ...) to tensors, exactly as they stand in the file."""

    @staticmethod
    @abstractmethod
    def to_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The inverse of `encode`: the same values, scales and zeros. Raises `BadInput` when tensors and grid disagree."""

    @staticmethod
    @abstractmethod
    def shapes(N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """What `encode` would give for an [N, K] weight, as shapes and dtypes; `bias` too, in `dtype`, with `has_bias`."""

    @classmethod
    @abstractmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """What `weights` of a config group says of a grid that the format stores."""

    @staticmethod
    @abstractmethod
    def parse(weights: Mapping[str, Any]) -> Grid:
        """The grid that `weights` of a config group describes, the inverse of `describe`; its `scale_dtype` is a guess where
        the config does not say it. Raises `NotServed` for numbers that the format does not hold."""

    @staticmethod
    @abstractmethod
    def rows(tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop alone, as views where possible. `start` is a multiple of ROW_STEP."""

    @classmethod
    def config(cls, grid: Grid, activations: Activations = "none") -> dict[str, Any]:
        """The compressed-tensors config group, without its targets. Raises `BadInput` as `refuses` says."""
        reason = cls.refuses(grid, activations)
        if reason:
            raise BadInput(reason)
        return {
            "format": cls.name,
            "input_activations": activation_arguments(grid, activations),
            "output_activations": None,
            "targets": [],
            "weights": cls.describe(grid),
        }

    @classmethod
    def decode(cls, tensors: Mapping[str, Tensor], grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] in `dtype`: ((q - z) * s) in float32, then rounded once."""
        return cls.to_codes(tensors, grid).decode(dtype)

    @classmethod
    def bits_per_weight(cls, N: int, K: int, grid: Grid) -> float:
        """All stored bits of the weight (codes, scales, zeros, shape; not the bias) divided by N * K."""
        stored = cls.shapes(N, K, grid).values()
        return 8.0 * sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored) / (N * K)


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Tensor `name`, checked. Raises `BadInput` when it is missing, or has another shape or dtype than the config implies."""
    tensor = tensors.get(name)
    if tensor is None:
        raise BadInput(f"a packed weight has no tensor {name!r} (found {', '.join(sorted(tensors))}); the file is not whole")
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadInput(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, but the quantization config"
            f" implies {expected} {list(shape)}; the config does not belong to this file"
        )
    return tensor


ROW_STEP = 128
"""Output rows can be cut out of a packed weight at multiples of this: whole words of packed zero points, whole fp8 blocks."""

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def with_bias(shapes: Shapes, N: int, has_bias: bool, dtype: torch.dtype) -> Shapes:
    """`shapes` with a `bias` [N] of `dtype` added when the linear has one."""
    return {**shapes, "bias": ((N,), dtype)} if has_bias else shapes
