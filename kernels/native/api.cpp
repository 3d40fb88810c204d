// See api.h.
#include "api.h"

#include <chrono>

#include "boundary.h"
#include "outlier_tiles.h"
#include "paths.h"
#include "pool.h"
#include "rows.h"

using namespace aerogel;

namespace {

Status check_tables(const Weight& w, int64_t factors) {
    if (!w.table) return w.pick ? kBadTable : kDone;
    const int64_t entries = int64_t{1} << w.bits, count = w.table_bytes / 4;
    if (w.zero || w.table_bytes % 4 != 0 || misaligned(w.table, 4)) return kBadTable;
    if (!w.pick) return count == entries ? kDone : kBadTable;
    if (misaligned(w.pick, 2) || w.pick_bytes * 8 != factors || w.bits > 4) return kBadTable;
    return count == kPickedTables * entries ? kDone : kBadTable;
}

Status check_weight(const Weight& w) {
    if (w.bits < 1 || w.bits > 8) return kBadWidth;
    constexpr int64_t kMost = int64_t{1} << 31;
    if (w.rows < 1 || w.columns < 1 || w.rows > kMost || w.columns > kMost) return kBadShape;
    if (w.group < 0) return kBadGroup;
    const bool small = w.table && w.scale_type >= kFloat8E4m3 && w.scale_type <= kFloat8Ue5m3;
    if (!known_type(w.scale_type) && !small) return kBadType;
    const int64_t scale_size = small ? 1 : type_size(w.scale_type);
    const Columns columns = columns_of(w);
    const int64_t strips = ceil_div(w.rows, kStrip), factors = strips * columns.groups * kStrip;
    if (w.codes_bytes != strips * ceil_div(columns.count, kTile) * kVector * w.bits) return kTruncatedCodes;
    if (w.scale_bytes != factors * scale_size) return kTruncatedScale;
    if (w.zero && w.zero_bytes != (floating_zero(w) ? 4 * factors : factors)) return kTruncatedZero;
    if (floating_zero(w) && misaligned(w.zero, 4)) return kMisaligned;
    if (!w.codes || !w.scale || misaligned(w.codes, kVector) || misaligned(w.scale, scale_size)) return kMisaligned;
    return check_tables(w, factors);
}

Status check_call(const Weight& w, const Call& c) {
    // 4 * 2^28 tokens * 2^31 columns stay below 2^63: the products below cannot overflow.
    if (c.tokens < 0 || c.tokens > (int64_t{1} << 28)) return kBadShape;
    if (c.numerics < kExact || c.numerics > kInt8Token || ((w.table || floating_zero(w)) && c.numerics != kExact)) return kNoSuchPath;
    if (!known_type(c.x_type) || (c.bias && !known_type(c.bias_type))) return kBadType;
    const int64_t size = type_size(c.x_type);
    if (c.x_bytes != c.tokens * w.columns * size || c.y_bytes != c.tokens * w.rows * size) return kTruncatedActivations;
    if (c.bias && c.bias_bytes != w.rows * type_size(c.bias_type)) return kTruncatedActivations;
    if (misaligned(c.x, size) || misaligned(c.y, size)) return kMisaligned;
    if (c.bias && misaligned(c.bias, type_size(c.bias_type))) return kMisaligned;
    return kDone;
}

uint32_t paths_that(bool (*holds)(const PathEntry&)) {
    uint32_t found = 0;
    for (int32_t path = 0; path < kPaths; ++path) found |= holds(path_entry(path)) ? 1u << path : 0u;
    return found;
}

thread_local volatile uint64_t kept_sum;  // what a reader found: without a use there would be no reading

}  // namespace

int32_t aerogel_native_version() { return 17; }

uint32_t aerogel_native_built() {
    return paths_that([](const PathEntry& entry) { return entry.exact != nullptr; });
}

uint32_t aerogel_native_able() {
    return paths_that([](const PathEntry& entry) { return entry.exact != nullptr && entry.able; });
}

int32_t aerogel_native_best(int32_t numerics) { return best_path(numerics); }

void aerogel_native_choose_among(uint32_t paths) { choose_among(paths); }

