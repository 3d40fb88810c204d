"""Tensor maps: what the copy engine of compute capability 9.0 must know of a matrix in global memory.

A map is 128 bytes that the driver encodes: address, shape, strides, the box that one copy moves, and how the box is laid out
in shared memory. A kernel gets it inside its arguments. Boxes that hang over the edge are filled with zeros, so that no
kernel needs code for ragged shapes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from aerogel.kernels.cuda.launch import check, driver

BYTES = 128
ALIGNMENT = 64
ELEMENTS = {"uint8": 0, "uint16": 1, "uint32": 2, "uint64": 4, "float16": 6, "float32": 7, "bfloat16": 9}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""The driver's numbers for types, and for the width in bytes over which 16-byte pieces of a box's rows are permuted."""
PROMOTIONS = {64: 1, 128: 2, 256: 3}
"""The driver's numbers for how many bytes the L2 cache fetches of what it misses."""
LARGEST_BOX = 256
"""Elements of a box along one dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A row-major matrix and how it is cut into boxes.

    address: of its first element, a multiple of 16. element: a key of `ELEMENTS`.
    rows, columns: its shape, in elements. row_bytes: from one row to the next, a multiple of 16.
    box_rows, box_columns: of one copy, at most `LARGEST_BOX` each.
    swizzle: bytes, a key of `SWIZZLES`; a row of a box must not be longer unless it is 0.
    promotion: bytes, a key of `PROMOTIONS`.
    """

    address: int
    element: str
    rows: int
    columns: int
    row_bytes: int
    box_rows: int
    box_columns: int
    swizzle: int = 0
    promotion: int = 128

    def encode(self) -> bytes:
        """The map. Raises `RunFailed` with the driver's reason where it does not take these numbers."""
        room = ctypes.create_string_buffer(BYTES + ALIGNMENT)
        place = ctypes.addressof(room) + -ctypes.addressof(room) % ALIGNMENT
        code = driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(place),
            ELEMENTS[self.element],
            2,
            ctypes.c_void_p(self.address),
            (ctypes.c_uint64 * 2)(self.columns, self.rows),
            (ctypes.c_uint64 * 1)(self.row_bytes),
            (ctypes.c_uint32 * 2)(self.box_columns, self.box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            SWIZZLES[self.swizzle],
            PROMOTIONS[self.promotion],
            0,
        )
        check(code, f"describing {self} to the copy engine")
        return ctypes.string_at(place, BYTES)
