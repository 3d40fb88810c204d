"""A weight in the tile layout, as the CUDA kernels take it.

    W[n, k] = (u[n, k] - z) * s            integers; z = 2^(b-1) where there is no zero point
    W[n, k] = table[u[n, k]] * s           any 16 or 256 numbers; one table, one per row, or one of several per group
    W[n, k] = float(u[n, k]) * s           small floats, which need no table: their bits are those of a wider one
    W[n, k] = (2 u[n, k] - 1) * s          signs, floats of one bit
    W[n, k] = sum of planes[u[n, k]]       bit planes: what lies in the place of scales makes the table of a group

with s, z and the table's number those of row n and of k's group; s may be a byte (`block_scales`), and is then multiplied by
the weight's factor where there is one. `pack/tiles.py` says where each bit of u lies, `pack/tile_orders.py` for floats
and for tables, `pack/nibbles.py` for planes.

Shape legend: N out features, K in features, R = ceil(N / 16) row tiles, C = ceil(K / 128) k tiles, G groups along K,
T tables, E = 16 or 256 entries.

Codes of other widths into tables are held in the next of 4 and 8 bits, with tables filled up by zeros: 3 bits take a third
more memory than in the file, and run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.gemm.block_scales import BYTES, STORED, UE5M3, stored_bytes, tile_bytes
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.plane_tables import MOST_PLANES, OF_BLOCKS, OF_ROWS
from aerogel.kernels.gemm.small_floats import ORDERS, mantissa_bits, names, own_names, pack_floats
from aerogel.pack import bits as stream
from aerogel.pack import tiles
from aerogel.pack.mirrored_tables import from_kept, mirrored, to_kept
from aerogel.pack.tile_orders import BYTES as WHOLE_BYTES
from aerogel.pack.tile_orders import PAIRS, ROWS, Order, pack_in_order, unpack_in_order
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.grids import Codes, Fp8Grid, Grid, IntGrid
from aerogel.quantize.tables import TableGrid

P = ParamSpec("P")
T = TypeVar("T")

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class TileWeight:
    """Tensors and shape of one weight.

    codes: uint8 [R, C, 256 * bits], see `pack.tiles`.
    scale: fp16, bf16 or fp32 [R, G, 16]; or bytes of a type in `block_scales.BYTES`, for tables and floats; or of a type in
        `plane_tables`, for bit planes.
    zero: uint8 (the integer z_u), or float in the scale's dtype (its value), [R, G, 16]; None when symmetric or a table. Of
        four planes their offset in 16 bits.
    table: fp16, bf16 or fp32 [T, E]: T is 1, or N rounded up to row tiles (one per row), or anything with `pick`.
    pick: uint8 [R, G, 16], the number of each group's table, with `mirrored_tables.SIGN` where its numbers are taken
        with the other sign; None otherwise.
    group_size: a multiple of 16, or 0 for one scale per row (G = 1).
    N, K: the weight's own shape.
    floats: the codes are floats (`small_floats.KINDS`) with so many bits of mantissa; 0 where they are none. 1 with codes of
        one bit: signs.
    factor: fp32 scalar that multiplies every scale, for scales of bytes; None for 1.
    outliers: weights that are added to what the codes say; None for none.
    kept: weights of columns beside the codes as fragments (`cuda_kept`), which have their own inputs; None for none.
    exact: outliers have inputs of their own; codes meet rounded ones.
    in_bytes: codes of an `exact` one and their inputs are multiplied as bytes, outliers and theirs in 16 bits (`cuda_int8`).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    pick: Tensor | None
    group_size: int
    N: int
    K: int
    floats: int = 0
    factor: Tensor | None = None
    outliers: TileOutliers | None = None
    kept: Tensor | None = None
    exact: bool = False
    in_bytes: bool = False

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.codes.shape[2] // 256

    @property
    def order(self) -> Order | None:
        """How the bits of words are ordered; None as `pack/tiles.py` has it."""
        tables = 0 if self.table is None else len(self.table)
        return order_of(self.bits, self.floats, tables > 0, rows=tables > 1 and self.pick is None)

    @property
    def planes(self) -> bool:
        """Whether the codes are those of bit planes."""
        return self.scale.dtype in (OF_ROWS, OF_BLOCKS)

    @property
    def groups(self) -> int:
        """Groups along K."""
        return self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a pass over the weight reads."""
        held = (self.codes, self.scale, self.zero, self.table, self.pick)
        beside = 0 if self.outliers is None else self.outliers.by_row_E.nbytes
        return beside + sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def kind(self) -> tuple[object, ...]:
        """All that a choice of kernels may depend on: shapes and types, not where the tensors lie."""
        held = (self.codes, self.scale, self.zero, self.table, self.pick)
        facts = (None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in held)
        apart = self.outliers is not None and self.outliers.apart is not None
        patches = self.outliers is not None and self.outliers.patches is not None
        beside = self.outliers is not None, apart, patches, self.exact, self.in_bytes, self.kept is not None
        return (self.N, self.K, self.group_size, self.floats, *beside, *facts)

    def check(self) -> None:
        """Raises `BadInput` where shapes or dtypes contradict each other."""
        R, C = tiles.tile_counts(self.N, self.K)
        G = 1 if self.group_size == 0 else -(-self.K // self.group_size)
        per_group = (R, G, 16)
        zeros = (torch.float16, torch.bfloat16) if self.planes else (torch.uint8, self.scale.dtype)
        found = {
            "codes": self.codes.dtype == torch.uint8 and tuple(self.codes.shape) == (R, C, 256 * self.bits),
            "group_size": self.group_size >= 0 and self.group_size % 16 == 0,
            "scale": self.scale.dtype in (*SCALE_DTYPES, *BYTES, OF_ROWS, OF_BLOCKS) and tuple(self.scale.shape) == per_group,
            "zero": self.zero is None or (self.zero.dtype in zeros and tuple(self.zero.shape) == per_group),
            "table": self.table is None or self._table_fits(R),
            "pick": self.pick is None or (self.pick.dtype == torch.uint8 and tuple(self.pick.shape) == per_group),
            "floats": not self.floats or (self.bits in (1, 4, 5, 6, 8) and self.zero is None and self.table is None),
            # Their sums are not scaled by rows: scales stand in the loop, none at its end, or outliers have other sums.
            "outliers": self.outliers is None
            or ((self.group_size > 0 or self.in_bytes) and self.outliers.start_T1.numel() == -(-R // 4) * C + 1),
            "kept": self.kept is None or (self.group_size > 0 and self.scale.dtype not in BYTES and self.kept.shape[0] == R),
            "factor": self.factor is None or (self.factor.dtype == torch.float32 and self.factor.numel() == 1),
        }
        if self.planes:
            found["scale"] &= self._planes_fit()
        if self.scale.dtype in BYTES:
            found["scale"] &= self.group_size > 0 and (self.floats > 0 or self.table is not None)
        else:
            found["factor"] = self.factor is None
        held = (self.codes, self.scale, self.zero, self.table, self.pick)
        found["strides"] = all(tensor is None or tensor.is_contiguous() for tensor in held)
        wrong = [name for name, right in found.items() if not right]
        if wrong:
            raise BadInput(
                f"a tiled weight [{self.N}, {self.K}] in {self.bits} bits with group_size {self.group_size} has"
                f" {', '.join(wrong)} of the wrong shape or dtype; codes are {list(self.codes.shape)} (expected"
                f" {[R, C, 256 * self.bits]}), scales {self.scale.dtype} {list(self.scale.shape)} (expected {list(per_group)})"
            )

    def _planes_fit(self) -> bool:
        offset = self.zero is None or (self.bits == MOST_PLANES and self.scale.dtype == OF_ROWS)
        return offset and self.bits <= MOST_PLANES and self.group_size > 0 and self.table is None and not self.floats

    def _table_fits(self, R: int) -> bool:
        table = self.table
        if table is None or table.dim() != 2 or self.zero is not None or table.dtype not in SCALE_DTYPES:
            return False
        tables_fit = table.shape[0] <= 128 if self.pick is not None else table.shape[0] in (1, R * 16)
        return tables_fit and table.shape[1] == 1 << self.bits and self.bits in (4, 8)


def per_kind(choice: Callable[Concatenate[TileWeight, P], T]) -> Callable[Concatenate[TileWeight, P], T]:
    """Remembers a function of a weight that looks at its kind only: a model has hundreds of weights of a handful of kinds."""
    found: dict[tuple[object, ...], T] = {}

    def remembered(weight: TileWeight, /, *rest: P.args, **named: P.kwargs) -> T:
        key = (weight.kind, rest, tuple(named.items()))
        if key not in found:
            found[key] = choice(weight, *rest, **named)
        return found[key]

    functools.update_wrapper(remembered, choice)
    return remembered


def order_of(bits: int, floats: int, table: bool, *, rows: bool = False) -> Order | None:
    """The order of a word's bits for a kind of codes; None for that of `pack/tiles.py`. rows: each row has a table."""
    if floats:
        return ORDERS.get((bits, floats))
    return {4: ROWS if rows else PAIRS, 8: WHOLE_BYTES}[bits] if table else None


