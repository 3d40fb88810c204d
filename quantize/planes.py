"""Bit planes: a weight as a sum of signs, each plane of signs with a scale of its own.

    W[n, k] = offset[n, g] + sum over planes i of alpha[n, g, i] * b_i[n, k],      b_i in {-1, +1}, g the group of k

The sums are taken in float32 in that order, which makes decoding exact by definition. Everything with few bits fits in:
binary-coding quantization (LUT-GEMM, Park et al. 2022, arXiv 2206.09557), scales that are powers of two (ShiftAddLLM, You
et al. 2024, arXiv 2406.05981), one plane (binary networks), and any uniform code: with u = sum 2^(q-1-i) bit_i,

    s (u - z) = s ((2^q - 1) / 2 - z) + sum s 2^(q-2-i) b_i

where nothing is rounded as long as s has a 16-bit type (and s / 2 is no smaller than that type's numbers), so a uniform
weight and its planes are equal bit for bit (`from_uniform`). Planes stand from the largest to the smallest: the first k of
them are the k-bit model of the same weight.

A code is a number of q bits, plane 0 its highest. Scales are `scale_NG` of `Params` with one more axis, [N, G, q]; the offset
takes the place of the zero point. Power-of-two scales are stored as the exponent byte of their float32, 0 for 0.
With `block_rows` a run of outputs shares scales, as ShiftAddLLM's blocks of eight columns do.

Shape legend: N out features, B blocks of outputs (B = N unless shared), K in features, G groups, q planes, E = 2^q levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Codes, Params, check_group_size, refuse_zeros
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.levels import Levels
from aerogel.quantize.ranges import Search, Step
from aerogel.quantize.rounder import Rounder

CHUNK = 1 << 20
"""Weights that are decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class PlaneGrid:
    """Bit planes: sums of signed scales; 1 to 8 planes.

    bits: planes.
    group_size: inputs that share scales; null for all.
    offset: a constant per group beside the planes: none, in the type of the scales, or in float32 (exact conversions).
    power_of_two: scales are powers of two, so that multiplying by one is adding to an exponent.
    block_rows: outputs that share scales; a divisor of 128.
    scale_dtype: type that scales are stored in, and rounded to before use; no matter for powers of two.
    """

    bits: int
    group_size: int | None = None
    offset: Literal["none", "scale", "float32"] = "none"
    power_of_two: bool = False
    block_rows: int = 1
    scale_dtype: torch.dtype = torch.float32
    without_zero: ClassVar[str] = "bit planes"
    no_gradients: ClassVar[str] = "bit planes weigh errors by their inputs only; write clip: hessian or mse"
    """Why `clip: fisher` does not go with it."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise BadInput(f"bits must lie between 1 and 8, found {self.bits}")
        check_group_size(self.group_size)
        if self.offset not in ("none", "scale", "float32"):
            raise BadInput(f"offset must be none, scale or float32, found {self.offset!r}")
        if self.block_rows < 1 or 128 % self.block_rows:
            raise BadInput(f"block_rows must divide 128, found {self.block_rows}")

    # ---- what is stored --------------------------------------------------------------------------------------------

    @property
    def shared_rows(self) -> int:
        """Outputs that share scales."""
        return self.block_rows

    @property
    def alpha_dtype(self) -> torch.dtype:
        """The type of the planes' scales in a file."""
        return torch.uint8 if self.power_of_two else self.scale_dtype

    @property
    def offset_dtype(self) -> torch.dtype | None:
        """The type of the offsets, None where there are none."""
        return {"none": None, "scale": self.scale_dtype, "float32": torch.float32}[self.offset]

    def groups(self, K: int) -> int:
        """ceil(K / group_size)."""
        return -(-K // (self.group_size or K))

    def first(self, bits: int) -> Self:
        """The grid of the first `bits` planes. Raises `BadInput` when there are fewer."""
        if not 1 <= bits <= self.bits:
            raise BadInput(f"bits must lie between 1 and {self.bits}, the planes that are stored; found {bits}")
        return replace(self, bits=bits)

    def store(self, scale: Tensor) -> Tensor:
        """Scales rounded to what can be stored, as float of the same type. 0 stays 0: a plane may say nothing."""
        return powers_of_two(scale) if self.power_of_two else _cast(scale, self.scale_dtype)

    def store_offset(self, offset: Tensor) -> Tensor:
        """The same for offsets."""
        return offset if self.offset_dtype is None else _cast(offset, self.offset_dtype)

    def params_of(self, alpha_BGq: Tensor, offset_BG: Tensor | None) -> Params:
        """Stored scales in float as they are stored."""
        alpha = exponent_bytes(alpha_BGq) if self.power_of_two else alpha_BGq.to(self.scale_dtype)
        kept = None if self.offset_dtype is None or offset_BG is None else offset_BG.to(self.offset_dtype).contiguous()
        return Params(scale_NG=alpha.contiguous(), zero_NG=kept)

    def numbers(self, params: Params) -> tuple[Tensor, Tensor]:
        """alpha float32 [B, G, q] and offset float32 [B, G] of stored scales."""
        alpha = powers_of_bytes(params.scale_NG) if self.power_of_two else params.scale_NG.float()
        offset = alpha.new_zeros(alpha.shape[:2]) if params.zero_NG is None else params.zero_NG.float()
        return alpha, offset

    # ---- codes -----------------------------------------------------------------------------------------------------

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """Nearest codes, uint8 [N, K]."""
        N, K = w_NK.shape
        alpha, offset = self.numbers(params)
        size, codes = min(self.group_size or K, K), torch.empty(N, K, dtype=torch.uint8, device=w_NK.device)
        for rows in _row_slices(N, K, self.block_rows):
            blocks = torch.arange(rows.start, rows.stop, device=w_NK.device) // self.block_rows
            levels = Levels.of(sums_of(alpha[blocks], offset[blocks]))
            values = torch.nn.functional.pad(w_NK[rows].float(), (0, -K % size)).reshape(-1, self.groups(K), size)
            codes[rows] = levels.nearest_codes(values).flatten(1)[:, :K]
        return codes

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """The sums, float32 [N, K]."""
        N, K = q_NK.shape
        alpha, offset = self.numbers(params)
        size, w_NK = min(self.group_size or K, K), torch.empty(N, K, dtype=torch.float32, device=q_NK.device)
        for rows in _row_slices(N, K, self.block_rows):
            blocks = torch.arange(rows.start, rows.stop, device=q_NK.device) // self.block_rows
            codes = torch.nn.functional.pad(q_NK[rows], (0, -K % size)).reshape(-1, self.groups(K), size)
            total = offset[blocks][..., None].expand(codes.shape).clone()
            for i in range(self.bits):
                total += alpha[blocks][..., i, None] * sign_of(codes, self.bits, i)
            w_NK[rows] = total.flatten(1)[:, :K]
        return w_NK

    # ---- fitting and solving ---------------------------------------------------------------------------------------

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales by greedy fitting and, unless `search` is minmax, alternating refinement; see `bcq`.

        importance [K] weighs the squared error of each input; of curvature_KK the diagonal is used. Raises `BadInput` for
        importances of single weights, and for a mask: sums of signs cannot say zero in general.
        """
        from aerogel.quantize.bcq import ROUNDS, fit_planes

        refuse_zeros(mask_NK, self.without_zero)
        if importance is not None and importance.dim() == 2:
            raise BadInput(self.no_gradients)
        weight_K = importance if curvature_KK is None else curvature_KK.diagonal()
        return fit_planes(self, w_NK, weight_K, 0 if Search.of(search).kind == "minmax" else ROUNDS)

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """Uniform levels that span [low, high]; without an offset, that span the larger end both ways."""
        half = (high - low) / 2 if self.offset != "none" else torch.maximum(high, -low)
        unit = half / (2**self.bits - 1)
        alpha = self.store(torch.stack([unit * 2 ** (self.bits - 1 - i) for i in range(self.bits)], -1))
        return Step(alpha, self.store_offset((high + low) / 2) if self.offset != "none" else torch.zeros_like(low), 0.0)

    def neighbours(self, step: Step) -> list[Step]:
        """None: alternating refinement takes the place of a search."""
        return []

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """The nearest sums; `step` holds alpha with one more axis than `w`, and offsets of the shape of `w` or one that
        broadcasts."""
        levels = Levels.of(sums_of(step.scale.float(), torch.as_tensor(step.low).float()))
        found = levels.nearest(w.float()[..., None])[..., 0].to(w.dtype)
        return found if out is None else out.copy_(found)

    def params(self, step: Step, N: int, K: int) -> Params:
        """Scales in use [G, N, q] as they are stored, one row for every run of outputs that share them."""
        alpha = step.scale[:, :: self.block_rows].transpose(0, 1)
        offset = step.low[:, :: self.block_rows].T if isinstance(step.low, Tensor) else None
        return self.params_of(alpha, offset)

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Rounder:
        """Column-wise rounding with these scales."""
        alpha, offset = self.numbers(params)
        blocks = torch.arange(N, device=alpha.device) // self.block_rows
        step = Step(alpha[blocks].transpose(0, 1).contiguous(), offset[blocks].T.contiguous(), 0.0)
        return PlaneRounder(self, step, N, K)


class PlaneRounder(Rounder):
    """Snaps columns to the sums of their group; the levels of one group are kept while its columns pass."""

    def __init__(self, grid: PlaneGrid, step: Step, N: int, K: int) -> None:
        super().__init__(grid, step, N, K)
        self._held: dict[int, Levels] = {}

    def column(self, column: int, w_N: Tensor, out: Tensor) -> Tensor:
        """Nearest sums of one column, written to `out`."""
        return out.copy_(self._levels(column // self.size).nearest(w_N[:, None].float())[:, 0])

    def replace(self, group: int, step_N: Step) -> None:
        """Other scales for one group."""
        self._held.pop(group, None)
        super().replace(group, step_N)

    def rescale(self, group: int, gain_N: Tensor, stiffness_N: Tensor) -> Tensor | None:
        """As for integers where one plane is all there is. Several stored scales do not change by one ratio: None."""
        alone = isinstance(self.grid, PlaneGrid) and self.grid.bits == 1 and self.grid.offset == "none"
        if not alone or self.grid.shared_rows != 1:
            return None
        step = self.step(group)
        alpha_N, wanted_N = step.scale[:, 0], torch.where(stiffness_N > 0, gain_N / stiffness_N, 0)
        scale_N = self.grid.store(alpha_N * (1 + wanted_N.clamp_(min=-0.5)))
        change_N = torch.where(alpha_N > 0, scale_N / alpha_N - 1, 0)
        worse_N = change_N * (change_N * stiffness_N - 2 * gain_N) >= 0
        self.replace(group, step._replace(scale=torch.where(worse_N, alpha_N, scale_N)[:, None]))
        return change_N.masked_fill_(worse_N, 0)

    def _levels(self, group: int) -> Levels:
        if group not in self._held:
            step = self.step(group)
            self._held[group] = Levels.of(sums_of(step.scale.float(), torch.as_tensor(step.low).float()))
        return self._held[group]


def sums_of(alpha: Tensor, offset: Tensor) -> Tensor:
    """The sums that the codes 0 .. 2^q - 1 stand for, float32 [..., E], from alpha [..., q] and offset [...]."""
    bits = alpha.shape[-1]
    codes_E = torch.arange(1 << bits, device=alpha.device)
    sums = offset.to(alpha.device).expand(alpha.shape[:-1])[..., None].repeat(*[1] * (alpha.dim() - 1), 1 << bits)
    for i in range(bits):
        sums += alpha[..., i, None] * sign_of(codes_E, bits, i)
    return sums


def from_uniform(codes: Codes) -> Codes:
    """Any integer weight as planes that decode to the same bits; with scales in float32, to the same numbers but for one
    rounding. Raises `BadInput` for codes that are not integers."""
    grid = codes.grid
    if not isinstance(grid, IntGrid):
        raise BadInput(f"only uniform integers become planes, not codes on a {type(grid).__name__}")
    planes = PlaneGrid(bits=grid.bits, group_size=grid.group_size, offset="float32", scale_dtype=grid.scale_dtype)
    scale = codes.scale_NG.float()
    zero = 0 if codes.zero_NG is None else codes.zero_NG.float()
    # A negative scale turns all signs of its group around, so that plane scales stay positive.
    size = min(grid.group_size or codes.values_NK.shape[1], codes.values_NK.shape[1])
    turned = (scale < 0).repeat_interleave(size, 1)[:, : codes.values_NK.shape[1]]
    unsigned = (codes.values_NK.to(torch.int16) - grid.q_min).to(torch.uint8)
    unsigned = torch.where(turned, (1 << grid.bits) - 1 - unsigned, unsigned)
    alpha = torch.stack([planes.store(scale.abs() * 2.0 ** (grid.bits - 2 - i)) for i in range(grid.bits)], -1)
    return Codes.of(unsigned, planes.params_of(alpha, scale * (-0.5 - zero)), planes)


def first_planes(codes: Codes, bits: int) -> Codes:
    """The weight that the first `bits` planes are. Raises `BadInput` for codes that are not planes, or too few of them."""
    if not isinstance(codes.grid, PlaneGrid):
        raise BadInput(f"codes on a {type(codes.grid).__name__} have no planes to leave out")
    grid = codes.grid.first(bits)
    alpha = codes.scale_NG[..., :bits].contiguous()
    return Codes(values_NK=codes.values_NK >> (codes.grid.bits - bits), scale_NG=alpha, zero_NG=codes.zero_NG, grid=grid)


def sign_of(codes: Tensor, bits: int, plane: int) -> Tensor:
    """+1 or -1 of one plane of codes, float32."""
    return ((codes >> (bits - 1 - plane)) & 1).float().mul_(2).sub_(1)


def powers_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two of every magnitude with its sign, 0 for 0 and for what is below 2^-126."""
    mantissa, exponent = torch.frexp(scale)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa.abs() < 0.75).to(exponent.dtype))
    return torch.where(scale.abs() < 2.0**-126, torch.zeros_like(scale), torch.copysign(power, scale))


def exponent_bytes(powers: Tensor) -> Tensor:
    """uint8: the exponent field of non-negative float32 powers of two."""
    return (powers.float().contiguous().view(torch.int32) >> 23).to(torch.uint8)


def powers_of_bytes(exponents: Tensor) -> Tensor:
    """The inverse of `exponent_bytes`."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def _cast(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is torch.float16 and bool((scale.abs() > torch.finfo(dtype).max).any()):
        raise BadInput("a weight is too large for scale_dtype float16; write scale_dtype: bfloat16")
    return scale.to(dtype).to(scale.dtype)


def _row_slices(N: int, K: int, step: int) -> list[slice]:
    rows = max(1, CHUNK // max(K * step, 1)) * step
    return [slice(start, min(N, start + rows)) for start in range(0, N, rows)]
