"""Rows at higher precision: a few outputs of the model, chosen by what the loss loses, get more bits than the rest.

    W = codes + R        R: further codes for some rows, what those rows lack at the bits of all others

Zheng et al. 2024 (MixLLM, arXiv 2412.14590) give 8 bits to the outputs that matter most *in the whole model* and 4 to all
others, so that one layer may have many such rows and the next none. A row c of a layer with weights w_c and rounding errors
d_c = Q(w_c) - w_c changes the loss by

    g_c . d_c + (g_c . d_c)^2 / 2          g_c the gradient of the log likelihood of one text: first order, Fisher's second

which they average, by magnitude, over texts. Here texts are answered by the model itself (labels drawn from its own
predictions), for which the first term averages to nothing and the second to the divergence from the dense model: half the
mean of (g_c . d_c)^2 is what the row costs, in nats. Rows are taken by cost per weight until `row_share` of all weights have
more bits (`choose_rows`). The row-wise sum makes this better than a diagonal: errors of one row cancel or add up.

No weight is stored twice: the rows have their codes like all others, and a second, smaller weight holds what is missing,
`row_bits - bits` wide, solved by the same method on the same statistics. It is one more packed linear of R outputs, so that
every kernel there is runs it, also with activations in int8 (MixLLM's W4A8 path), and its product is added to those outputs.

Stored: `weight_row_index` int32 [R], `weight_row_packed` int32 [R, words], `weight_row_scale` [R, G], `weight_row_kind` int32
[3] (K, bits, group size or 0). Cost: (row_bits - bits + 16 / group) row_share bits per weight.

Shape legend: N out features, K in features, R chosen rows, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Need, solve_together
from aerogel.pack import bits as packing
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.problem import relative_loss
from aerogel.quantize.rtn import weight_error
from aerogel.quantize.scales import WIDE

if TYPE_CHECKING:
    from aerogel.pack.format import Shapes

PREFIX = "weight_row_"
NAMES = tuple(f"{PREFIX}{part}" for part in ("index", "packed", "scale", "kind"))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What some rows of a weight [N, K] lack.

    index_R: int32 [R], ascending. packed_RW: int32 [R, words], codes as pack-quantized has them. scale_RG: [R, G].
    kind_3: int32 [3], K, bits and group size (0: one scale per row).
    """

    index_R: Tensor
    packed_RW: Tensor
    scale_RG: Tensor
    kind_3: Tensor

    @staticmethod
    def of(index_R: Tensor, codes: Codes) -> Rows:
        """Rows `index_R`, ascending, and the codes [R, K] on symmetric integers of what they lack."""
        K = codes.values_NK.shape[1]
        return Rows(
            index_R=index_R.to(torch.int32),
            packed_RW=packing.pack(packing.signed_to_unsigned(codes.values_NK, codes.grid.bits), codes.grid.bits),
            scale_RG=codes.scale_NG.contiguous(),
            kind_3=torch.tensor([K, codes.grid.bits, codes.grid.group_size or 0], dtype=torch.int32, device=index_R.device),
        )

    @staticmethod
    def shapes(K: int, R: int, grid: IntGrid) -> Shapes:
        """The stored tensors by local name."""
        words = packing.words(K, grid.bits)
        kinds = (
            ((R,), torch.int32),
            ((R, words), torch.int32),
            ((R, grid.groups(K)), grid.scale_dtype),
            ((3,), torch.int32),
        )
        return dict(zip(NAMES, kinds, strict=True))

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Rows | None:
        """The inverse of `tensors`; None where no rows have more bits."""
        if NAMES[1] not in tensors:
            return None
        index, packed, scale, kind = (tensors[name] for name in NAMES)
        return Rows(index_R=index, packed_RW=packed, scale_RG=scale, kind_3=kind)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by local name."""
        return dict(zip(NAMES, (self.index_R, self.packed_RW, self.scale_RG, self.kind_3), strict=True))

    @property
    def grid(self) -> IntGrid:
        """Of the codes."""
        _, width, group = self.kind_3.tolist()
        return IntGrid(bits=width, group_size=group or None, scale_dtype=self.scale_RG.dtype)

    def codes(self) -> Codes:
        """The codes [R, K]."""
        K, width, _ = self.kind_3.tolist()
        values_RK = packing.unsigned_to_signed(packing.unpack(self.packed_RW, width, K), width)
        return Codes(values_NK=values_RK, scale_NG=self.scale_RG, grid=self.grid)

    def check(self, N: int, K: int, name: str) -> None:
        """Raises `BadInput` unless these can be rows of a weight [N, K]; a kernel reads what they point at."""
        R, index_R, kind = len(self.index_R), self.index_R.long(), self.kind_3.tolist()
        fits = len(kind) == 3 and kind[0] == K and 2 <= kind[1] <= 8 and kind[2] >= 0
        fits = fits and self.packed_RW.shape == (R, packing.words(K, kind[1]))
        fits = fits and self.scale_RG.shape == (R, -(-K // (kind[2] or K))) and bool((index_R.diff() > 0).all())
        if not fits or (R and not 0 <= int(index_R[0]) <= int(index_R[-1]) < N):
            raise BadInput(f"the rows beside {name} are not those of a [{N}, {K}] weight; the file is damaged, get it again")

    @staticmethod
    def below(parts: Sequence[Rows | None], heights: Sequence[int]) -> Rows | None:
        """Those of weights under each other, of so many rows each; None where they are of several kinds."""
        given = [(part, first) for part, first in zip(parts, accumulate(heights, initial=0), strict=False) if part is not None]
        alike = {(*part.kind_3.tolist(), part.scale_RG.dtype) for part, _ in given}
        if len(alike) != 1:
            return None
        return Rows(
            index_R=torch.cat([part.index_R + first for part, first in given]),
            packed_RW=torch.cat([part.packed_RW for part, _ in given]),
            scale_RG=torch.cat([part.scale_RG for part, _ in given]),
            kind_3=given[0][0].kind_3,
        )

    def put(self, w_NK: Tensor) -> Tensor:
        """`w_NK` with what the rows lacked added. `w_NK` itself is changed."""
        w_NK[self.index_R.long()] += self.codes().decode().to(w_NK)
        return w_NK


@dataclass(frozen=True, kw_only=True)
class MoreBits:
    """Which rows get more bits than the rest.

    rows: `none`; `loss` ranks all rows of all layers of the stage by what rounding them costs the model's loss (MixLLM), and
        needs gradients: calibration.gradient_samples texts are run backwards.
    row_share: share of the stage's weights that get them.
    row_bits: how many they then have; at least two more than the rest. At equal size more rows at 6 bits are worth more than
        fewer at 8 where the rest has 4.
    """

    rows: Literal["none", "loss"] = "none"
    row_share: float = 0.1
    row_bits: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.row_share <= 1:
            raise BadInput(f"row_share must lie above 0 and at most at 1, found {self.row_share}")
        if not 3 <= self.row_bits <= 16:
            raise BadInput(f"row_bits must lie between 3 and 16, found {self.row_bits}")


def choose_rows(cost: Mapping[str, Tensor], widths: Mapping[str, int], share: float) -> dict[str, Tensor]:
    """The rows of each layer, int64 ascending, that get more bits: by cost per weight, until `share` of the weights have them.

    cost: what each row of each layer loses at few bits, [N]. widths: K of each layer.
    """
    names = list(cost)
    value = torch.cat([cost[name].double().cpu() / widths[name] for name in names])
    width = torch.cat([torch.full((len(cost[name]),), widths[name], dtype=torch.int64) for name in names])
    owner = torch.cat([torch.full((len(cost[name]),), i) for i, name in enumerate(names)])
    place = torch.cat([torch.arange(len(cost[name])) for name in names])
    order = torch.argsort(value, descending=True, stable=True)
    taken = order[width[order].cumsum(0) <= share * int(width.sum())]
    return {name: place[taken[owner[taken] == i]].sort().values for i, name in enumerate(names)}


@dataclass(frozen=True, kw_only=True)
class Refining:
    """Stage `Layer -> Layer`: `method` on the whole weight, and once more, with the bits that are added, on the chosen rows."""

    method: Any
    more: MoreBits

    def __post_init__(self) -> None:
        if type(self.method).__name__ not in ("Gptq", "RoundToNearest"):
            raise BadInput("rows at higher precision are solved by gptq or rtn; choose one of them, or write rows: none")
        extra = self.more.row_bits - self.grid.bits
        if not 2 <= extra <= 8:
            raise BadInput(
                f"row_bits must be 2 to 8 more than the {self.grid.bits} bits of the other rows, found {self.more.row_bits}"
            )

    @property
    def grid(self) -> Any:
        """That of all rows."""
        return self.method.grid

    @property
    def extra(self) -> IntGrid:
        """The grid of what is added to the chosen rows."""
        kind = self.grid.scale_dtype if self.grid.scale_dtype in WIDE else torch.bfloat16
        return IntGrid(bits=self.more.row_bits - self.grid.bits, group_size=self.grid.group_size, scale_dtype=kind)

    def on(self, grid: Any) -> Refining:
        """The same stage on another grid."""
        return replace(self, method=replace(self.method, grid=grid))

    @property
    def needs(self) -> frozenset[Need]:
        """The method's, and what rows cost."""
        own: frozenset[Need] = frozenset({"row_loss"})
        return own | frozenset(self.method.needs)

    def shapes(self, N: int, K: int) -> Shapes:
        """What is stored beside the codes of a weight [N, K] if every layer gets its share; the sum over all is nearly that."""
        return Rows.shapes(K, round(self.more.row_share * N), self.extra)

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes and rows."""
        return self.call_group((layer,))[0]

    def call_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """Several layers, handed to the method together where it takes several."""
        solved = [self._coarse(*pair) for pair in zip(layers, solve_together(self.method, layers), strict=True)]
        chosen = [layer for layer in layers if len(_rows(layer))]
        lacking = [_lacking(layer, done) for layer, done in zip(layers, solved, strict=True) if len(_rows(layer))]
        again = replace(self.method, grid=self.extra, **({"gptaq": False} if hasattr(self.method, "gptaq") else {}))
        found = dict(zip((layer.name for layer in chosen), solve_together(again, lacking), strict=True))
        return [_with(layer, done, found.get(layer.name)) for layer, done in zip(layers, solved, strict=True)]

    def _coarse(self, layer: Layer, solved: Layer) -> Layer:
        """The chosen rows rounded to nearest over their whole range: what they lack is then half a step at most, which few
        bits say best. A solver's errors, spread to help a row of few bits, would reach further."""
        index_R, codes = _rows(layer), solved.codes
        if codes is None or not len(index_R) or self.grid.shared_rows != 1:
            return solved
        grid = codes.grid if codes.factor is None else codes.grid.pinned(float(codes.factor))  # type: ignore[attr-defined]
        target_RK = _target(layer, solved)[index_R]
        mask_RK = None if layer.mask_NK is None else layer.mask_NK[index_R]
        kept_RK = target_RK if mask_RK is None else target_RK * mask_RK
        coarse = quantized(grid, kept_RK, grid.fit(kept_RK, None, mask_RK, "minmax"))
        changed: dict[str, Any] = {}
        for name in ("values_NK", "scale_NG", "zero_NG", "pick_NG", *(["table_TE"] if codes.table_per_row else [])):
            whole, part = getattr(codes, name), getattr(coarse, name)
            if whole is not None:
                changed[name] = _replaced(whole, index_R, part.to(whole.dtype))
        codes = replace(codes, **changed)
        return solved.with_(codes=codes, weight_NK=codes.decode())


