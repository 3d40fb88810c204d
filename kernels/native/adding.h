// What a matmul does with the numbers that stand beside its weight (beside.h): it asks for them ahead, has them added to the
// rows that it made, and does not see the inputs of kept columns where activations are rounded.
#pragma once
#include "numbers.h"
#include "outlier_tiles.h"
#include "scratch.h"
#include "step_structs.h"

namespace aerogel {
namespace UNIT {

inline void add(const Adding& adding, int64_t first, int64_t stop) {
    const int64_t rows = adding.beside.rows;
    adding.rows(adding.beside, adding.inputs, first, stop < rows ? stop : rows);
}

// Asks for what rows first .. stop - 1 will need, while something else is computed.
inline void ask_for(const Adding& adding, int64_t first, int64_t stop) {
    const Beside& b = adding.beside;
    const int64_t last = stop < b.rows ? stop : b.rows;
    const auto lines = [](const void* from, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
    };
    const int64_t begin = b.start ? b.start[first] : 0, end = b.start ? b.start[last] : 0;
    if (adding.tiled) {
        const OutlierTiles t = outlier_tiles_of(b);
        const int64_t step = t.first[first / kStrip], stop_step = t.first[ceil_div(last, kStrip)];
        lines(t.mask, 4 * step, 4 * stop_step), lines(t.block, 2 * step, 2 * stop_step);
        lines(t.value, 2 * begin, 2 * end), lines(t.column, 2 * begin, 2 * end);
    } else if (b.start) {
        lines(b.column, begin * b.column_bytes, end * b.column_bytes);
        lines(b.value, begin * size_of(b.value_type), end * size_of(b.value_type));
    }
    if (b.kept) lines(b.kept_value, first * b.kept * size_of(b.kept_type), last * b.kept * size_of(b.kept_type));
}

// x with zeros at the inputs of kept columns, so that they do not set the unit of all others.
inline const void* quiet(const Beside& b) {
    const size_t size = static_cast<size_t>(size_of(b.type)), row = static_cast<size_t>(b.columns) * size;
    char* to = static_cast<char*>(scratch(kQuietScratch, static_cast<size_t>(b.tokens) * row));
    if (!to) return nullptr;
    memcpy(to, b.x, static_cast<size_t>(b.tokens) * row);
    for (int64_t token = 0; token < b.tokens; ++token) {
        for (int64_t i = 0; i < b.kept; ++i) memset(to + static_cast<size_t>(token) * row + static_cast<size_t>(b.index[i]) * size, 0, size);
    }
    return to;
}

}  // namespace UNIT
}  // namespace aerogel
