// Sorts outliers that lie by rows into tiles; see outlier_tiles.h.
#include "outlier_tiles.h"

#include <cstring>

#include "api.h"
#include "pool.h"
#include "scratch.h"

using namespace aerogel;

namespace {

// Outliers of a weight whose column numbers are of one type.
template <class Column>
struct ByRow {
    const Beside& b;
    const Column* column;

    explicit ByRow(const Beside& of) : b(of), column(static_cast<const Column*>(of.column)) {}

    // Whether columns lie within the weight and ascend in every row.
    bool sorted() const {
        for (int64_t row = 0; row < b.rows; ++row) {
            int64_t last = -1;
            if (b.start[row + 1] < b.start[row] || b.start[row + 1] > b.outliers) return false;
            for (int64_t i = b.start[row]; i < b.start[row + 1]; ++i) {
                if (column[i] <= last || column[i] >= b.columns) return false;
                last = column[i];
            }
        }
        return true;
    }

    // Calls each(outlier, its block, how many of its row and block come before it, its row in the strip).
    template <class Each>
    void walk(int64_t strip, Each&& each) const {
        for (int64_t r = 0; r < kStrip && strip * kStrip + r < b.rows; ++r) {
            const int64_t row = strip * kStrip + r;
            int64_t block = -1, before = 0;
            for (int64_t i = b.start[row]; i < b.start[row + 1]; ++i) {
                const int64_t own = column[i] / kOutlierBlock;
                before = own == block ? before + 1 : 0, block = own;
                each(i, block, before, r);
            }
        }
    }

    // How many steps a strip has; `ends` [blocks] gets where those of every block end.
    int32_t steps(int64_t strip, int32_t* ends) const {
        const int64_t blocks = ceil_div(b.columns, kOutlierBlock);
        memset(ends, 0, 4 * static_cast<size_t>(blocks));
        walk(strip, [&](int64_t, int64_t block, int64_t before, int64_t) {
            const int32_t own = static_cast<int32_t>(before / 2 + 1);
            ends[block] = own > ends[block] ? own : ends[block];
        });
        for (int64_t block = 1; block < blocks; ++block) ends[block] += ends[block - 1];
        return ends[blocks - 1];
    }

    void fill(int64_t strip, const OutlierTiles& t, int32_t* ends) const {
        const int64_t first = t.first[strip], count = steps(strip, ends), blocks = ceil_div(b.columns, kOutlierBlock);
        uint32_t* mask = const_cast<uint32_t*>(t.mask) + first;
        uint16_t* of_step = const_cast<uint16_t*>(t.block) + first;
        memset(mask, 0, 4 * static_cast<size_t>(count));
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t s = block ? ends[block - 1] : 0; s < ends[block]; ++s) of_step[s] = static_cast<uint16_t>(block);
        }
        const auto step_of = [&](int64_t block, int64_t before) { return (block ? ends[block - 1] : 0) + before / 2; };
        walk(strip, [&](int64_t, int64_t block, int64_t before, int64_t r) { mask[step_of(block, before)] |= 1u << (2 * r + before % 2); });
        // A step's outliers begin behind those of the steps before it.
        int32_t* begins = ends + blocks;
        int32_t at = b.start[strip * kStrip];
        for (int64_t s = 0; s < count; ++s) begins[s] = at, at += __builtin_popcount(mask[s]);
        walk(strip, [&](int64_t i, int64_t block, int64_t before, int64_t r) {
            const int64_t s = step_of(block, before);
            const int64_t to = begins[s] + __builtin_popcount(mask[s] & ((1u << (2 * r + before % 2)) - 1));
            const_cast<uint16_t*>(t.value)[to] = static_cast<const uint16_t*>(b.value)[i];
            const_cast<uint16_t*>(t.column)[to] = static_cast<uint16_t>(column[i] % kOutlierBlock);
        });
    }
};

// Steps that the strip with the most outliers can have at most, one for each.
int64_t most_steps(const Beside& b) {
    int64_t most = 0;
    for (int64_t row = 0; row < b.rows; row += kStrip) {
        const int64_t stop = row + kStrip < b.rows ? row + kStrip : b.rows, own = b.start[stop] - b.start[row];
        most = own > most ? own : most;
    }
    return most;
}

template <class Column>
int64_t sort_into_tiles(const Beside& b, void* to, int64_t bytes) {
    const ByRow<Column> rows(b);
    if (!rows.sorted()) return -kBadOrder;
    const int64_t strips = outlier_strips(b.rows);
    // The first part of the memory counts the steps of every strip, which says where the rest lies.
    if (!to || bytes < 4 * (strips + 1)) return outlier_tiles_at(nullptr, b.rows, b.outliers, 0).bytes;
    const int threads = b.threads < 1 ? 1 : b.threads > kMostThreads ? kMostThreads : b.threads;
    const size_t each = static_cast<size_t>(ceil_div(b.columns, kOutlierBlock) + most_steps(b)) * 4;
    char* memory = static_cast<char*>(scratch(kWorkerScratch, each * static_cast<size_t>(threads)));
    if (!memory) return -kOutOfMemory;
    const auto mine = [&](int worker) { return reinterpret_cast<int32_t*>(memory + each * static_cast<size_t>(worker)); };
    int32_t* first = static_cast<int32_t*>(to);
    parallel(strips, threads, [&](int64_t strip, int worker) { first[strip + 1] = rows.steps(strip, mine(worker)); });
    first[0] = 0;
    for (int64_t strip = 0; strip < strips; ++strip) first[strip + 1] += first[strip];
    const OutlierTiles t = outlier_tiles_at(to, b.rows, b.outliers, first[strips]);
    if (bytes < t.bytes) return t.bytes;
    parallel(strips, threads, [&](int64_t strip, int worker) { rows.fill(strip, t, mine(worker)); });
    // What is read behind the last outlier.
    memset(const_cast<uint16_t*>(t.value) + b.outliers, 0, kOutlierTail), memset(const_cast<uint16_t*>(t.column) + b.outliers, 0, kOutlierTail);
    return t.bytes;
}

}  // namespace

int64_t aerogel_native_outlier_tiles(const Beside* beside, void* to, int64_t bytes) {
    const Beside& b = *beside;
    constexpr int64_t kMost = int64_t{1} << 31;
    if (!b.start || b.rows < 1 || b.columns < 1 || b.rows > kMost || b.columns > kOutlierBlock << 16) return -kBadShape;
    if ((b.column_bytes != 2 && b.column_bytes != 4) || b.value_type != kBfloat16) return -kBadType;
    if (b.start[0] != 0 || b.start[b.rows] != b.outliers) return -kBadShape;
    return b.column_bytes == 2 ? sort_into_tiles<int16_t>(b, to, bytes) : sort_into_tiles<int32_t>(b, to, bytes);
}
