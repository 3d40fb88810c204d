// The C boundary of weights that are tables: everything is checked before it is read.
#include "lookup.h"

#include <cstring>

#include "api.h"
#include "boundary.h"
#include "paths.h"
#include "scratch.h"

using namespace aerogel;

namespace {

int64_t scale_size(int32_t type) { return type < kFloat8E4m3 ? type_size(type) : 1; }

// A group as it lies among the codes, and all columns so.
int64_t filled_group(const Lookup& w) { return w.group < w.columns ? ceil_div(w.group, kLookupStep) * kLookupStep : w.group; }
int64_t filled_columns(const Lookup& w) {
    return filled_group(w) == w.group ? w.columns : ceil_div(w.columns, w.group) * filled_group(w);
}

Status check(const Lookup& w) {
    if (w.bits < 2 || w.bits > 4) return kBadWidth;
    constexpr int64_t kMost = int64_t{1} << 31;
    if (w.rows < 1 || w.columns < 1 || w.rows > kMost || w.columns > kMost) return kBadShape;
    if (w.group < 0) return kBadGroup;
    if (w.scale_type < kFloat32 || w.scale_type > kFloat8Ue5m3) return kBadType;
    const int64_t strips = ceil_div(w.rows, kLookupStrip), groups = w.group ? ceil_div(w.columns, w.group) : 1;
    const int64_t factors = strips * groups * kLookupStrip;
    if (w.tables < 1 || (w.pick ? w.tables > 256 : w.tables != 1 && w.tables != strips * kLookupStrip)) return kBadTable;
    if (w.codes_bytes != strips * ceil_div(filled_columns(w), kLookupTile) * kVector * w.bits) return kTruncatedCodes;
    if (w.scale_bytes != factors * scale_size(w.scale_type)) return kTruncatedScale;
    if (w.pick && w.pick_bytes != factors) return kTruncatedScale;
    if (w.number_bytes != w.tables * 4 * kEntries || w.fixed_bytes != w.tables * 2 * kEntries) return kBadTable;
    if (w.unit_bytes != w.tables * 4) return kBadTable;
    if (unreadable(w.codes, kVector) || unreadable(w.scale, scale_size(w.scale_type)) || unreadable(w.unit, 4)) return kMisaligned;
    if (!w.number || !w.fixed) return kBadTable;
    return kDone;
}

Status check(const Lookup& w, const Call& c) {
    if (c.tokens < 0 || c.tokens > (int64_t{1} << 28)) return kBadShape;
    const bool known = c.x_type >= kFloat32 && c.x_type <= kBfloat16 && c.bias_type >= kFloat32 && c.bias_type <= kBfloat16;
    if (!known || (c.numerics != kExact && c.numerics != kFixed)) return kBadType;
    const int64_t size = type_size(c.x_type);
    if (c.x_bytes != c.tokens * w.columns * size || c.y_bytes != c.tokens * w.rows * size) return kTruncatedActivations;
    if (c.bias && c.bias_bytes != w.rows * type_size(c.bias_type)) return kTruncatedActivations;
    if (unreadable(c.x, size) || unreadable(c.y, size) || (c.bias && unreadable(c.bias, type_size(c.bias_type)))) return kMisaligned;
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

// The activations of a call with zeros where groups are filled up; null without memory.
const void* filled_activations(const Lookup& w, const Call& call) {
    const int64_t size = type_size(call.x_type), groups = ceil_div(w.columns, w.group), step = filled_group(w) * size;
    const size_t bytes = static_cast<size_t>(call.tokens * groups * step);
    char* to = static_cast<char*>(scratch(kFilledScratch, bytes));
    if (!to) return nullptr;
    memset(to, 0, bytes);
    const char* from = static_cast<const char*>(call.x);
    for (int64_t token = 0; token < call.tokens; ++token) {
        for (int64_t left = w.columns; left > 0; left -= w.group, to += step) {
            const int64_t count = (left < w.group ? left : w.group) * size;
            memcpy(to, from, static_cast<size_t>(count)), from += count;
        }
    }
    return scratch(kFilledScratch, bytes);
}

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
    bounded.threads = bounded_threads(call->threads);
    FilledLookup filled{*weight, weight->group};
    Call seen = bounded;
    if (filled_group(*weight) != weight->group) {
        filled.group = filled_group(*weight), filled.columns = filled_columns(*weight);
        seen.x = filled_activations(*weight, *call);
        if (!seen.x) return kOutOfMemory;
    }
    status = (call->numerics == kFixed ? runs.fixed : runs.real)(filled, seen);
    return status == kDone ? add_beside(bounded, weight->rows, weight->columns, path) : status;
}
