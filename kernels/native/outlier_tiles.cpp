// Sorts outliers that lie by rows into tiles; see outlier_tiles.h.
#include "outlier_tiles.h"

#include <cstring>

#include "api.h"
#include "pool.h"

using namespace aerogel;

namespace {

int64_t column_of(const Beside& b, int64_t i) {
    return b.column_bytes == 2 ? static_cast<const int16_t*>(b.column)[i] : static_cast<const int32_t*>(b.column)[i];
}

// Whether columns lie within the weight and ascend in every row.
bool sorted(const Beside& b) {
    for (int64_t row = 0; row < b.rows; ++row) {
        int64_t last = -1;
        if (b.start[row + 1] < b.start[row] || b.start[row + 1] > b.outliers) return false;
        for (int64_t i = b.start[row]; i < b.start[row + 1]; ++i) {
            const int64_t column = column_of(b, i);
            if (column <= last || column >= b.columns) return false;
            last = column;
        }
    }
    return true;
}

// Walks the steps of a strip in order: take(block, mask, outliers of the step in the order of their places).
template <class Take>
int32_t walk(const Beside& b, int64_t strip, Take&& take) {
    int64_t at[kStrip], end[kStrip];
    for (int64_t r = 0; r < kStrip; ++r) {
        const int64_t row = strip * kStrip + r;
        at[r] = row < b.rows ? b.start[row] : 0, end[r] = row < b.rows ? b.start[row + 1] : 0;
    }
    for (int32_t steps = 0;; ++steps) {
        int64_t block = b.columns, taken[kStrip] = {}, place[2 * kStrip];
        for (int64_t r = 0; r < kStrip; ++r) {
            const int64_t own = at[r] < end[r] ? column_of(b, at[r]) / kOutlierBlock : block;
            block = own < block ? own : block;
        }
        if (block == b.columns) return steps;
        uint32_t mask = 0;
        for (int64_t r = 0; r < kStrip; ++r) {
            for (; taken[r] < 2 && at[r] < end[r] && column_of(b, at[r]) / kOutlierBlock == block; ++at[r], ++taken[r]) {
                const int64_t to = 2 * r + taken[r];
                place[to] = at[r], mask |= 1u << to;
            }
        }
        take(block, mask, place);
    }
}

void fill(const Beside& b, int64_t strip, const OutlierTiles& t) {
    int64_t step = t.first[strip], to = b.start[strip * kStrip];
    walk(b, strip, [&](int64_t block, uint32_t mask, const int64_t* place) {
        const_cast<uint16_t*>(t.block)[step] = static_cast<uint16_t>(block);
        const_cast<uint32_t*>(t.mask)[step++] = mask;
        for (; mask; mask &= mask - 1, ++to) {
            const int64_t from = place[__builtin_ctz(mask)];
            const_cast<uint16_t*>(t.value)[to] = static_cast<const uint16_t*>(b.value)[from];
            const_cast<uint16_t*>(t.column)[to] = static_cast<uint16_t>(column_of(b, from) % kOutlierBlock);
        }
    });
}

}  // namespace

int64_t aerogel_native_outlier_tiles(const Beside* beside, void* to, int64_t bytes) {
    const Beside& b = *beside;
    constexpr int64_t kMost = int64_t{1} << 31;
    if (!b.start || b.rows < 1 || b.columns < 1 || b.rows > kMost || b.columns > kOutlierBlock << 16) return -kBadShape;
    if ((b.column_bytes != 2 && b.column_bytes != 4) || b.value_type != kBfloat16) return -kBadType;
    if (b.start[0] != 0 || b.start[b.rows] != b.outliers) return -kBadShape;
    if (!sorted(b)) return -kBadOrder;
    const int64_t strips = outlier_strips(b.rows), head = 4 * (strips + 1);
    // The first part of the memory counts the steps of every strip, which says where the rest lies.
    if (!to || bytes < head) return outlier_tiles_at(nullptr, b.rows, b.outliers, 0).bytes;
    int32_t* first = static_cast<int32_t*>(to);
    parallel(strips, b.threads, [&](int64_t strip, int) { first[strip + 1] = walk(b, strip, [](int64_t, uint32_t, const int64_t*) {}); });
    first[0] = 0;
    for (int64_t strip = 0; strip < strips; ++strip) first[strip + 1] += first[strip];
    const OutlierTiles t = outlier_tiles_at(to, b.rows, b.outliers, first[strips]);
    if (bytes < t.bytes) return t.bytes;
    parallel(strips, b.threads, [&](int64_t strip, int) { fill(b, strip, t); });
    // What is read behind the last outlier.
    memset(const_cast<uint16_t*>(t.value) + b.outliers, 0, kOutlierTail), memset(const_cast<uint16_t*>(t.column) + b.outliers, 0, kOutlierTail);
    return t.bytes;
}