def tensors_of(codes: Codes, pack: Callable[[Tensor, int], Tensor] = tiles.pack_tiles) -> dict[str, Tensor]:
    """Codes [N, K] as the layout's tensors: tile_codes, tile_scale and, where needed, tile_zero, tile_table, tile_pick.
    `pack` says how codes lie inside a tile. Raises `BadInput` for grids that are neither integers (their zero points whole or
    not), e4m3 nor a table, and for e4m3 codes that are no number."""
    grid = codes.grid
    N = codes.values_NK.shape[0]
    if isinstance(grid, IntGrid):
        values = stream.signed_to_unsigned(codes.values_NK, grid.bits)
        layout = {"tile_codes": pack(values, grid.bits), "tile_scale": tiles.pack_rows_of_tiles(codes.scale_NG)}
        if codes.zero_NG is not None:
            zero = stream.signed_to_unsigned(codes.zero_NG.to(torch.int8), grid.bits)
            layout["tile_zero"] = tiles.pack_rows_of_tiles(zero)
        return layout
    if isinstance(grid, Affine) and codes.zero_NG is not None:
        factors = {"tile_scale": codes.scale_NG, "tile_zero": codes.zero_NG}
        layout = {name: tiles.pack_rows_of_tiles(tensor) for name, tensor in factors.items()}
        return layout | {"tile_codes": pack(codes.values_NK, grid.bits)}
    if isinstance(grid, Fp8Grid):
        values = codes.values_NK.contiguous().view(torch.uint8)
        layout = {"tile_scale": tiles.pack_rows_of_tiles(codes.scale_NG.repeat_interleave(grid.shared_rows or N, 0)[:N])}
        return layout | {"tile_codes": pack_floats(values, 8, 3, pack)}
    if codes.table_TE is not None:
        return _table_tensors(codes, pack)
    raise BadInput(f"codes on a {type(grid).__name__} have no tile layout; it holds integers, e4m3 floats and tables")