int32_t aerogel_native_check(const Weight* weight) { return check_weight(*weight); }

int32_t aerogel_native_gemm(const Weight* weight, const Call* call) {
    Status status = check_weight(*weight);
    if (status == kDone) status = check_call(*weight, *call);
    if (status == kDone) status = check_beside(*call, weight->rows, weight->columns);
    if (status != kDone) return status;
    if (call->tokens == 0) return kDone;
    const int32_t path = call->path < 0 ? best_path(call->numerics) : call->path;
    if (path >= kPaths) return kNoSuchPath;
    const PathEntry& entry = path_entry(path);
    const Run run = call->numerics == kExact ? entry.exact : entry.int8;
    if (!run || !entry.able) return kNoSuchPath;
    Call bounded = *call;
    bounded.threads = bounded_threads(call->threads), bounded.path = path;
    const Beside beside = call->beside ? beside_of(bounded, weight->rows, weight->columns) : Beside{};
    if (call->beside) bounded.beside = &beside;
    return run(*weight, bounded);
}

int32_t aerogel_native_rows(const Weight* weight, const Rows* wanted) {
    const Status status = check_weight(*weight);
    if (status != kDone) return status;
    if (weight->table) return kBadTable;
    if (!known_type(wanted->type)) return kBadType;
    if (wanted->count < 0 || wanted->count > (int64_t{1} << 28)) return kBadShape;
    const int64_t size = type_size(wanted->type);
    if (wanted->to_bytes != wanted->count * weight->columns * size) return kTruncatedActivations;
    if (misaligned(wanted->to, size) || misaligned(wanted->ids, sizeof(int64_t))) return kMisaligned;
    return decode_rows(*weight, *wanted);
}

int32_t aerogel_native_row_sums(const RowSums* sums) {
    constexpr int64_t kMost = int64_t{1} << 28;
    if (sums->tokens < 0 || sums->tokens > kMost || sums->rows < 1 || sums->rows > kMost || sums->count < 0) return kBadShape;
    if (!known_type(sums->type)) return kBadType;
    for (int64_t i = 0; i < sums->count; ++i) {
        if (sums->index[i] < 0 || sums->index[i] >= sums->rows) return kNoSuchRow;
    }
    add_row_sums(*sums);
    return kDone;
}

int32_t aerogel_native_attend(const Attend* a) {
    const bool sizes = a->key_size > 0 && a->key_size <= kMostHead && a->value_size > 0 && a->value_size <= kMostHead;
    const bool heads = a->heads > 0 && a->queries % a->heads == 0 && a->queries / a->heads <= kMostShare;
    // A rotation exchanges the halves of a key, so its size must be even there.
    if (a->cosine && a->key_size % 2 != 0) return kBadShape;
    if (!sizes || !heads || a->batch < 1 || *a->slot_at < 0 || *a->slot_at >= a->slots || a->window < 0) return kBadShape;
    for (int64_t b = 0; b < a->batch; ++b) {
        if (a->start[b] < 0 || a->start[b] > *a->slot_at) return kBadShape;
    }
    if (!known_type(a->type) || (a->cosine == nullptr) != (a->sine == nullptr)) return kBadType;
    return path_entry(best_path(kExact)).step.attend(*a);
}

int32_t aerogel_native_prompt(const Prompt* p) {
    const bool sizes = p->key_size > 0 && p->key_size <= kMostHead && p->value_size > 0 && p->value_size <= kMostHead;
    const bool heads = p->heads > 0 && p->queries > 0 && p->queries % p->heads == 0;
    constexpr int64_t kMost = int64_t{1} << 24;
    if (!sizes || !heads || p->batch < 1 || p->batch > kMost || p->tokens < 1 || p->tokens > kMost) return kBadShape;
    if (p->wanted < 0 || p->wanted >= p->tokens || (p->cosine && p->key_size % 2 != 0)) return kBadShape;
    if (p->keys && p->slots < p->tokens) return kBadShape;
    for (int64_t b = 0; p->start && b < p->batch; ++b) {
        if (p->start[b] < 0 || p->start[b] >= p->tokens) return kBadShape;
    }
    if (!known_type(p->type) || (p->cosine == nullptr) != (p->sine == nullptr)) return kBadType;
    if ((p->keys == nullptr) != (p->values == nullptr)) return kBadType;
    Prompt bounded = *p;
    bounded.threads = p->threads < 1 ? 1 : p->threads > kMostThreads ? kMostThreads : p->threads;
    return path_entry(best_path(kExact)).step.prompt(bounded);
}