def _replaced(whole: Tensor, index_R: Tensor, part: Tensor) -> Tensor:
    """`whole` with other rows; eight-bit floats are moved as bytes, which every device can."""
    if whole.dtype.itemsize == 1:
        return whole.view(torch.uint8).index_copy(0, index_R, part.view(torch.uint8)).view(whole.dtype)
    return whole.index_copy(0, index_R, part)


def _rows(layer: Layer) -> Tensor:
    if layer.rows_R is None:
        raise RunFailed(f"nobody chose the rows of {layer.name} that get more bits; this is a mistake in aerogel, report it")
    return layer.rows_R.to(layer.weight_NK.device)


def _target(layer: Layer, solved: Layer) -> Tensor:
    """What the codes were to approach, float32."""
    return (layer.weight_NK if solved.target_NK is None else solved.target_NK).float()


def _lacking(layer: Layer, solved: Layer) -> Layer:
    """What the chosen rows lack of it."""
    index_R = _rows(layer)
    mask = None if layer.mask_NK is None else layer.mask_NK[index_R]
    return Layer(
        name=layer.name,
        weight_NK=_target(layer, solved)[index_R] - solved.weight_NK[index_R],
        stats=layer.stats,
        mask_NK=mask,
        fisher_NK=None if layer.fisher_NK is None else layer.fisher_NK[index_R],
    )


def _with(layer: Layer, solved: Layer, found: Layer | None) -> Layer:
    if found is None or found.codes is None:
        return solved.with_(target_NK=None, notes={"rows": 0})
    rows = Rows.of(_rows(layer), found.codes)
    weight_NK = rows.put(solved.weight_NK.clone())
    stats = layer.stats
    known = stats is not None and stats.second_moment_KK is not None and stats.tokens > 0
    loss = relative_loss(_target(layer, solved), weight_NK, stats.second_moment_KK) if known else None  # type: ignore[union-attr, arg-type]
    notes: dict[str, object] = {"rows": len(rows.index_R), **weight_error(layer, weight_NK)}
    return solved.with_(weight_NK=weight_NK, sidecars=(rows,), loss=loss, target_NK=None, notes=notes)
