// Sparse outliers as registers take them: sixteen rows at a time, from one block of 64 inputs after another.
//
// 64 inputs in bfloat16 are two registers, out of which one permutation picks 32 at once. So the outliers of a strip of 16 rows are
// sorted by their block of inputs, and those of a block by steps: a step has up to two outliers of each row, at places row and
// slot. A mask says which places are taken; what is stored of a step are only the outliers that there are, and they are spread
// over their places when they are read. An outlier is two bytes for its column within the block (one byte would be spread three
// times as slowly) and two for its value, a step six more: at 1 %, one step for some seven outliers, 20 % more bytes than in rows.
//
// Places of a step are 2 * row + slot, as products of pairs want them. Within a row outliers stay in order, and every row has its
// own lane: threads change no bit.
#pragma once
#include "layout.h"

namespace aerogel {

constexpr int64_t kOutlierBlock = 64;
constexpr int64_t kOutlierTail = 64;  // bytes behind columns and values, which are read in whole registers

// Parts of one piece of memory, each at a multiple of 64 bytes. The outliers of strip s begin at start[16 * s] of their rows.
struct OutlierTiles {
    const int32_t* first;   // [strips + 1]: the steps of a strip
    const uint32_t* mask;   // [steps]: which places are taken
    const uint16_t* block;  // [steps]: the block of inputs
    const uint16_t* value;  // [outliers]
    const uint16_t* column;  // [outliers]: within the block
    int64_t bytes;          // of all
};

inline int64_t outlier_strips(int64_t rows) { return ceil_div(rows, kStrip); }

// The parts of `memory` for so many steps.
inline OutlierTiles outlier_tiles_at(const void* memory, int64_t rows, int64_t outliers, int64_t steps) {
    int64_t at = 0;
    const auto part = [&](int64_t bytes) {
        const void* begin = static_cast<const char*>(memory) + at;
        at += ceil_div(bytes, 64) * 64;
        return begin;
    };
    OutlierTiles t{};
    t.first = static_cast<const int32_t*>(part(4 * (outlier_strips(rows) + 1)));
    t.mask = static_cast<const uint32_t*>(part(4 * steps));
    t.block = static_cast<const uint16_t*>(part(2 * steps));
    t.value = static_cast<const uint16_t*>(part(2 * outliers + kOutlierTail));
    t.column = static_cast<const uint16_t*>(part(2 * outliers + kOutlierTail));
    t.bytes = at;
    return t;
}

inline OutlierTiles outlier_tiles_of(const Beside& b) {
    return outlier_tiles_at(b.tiles, b.rows, b.outliers, static_cast<const int32_t*>(b.tiles)[outlier_strips(b.rows)]);
}

}  // namespace aerogel