int32_t aerogel_native_norm(const Norm* n) {
    if (n->rows < 0 || n->size < 1 || (n->b == nullptr) != (n->sum == nullptr)) return kBadShape;
    if (!known_type(n->type)) return kBadType;
    return path_entry(best_path(kExact)).step.norm(*n);
}

int32_t aerogel_native_gate(const Gate* g) {
    if (g->rows < 0 || g->size < 1 || g->g_stride < g->size || g->u_stride < g->size) return kBadShape;
    if (!known_type(g->type)) return kBadType;
    return path_entry(best_path(kExact)).step.gate(*g);
}

int32_t aerogel_native_hadamard(const Hadamard* h) {
    constexpr int64_t kMost = int64_t{1} << 28;
    if (h->rows < 0 || h->rows > kMost || h->size < 1 || h->size > kMost) return kBadShape;
    if (h->block < 1 || (h->block & (h->block - 1)) != 0 || h->size % h->block != 0) return kBadShape;
    if (!known_type(h->type)) return kBadType;
    Hadamard bounded = *h;
    bounded.threads = bounded_threads(h->threads);
    return path_entry(best_path(kExact)).step.hadamard(bounded);
}

int32_t aerogel_native_beside(const Beside* b) {
    const Status status = check_added(*b);
    if (status != kDone || b->tokens == 0) return status;
    Beside bounded = *b;
    bounded.threads = bounded_threads(b->threads);
    return path_entry(best_path(kExact)).step.beside(bounded);
}

int32_t aerogel_native_program(const Operation* operations, int64_t count, int64_t* done) {
    for (*done = 0; *done < count; ++*done) {
        const Operation& each = operations[*done];
        int32_t status = kBadShape;
        switch (each.kind) {
            case kGemm:
                status = aerogel_native_gemm(static_cast<const Weight*>(each.arguments), static_cast<const Call*>(each.more));
                break;
            case kAttend: status = aerogel_native_attend(static_cast<const Attend*>(each.arguments)); break;
            case kLookup:
                status = aerogel_native_lookup(static_cast<const Lookup*>(each.arguments), static_cast<const Call*>(each.more));
                break;
            case kOwn:
                status = aerogel_native_own(static_cast<const OwnTables*>(each.arguments), static_cast<const Call*>(each.more));
                break;
            case kRows:
                status = aerogel_native_rows(static_cast<const Weight*>(each.arguments), static_cast<const Rows*>(each.more));
                break;
            case kNorm: status = aerogel_native_norm(static_cast<const Norm*>(each.arguments)); break;
            case kPrompt: status = aerogel_native_prompt(static_cast<const Prompt*>(each.arguments)); break;
            case kGate: status = aerogel_native_gate(static_cast<const Gate*>(each.arguments)); break;
            case kHadamard: status = aerogel_native_hadamard(static_cast<const Hadamard*>(each.arguments)); break;
            case kRowSums: status = aerogel_native_row_sums(static_cast<const RowSums*>(each.arguments)); break;
            default: break;
        }
        if (status != kDone) return status;
    }
    return kDone;
}

void aerogel_native_own_pool(int32_t own) { use_own_pool(own != 0); }

void aerogel_native_use_team(void* team) { use_team(reinterpret_cast<Team>(team)); }

double aerogel_native_read(const void* memory, int64_t bytes, int32_t threads) {
    constexpr int64_t kPiece = int64_t{128} << 10;
    const int64_t pieces = bytes / kPiece;
    const Step& step = path_entry(best_path(kExact)).step;
    const auto start = std::chrono::steady_clock::now();
    parallel(pieces, bounded_threads(threads), [&](int64_t piece, int) {
        kept_sum = step.read(static_cast<const char*>(memory) + piece * kPiece, kPiece);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(pieces * kPiece) / seconds.count();
}