def _table_tensors(codes: Codes, pack: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """Codes into a table. Scales in e4m3 and e8m0 stay bytes, with the factor beside them; other narrow ones are tiled as
    float32 with the factor multiplied in, which is exact, and what they were stored as stays beside them."""
    N = codes.values_NK.shape[0]
    shared, table_TE = codes.grid.shared_rows or N, codes.table_TE
    if table_TE is None:
        raise BadInput("codes into a table need the table, and there is none")
    ours = pack is tiles.pack_tiles
    values, layout = codes.values_NK, _scale_tensors(codes, shared, N)
    bits = 4 if codes.grid.bits <= 4 else 8
    mantissa = mantissa_bits(codes.grid)
    if mantissa and isinstance(codes.grid, TableGrid):
        values = _renamed(_nothing_without_scale(codes, shared), names(codes.grid))
        return layout | {"tile_codes": pack_floats(values, max(codes.grid.bits, 4), mantissa, pack)}
    rows = -N % tiles.ROWS if codes.table_per_row else 0
    pick_NG = None if codes.pick_NG is None else codes.pick_NG.repeat_interleave(shared, 0)[:N]
    if ours and pick_NG is not None and isinstance(codes.grid, TableGrid):
        values, pick_NG = to_kept(codes.grid, values, pick_NG, codes.grid.group_size or values.shape[1])
        table_TE = table_TE[mirrored(codes.grid).kept]
    layout["tile_table"] = torch.nn.functional.pad(table_TE, (0, (1 << bits) - table_TE.shape[1], 0, rows))
    order = order_of(bits, 0, True, rows=codes.table_per_row) if ours else None
    layout["tile_codes"] = pack(values, bits) if order is None else pack_in_order(values, bits, order)
    if pick_NG is not None:
        layout["tile_pick"] = tiles.pack_rows_of_tiles(pick_NG)
    return layout


def _renamed(values: Tensor, others: Tensor | None) -> Tensor:
    """others[values]."""
    return values if others is None or values.is_meta else others.to(values.device)[values.long()]


def _scale_tensors(codes: Codes, shared: int, N: int) -> dict[str, Tensor]:
    """tile_scale with whatever is needed beside it."""
    scale = codes.scale_NG
    narrow = scale.dtype in STORED and codes.grid.group_size is not None
    made = tile_bytes(scale) if narrow and (codes.factor is not None or scale.dtype != UE5M3) else None
    if made is not None:
        held, power = made
        rows = held.view(torch.uint8).repeat_interleave(shared, 0)[:N]
        layout = {"tile_scale": tiles.pack_rows_of_tiles(rows).view(held.dtype)}
        if codes.factor is not None:
            layout["tile_factor"] = codes.factor.float().reshape(())
        if scale.dtype == UE5M3:
            layout |= {"stored_factor": layout["tile_factor"], "tile_factor": layout["tile_factor"] * 2.0**power}
        return layout
    narrow = scale.dtype in SCALE_DTYPES and codes.factor is None
    held = scale if narrow else codes.effective_scale()
    layout = {"tile_scale": tiles.pack_rows_of_tiles(held.repeat_interleave(shared, 0)[:N])}
    if not narrow:
        layout["stored_scale"] = scale
    if codes.factor is not None:
        layout["stored_factor"] = codes.factor
    return layout


def _nothing_without_scale(codes: Codes, shared: int) -> Tensor:
    """The codes, 0 in groups whose e4m3 scale is 0: the kernels' byte 0 is a small number where floats are multiplied."""
    values, scale = codes.values_NK, codes.scale_NG
    if scale.dtype != torch.float8_e4m3fn or scale.is_meta or bool(scale.view(torch.uint8).all()):
        return values
    N, K = values.shape
    kept = (scale.view(torch.uint8) != 0).repeat_interleave(shared, 0)[:N].repeat_interleave(codes.grid.group_size or K, 1)
    return values * kept[:, :K]


def _table_codes(layout: Mapping[str, Tensor], values: Tensor, grid: Grid, ours: bool) -> Codes:
    """The inverse of `_table_tensors`, exactly."""
    N = values.shape[0]
    first_rows = slice(None, None, grid.shared_rows or N)
    if "tile_table" not in layout and isinstance(grid, TableGrid):
        values = _renamed(values, own_names(grid))
    pick, table_TE = layout.get("tile_pick"), layout.get("tile_table")
    pick_NG = None if pick is None else tiles.unpack_rows_of_tiles(pick, N)
    if pick_NG is not None and ours and isinstance(grid, TableGrid):
        values, pick_NG = from_kept(grid, values, pick_NG, grid.group_size or values.shape[1])
        table_TE = None
    if table_TE is None and isinstance(grid, TableGrid):
        table_TE = grid.tables.to(values.device)
    per_row = pick is None and table_TE is not None and len(table_TE) > 1
    scale, held = layout.get("stored_scale"), layout["tile_scale"]
    if scale is None:
        raw = held.view(torch.uint8) if held.dtype in BYTES else held
        scale = tiles.unpack_rows_of_tiles(raw, N)[first_rows].contiguous()
        scale = stored_bytes(scale.view(held.dtype), grid.scale_dtype, _power_of(layout)) if held.dtype in BYTES else scale
    return Codes(
        values_NK=values,
        scale_NG=scale,
        table_TE=table_TE if table_TE is None else table_TE[: N if per_row else None, : 1 << grid.bits].contiguous(),
        pick_NG=None if pick_NG is None else pick_NG[first_rows].contiguous(),
        factor=layout.get("stored_factor", layout.get("tile_factor")),
        grid=grid,
    )


def _power_of(layout: Mapping[str, Tensor]) -> int:
    """The power of two that its scales of bytes lack."""
    return int((layout["tile_factor"] / layout["stored_factor"]).log2()) if "stored_factor" in layout else 0


def codes_of(
    layout: Mapping[str, Tensor],
    grid: Grid,
    N: int,
    K: int,
    unpack: Callable[[Tensor, int, int, int], Tensor] = tiles.unpack_tiles,
) -> Codes:
    """The inverse of `tensors_of`, exactly; `unpack` inverts its `pack`."""
    table = "tile_table" in layout
    ours, packed = unpack is tiles.unpack_tiles, layout["tile_codes"]
    bits = packed.shape[2] // 256
    rows = table and "tile_pick" not in layout and len(layout["tile_table"]) > 1
    order = order_of(bits, 0 if table else mantissa_bits(grid), table, rows=rows) if ours else None
    values = unpack(packed, bits, N, K) if order is None else unpack_in_order(packed, bits, order, N, K)
    if not isinstance(grid, IntGrid | Affine | Fp8Grid):
        return _table_codes(layout, values, grid, ours)
    scale = tiles.unpack_rows_of_tiles(layout["tile_scale"], N)
    if isinstance(grid, Fp8Grid):
        scale = scale[:: grid.shared_rows or N].contiguous()
        return Codes(values_NK=values.view(torch.float8_e4m3fn), scale_NG=scale, zero_NG=None, grid=grid)
    zero = layout.get("tile_zero")
    if isinstance(grid, Affine) and zero is not None:
        return Codes(values_NK=values, scale_NG=scale, zero_NG=tiles.unpack_rows_of_tiles(zero, N), grid=grid)
    if zero is not None:
        zero = stream.unsigned_to_signed(tiles.unpack_rows_of_tiles(zero, N), grid.bits)
    return Codes(values_NK=stream.unsigned_to_signed(values, grid.bits), scale_NG=scale, zero_NG=zero, grid=grid)
