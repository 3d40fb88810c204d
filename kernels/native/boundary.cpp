// See boundary.h.
#include "boundary.h"

#include "outlier_tiles.h"
#include "paths.h"

namespace aerogel {

Status check_added(const Beside& b) {
    constexpr int64_t kMost = int64_t{1} << 31;
    if (b.tokens < 0 || b.tokens > (int64_t{1} << 28)) return kBadShape;
    if (b.rows < 1 || b.columns < 1 || b.rows > kMost || b.columns > kMost) return kBadShape;
    if (b.outliers < 0 || b.kept < 0 || b.kept > b.columns || (b.kept && !b.index)) return kBadShape;
    if (b.start && (b.start[0] != 0 || b.start[b.rows] != b.outliers)) return kBadShape;
    if (b.tiles) {
        const int64_t least = outlier_tiles_at(b.tiles, b.rows, b.outliers, 0).bytes;
        if (!b.start || misaligned(b.tiles, 64) || b.tiles_bytes < least || outlier_tiles_of(b).bytes != b.tiles_bytes) return kBadShape;
    }
    const bool columns = b.column_bytes == 2 || b.column_bytes == 4;
    return columns && known_type(b.type) && known_type(b.value_type) && known_type(b.kept_type) ? kDone : kBadType;
}

Beside beside_of(const Call& c, int64_t rows, int64_t columns) {
    Beside b = *c.beside;
    b.x = c.x, b.y = c.y, b.out = c.y, b.tokens = c.tokens, b.rows = rows, b.columns = columns, b.type = c.x_type, b.threads = c.threads;
    return b;
}

Status check_beside(const Call& call, int64_t rows, int64_t columns) {
    return call.beside ? check_added(beside_of(call, rows, columns)) : kDone;
}

Status add_beside(const Call& call, int64_t rows, int64_t columns, int32_t path) {
    return call.beside ? path_entry(path).step.beside(beside_of(call, rows, columns)) : kDone;
}

}  // namespace aerogel
