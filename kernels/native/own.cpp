// The C boundary of weights whose rows have tables of their own: everything is checked before it is read.
#include "own.h"

#include "api.h"
#include "boundary.h"
#include "paths.h"

using namespace aerogel;

int32_t aerogel_native_own_check(const OwnTables* weight) {
    const OwnTables& w = *weight;
    constexpr int64_t kMost = int64_t{1} << 31;
    if (w.bits < 1 || w.bits > 4) return kBadWidth;
    if (w.rows < 1 || w.columns < 1 || w.rows > kMost || w.columns > kMost) return kBadShape;
    if (w.group < 0 || (w.group % kLookupStep != 0 && w.group < w.columns)) return kBadGroup;
    if (w.shared < 0 || w.shared % kLookupStrip != 0 || (w.shared && w.group)) return kBadGroup;
    const int64_t strips = ceil_div(w.rows, kLookupStrip);
    if (w.codes_bytes != strips * ceil_div(w.columns, kLookupTile) * kVector * w.bits) return kTruncatedCodes;
    const int64_t runs = w.shared ? ceil_div(w.rows, w.shared) : strips, bytes = w.shared ? shared_table_bytes(w.bits) : own_table_bytes(w.bits);
    if (w.table_bytes != runs * own_table_groups(w) * bytes) return kBadTable;
    return unreadable(w.codes, kVector) || unreadable(w.table, 1) ? kMisaligned : kDone;
}

int32_t aerogel_native_own(const OwnTables* weight, const Call* call) {
    const Call& c = *call;
    int32_t status = aerogel_native_own_check(weight);
    if (status == kDone) status = check_beside(c, weight->rows, weight->columns);
    if (status != kDone) return status;
    if (c.tokens < 0 || c.tokens > (int64_t{1} << 28)) return kBadShape;
    if (c.x_type != kBfloat16 || c.numerics != kExact || c.bias_type < kFloat32 || c.bias_type > kBfloat16) return kBadType;
    if (c.x_bytes != c.tokens * weight->columns * 2 || c.y_bytes != c.tokens * weight->rows * 2) return kTruncatedActivations;
    if (c.bias && c.bias_bytes != weight->rows * type_size(c.bias_type)) return kTruncatedActivations;
    if (unreadable(c.x, 2) || unreadable(c.y, 2) || (c.bias && unreadable(c.bias, type_size(c.bias_type)))) return kMisaligned;
    const int32_t path = c.path < 0 ? best_path(kExact) : c.path;
    if (path >= kPaths || !path_entry(path).able || !path_entry(path).exact) return kNoSuchPath;
    Call bounded = c;
    bounded.threads = bounded_threads(c.threads);
    if (c.tokens == 0) return kDone;
    status = path_entry(path).own(*weight, bounded);
    return status == kDone ? add_beside(bounded, weight->rows, weight->columns, path) : status;
}
