# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""A run of columns of a solver's sweep in one launch: feedback inside the run, rounding, error, column after column.

`quantize/sweep.py` decides columns one by one, each in the light of the errors before it. On a GPU its dozen small operations
per column are launches of microseconds each, so that a solve waits for launches and for nothing else. Outputs do not depend
on each other, though: here one thread carries one output through all columns of a run, and only what comes from before the
run is a matrix product outside.

    t_i = target_i + sum_{start <= j < i} L_ij d_j,   q_i = round(t_i),   d_i = reference_i - q_i

Rounding is `IntGrid.snap` (clamp and round to even), or the nearest number of a table by binary search over the middles, as
`quantize/levels.py` has it. A thread reads back only what it has itself written, so nothing needs a barrier.

Shape legend: N out features, K in features (columns in the order of solving), G groups, E = 2^BITS numbers of a table.
"""

from __future__ import annotations

from aerogel.kernels.triton_here import language

triton, tl = language()
INTEGERS, ONE_TABLE, TABLE_PER_GROUP, TABLE_PER_ROW = 0, 1, 2, 3
"""How a column is rounded."""
ROWS = 32
"""Outputs of a program, one a thread: a few hundred outputs have to fill a GPU."""
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it drops the digits behind the point of a small float32, halves to even."""


@triton.jit
def _nearest(x, numbers_ptr, middles_ptr, base, BITS: tl.constexpr):
    """The number of a table whose interval holds x. Its middles are padded to E with infinity."""
    place = base * 0
    for level in tl.static_range(BITS):
        half = 1 << (BITS - 1 - level)
        middle = tl.load(middles_ptr + base + place + (half - 1))
        place += tl.where(middle < x, half, 0)
    return tl.load(numbers_ptr + base + place)


@triton.jit
def columns_kernel(
    target_ptr, reference_ptr, lower_ptr, chosen_ptr, error_ptr, order_ptr, mask_ptr,
    scale_ptr, low_ptr, high_ptr, pick_ptr, numbers_ptr, middles_ptr,
    count, N, K, size,
    low, high,
    MODE: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr, RANGES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`count` columns of matrices [count, N] whose rows are contiguous; L [count, count] with K numbers from row to row."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = n < N
    for i in range(count):
        at = i * N + n
        t = tl.load(target_ptr + at, mask=here, other=0.0)
        for j in range(i):
            d = tl.load(error_ptr + j * N + n, mask=here, other=0.0)
            t += tl.load(lower_ptr + i * K + j) * d
        column = tl.load(order_ptr + i)
        step = (column // size) * N + n
        scale = tl.load(scale_ptr + step, mask=here, other=1.0)
        units = tl.div_rn(t, scale)
        if MODE == 0:
            least, most = low, high
            if RANGES:
                least = tl.load(low_ptr + step, mask=here, other=0.0)
                most = tl.load(high_ptr + step, mask=here, other=0.0)
            units = tl.minimum(tl.maximum(units, least), most)
            q = ((units + ROUNDER) - ROUNDER) * scale
        else:
            base = n * 0
            if MODE == 2:
                base = tl.load(pick_ptr + step, mask=here, other=0).to(tl.int32) << BITS
            if MODE == 3:
                base = tl.where(here, n, 0) << BITS
            q = _nearest(units, numbers_ptr, middles_ptr, base, BITS) * scale
        if MASKED:
            q = q * tl.load(mask_ptr + at, mask=here, other=0.0)
        tl.store(chosen_ptr + at, q, mask=here)
        tl.store(error_ptr + at, tl.load(reference_ptr + at, mask=here, other=0.0) - q, mask=here)
