// The C boundary of weights that are tables: everything is checked before it is read.
#include "lookup.h"

#include "api.h"
#include "paths.h"
#include "pool.h"

using namespace aerogel;

namespace {

int64_t float_size(int32_t type) { return type == kFloat32 ? 4 : 2; }
int64_t scale_size(int32_t type) { return type < kFloat8E4m3 ? float_size(type) : 1; }
bool off(const void* at, int64_t to) { return !at || reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(to) != 0; }

Status check(const Lookup& w) {
    if (w.bits < 2 || w.bits > 4) return kBadWidth;
    constexpr int64_t kMost = int64_t{1} << 31;
    if (w.rows < 1 || w.columns < 1 || w.rows > kMost || w.columns > kMost) return kBadShape;
    if (w.group < 0 || (w.group % kLookupStep != 0 && w.group < w.columns)) return kBadGroup;
    if (w.scale_type < kFloat32 || w.scale_type > kFloat8Ue5m3) return kBadType;
    const int64_t strips = ceil_div(w.rows, kLookupStrip), groups = w.group ? ceil_div(w.columns, w.group) : 1;
    const int64_t factors = strips * groups * kLookupStrip;
    if (w.tables < 1 || (w.pick ? w.tables > 256 : w.tables != 1 && w.tables != strips * kLookupStrip)) return kBadTable;
    if (w.codes_bytes != strips * ceil_div(w.columns, kLookupTile) * kVector * w.bits) return kTruncatedCodes;
    if (w.scale_bytes != factors * scale_size(w.scale_type)) return kTruncatedScale;
    if (w.pick && w.pick_bytes != factors) return kTruncatedScale;
    if (w.number_bytes != w.tables * 4 * kEntries || w.fixed_bytes != w.tables * 2 * kEntries) return kBadTable;
    if (w.unit_bytes != w.tables * 4) return kBadTable;
    if (off(w.codes, kVector) || off(w.scale, scale_size(w.scale_type)) || off(w.unit, 4)) return kMisaligned;
    if (!w.number || !w.fixed) return kBadTable;
    return kDone;
}

Status check(const Lookup& w, const Call& c) {
    if (c.tokens < 0 || c.tokens > (int64_t{1} << 28)) return kBadShape;
    const bool known = c.x_type >= kFloat32 && c.x_type <= kBfloat16 && c.bias_type >= kFloat32 && c.bias_type <= kBfloat16;
    if (!known || (c.numerics != kExact && c.numerics != kFixed)) return kBadType;
    const int64_t size = float_size(c.x_type);
    if (c.x_bytes != c.tokens * w.columns * size || c.y_bytes != c.tokens * w.rows * size) return kTruncatedActivations;
    if (c.bias && c.bias_bytes != w.rows * float_size(c.bias_type)) return kTruncatedActivations;
    if (off(c.x, size) || off(c.y, size) || (c.bias && off(c.bias, float_size(c.bias_type)))) return kMisaligned;
    return kDone;
}

// A pick beyond the tables would read beyond them. All are looked at once, when a weight is made.
Status check_picks(const Lookup& w) {
    const uint8_t* pick = static_cast<const uint8_t*>(w.pick);
    for (int64_t i = 0; pick && i < w.pick_bytes; ++i) {
        if (pick[i] >= w.tables) return kBadTable;
    }
    return kDone;
}

int threads_of(int32_t asked) { return asked < 1 ? 1 : asked > kMostThreads ? kMostThreads : asked; }

}  // namespace

int32_t aerogel_native_lookup_check(const Lookup* weight) {
    const Status status = check(*weight);
    return status == kDone ? check_picks(*weight) : status;
}

int32_t aerogel_native_lookup(const Lookup* weight, const Call* call) {
    Status status = check(*weight);
    if (status == kDone) status = check(*weight, *call);
    if (status == kDone) status = check_beside(*call, weight->rows, weight->columns);
    if (status != kDone || call->tokens == 0) return status;
    const int32_t path = call->path < 0 ? best_path(kExact) : call->path;
    if (path >= kPaths || !path_entry(path).able || !path_entry(path).exact) return kNoSuchPath;
    const LookupRuns& runs = path_entry(path).step.lookup;
    Call bounded = *call;
    bounded.threads = threads_of(call->threads);
    status = (call->numerics == kFixed ? runs.fixed : runs.real)(*weight, bounded);
    return status == kDone ? add_beside(bounded, weight->rows, weight->columns, path) : status;
}
