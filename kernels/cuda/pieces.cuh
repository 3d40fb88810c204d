// Rows of 16-bit numbers (FP16 1: float16, 0: bfloat16) in pieces of 8 or 16 columns, each in one thread's registers.

#pragma once
#include "machine.cuh"

template <int COLUMNS> struct Piece {
    u32 words[COLUMNS / 2];  // two columns in each, the first in the lower half
    INLINE float operator[](int i) const { return from_half((u16)(words[i / 2] >> (16 * (i % 2)))); }
};

// Columns from `column` on, zeros beyond the row's `end`. aligned: rows lie at multiples of 16 bytes. LAST: nobody reads them again.
template <int COLUMNS, bool LAST = false> INLINE Piece<COLUMNS> read_piece(const u16* row, int column, int end, bool aligned) {
    Piece<COLUMNS> v = {};
    if (aligned && column + COLUMNS <= end) {
UNROLL
        for (int i = 0; i < COLUMNS / 8; i++) {
            const uint4* from = (const uint4*)(row + column) + i;
            const uint4 four = LAST ? load_last(from) : *from;
            v.words[4 * i] = four.x, v.words[4 * i + 1] = four.y, v.words[4 * i + 2] = four.z, v.words[4 * i + 3] = four.w;
        }
        return v;
    }
UNROLL
    for (int i = 0; i < COLUMNS; i++)
        if (column + i < end) v.words[i / 2] |= (u32)row[column + i] << (16 * (i % 2));
    return v;
}

template <int COLUMNS> INLINE void write_piece(u16* row, int column, int end, bool aligned, const Piece<COLUMNS>& v) {
    if (aligned && column + COLUMNS <= end) {
UNROLL
        for (int i = 0; i < COLUMNS / 8; i++)
            ((uint4*)(row + column))[i] = make_uint4(v.words[4 * i], v.words[4 * i + 1], v.words[4 * i + 2], v.words[4 * i + 3]);
        return;
    }
UNROLL
    for (int i = 0; i < COLUMNS; i++)
        if (column + i < end) row[column + i] = (u16)(v.words[i / 2] >> (16 * (i % 2)));
}
