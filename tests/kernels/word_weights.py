"""Random weights in words of eight codes, what they mean, and how far a kernel may be from it; for the CPU and the GPU."""

from __future__ import annotations

import torch
from tests.kernels.tile_weights import dense64

from aerogel.kernels.gemm.cuda_weight import TileWeight, order_of
from aerogel.pack import tiles, words
from aerogel.pack.tile_orders import pack_in_order

# (group_size, zero point or table, scale dtype): each of them at least once.
KINDS: list[tuple[int, str, torch.dtype]] = [
    (128, "none", torch.bfloat16),
    (32, "integer", torch.float16),
    (48, "float", torch.float32),
    (0, "integer", torch.bfloat16),
    (16, "none", torch.float16),
    (256, "float", torch.bfloat16),
    (64, "one table", torch.float32),
    (0, "table per row", torch.bfloat16),
    (32, "picked table", torch.float16),
]
BOUND = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""Relative Frobenius error against float64: the rounding of the output, everything before it being exact or float32."""
ROUNDED = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""The same where float zero points and table numbers are rounded to the activations' type as well."""


def weight_of(
    N: int, K: int, bits: int, kind: tuple[int, str, torch.dtype], device: str = "cpu"
) -> tuple[TileWeight, torch.Tensor]:
    """A weight whose codes lie in words, and the weight in float64."""
    size, what, dtype = kind
    generator = torch.Generator().manual_seed(N + 31 * K + bits)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    G = -(-K // size) if size else 1
    scale = (0.5 + torch.rand(N, G, generator=generator)).to(dtype)
    held = torch.randint(0, 1 << bits, (N, G), generator=generator)
    zero = {"integer": held.to(torch.uint8), "float": (held + 0.375).to(dtype)}.get(what)
    tables = {"one table": 1, "table per row": -(-N // 16) * 16, "picked table": 3}.get(what, 0)
    table = torch.randn(tables, 1 << bits, generator=generator).to(torch.float16) if tables else None
    pick = torch.randint(0, 3, (N, G), generator=generator, dtype=torch.uint8) if what == "picked table" else None
    rows = tiles.pack_rows_of_tiles
    made = {
        "scale": rows(scale),
        "zero": None if zero is None else rows(zero),
        "table": table,
        "pick": None if pick is None else rows(pick),
    }
    facts = {"group_size": size, "N": N, "K": K}
    order = order_of(bits, floats=0, table=table is not None, rows=what == "table per row")
    tiled = tiles.pack_tiles(codes, bits) if order is None else pack_in_order(codes, bits, order)
    dense = dense64(TileWeight(codes=tiled, **made, **facts))
    placed = {name: tensor if tensor is None else tensor.to(device) for name, tensor in made.items()}
    return TileWeight(codes=words.pack_words(codes, bits).to(device), **placed, **facts), dense.to(device)


def applies(bits: int, kind: tuple[int, str, torch.dtype]) -> bool:
    """Tables have 16 or 256 entries."""
    return "table" not in kind[1] or bits in (4, 8)


def bound(kind: tuple[int, str, torch.dtype], dtype: torch.dtype) -> float:
    """The error allowed for such a weight and such activations."""
    return (BOUND if kind[1] in ("none", "integer") else ROUNDED)[dtype]


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; NaN where anything is NaN."""
    return ((y.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
