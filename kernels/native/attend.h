// Attention of one token of each sequence over all slots before it, in float32.
//
// The slots of a head are cut into runs, so that three heads keep two threads equally busy, and many. A run gives for each query that
// shares the head its largest score, the sum of e^(score - largest), and the sum of values times that; runs then join in their order
// (Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023). How long they are depends on the number of slots alone, so the number of
// threads changes no bit.
//
// Sixteen slots are worked on together, so that the sums of their scores are added up in a few instructions; keys and values are
// read one after the other as they lie. (Asking for them ahead of use costs a fifth: what a machine does by itself is enough.)
#pragma once
#include "step.h"

namespace aerogel {
namespace UNIT {

constexpr int64_t kSlots = 16, kColumnsAtOnce = 32;  // slots that are worked on together, and numbers of a row
constexpr int kSlotSums = kNative == 16 ? 16 : 4;    // of scores that stay in registers
constexpr int64_t kLeastRun = 64, kMostRuns = 8;     // slots of a run at least, and runs of a head at most
constexpr int64_t kManyHeads = 32;                   // that are worth a second thread to begin and to end with
constexpr int64_t kFewNumbers = 1 << 15;             // of all keys, which one thread is as fast with
constexpr float kNoScore = -3.4e38f;                 // of a slot that is not there

inline int64_t filled_up(int64_t count, int64_t to = kColumnsAtOnce) { return ceil_div(count, to) * to; }

// A run of slots of one head; it may have none.
struct SlotRun {
    int64_t sequence, head, first, stop;
};

// What a run gives for one query: values times e^(score - peak) in the order of `read_two`, then peak and sum; a run without slots
// has sum 0.
inline int64_t run_floats(const Attend& a) { return filled_up(a.value_size) + 16; }

// 32 numbers as floats: those at even and at odd places where they are bfloat16, each a shift or a mask away; else in their order.
template <int32_t TYPE>
INLINE void read_two(const char* from, F16 (&to)[2]) {
    if constexpr (TYPE == kBfloat16) {
        const U16 both = load<U16>(from);
        unroll<kParts>([&](auto p) ALWAYS {
            to[0].part[p] = reinterpret_cast<NativeF>(both.part[p] << 16);
            to[1].part[p] = reinterpret_cast<NativeF>(both.part[p] & 0xffff0000u);
        });
    } else {
        to[0] = load_floats(from, 0, TYPE), to[1] = load_floats(from, 16, TYPE);
    }
}

// Slots' keys or values where they lie, or a copy filled up with zeros where they are fewer than sixteen or no whole 32 numbers.
struct SlotRows {
    const char* at;
    int64_t step;  // bytes
};
inline SlotRows rows_of(const void* from, int64_t first, int64_t count, int64_t size, int64_t bytes, char* copy) {
    const char* at = static_cast<const char*>(from) + first * size * bytes;
    if (count == kSlots && size % kColumnsAtOnce == 0) return {at, size * bytes};
    const int64_t step = filled_up(size) * bytes;
    memset(copy, 0, static_cast<size_t>(kSlots * step));
    for (int64_t s = 0; s < count; ++s) memcpy(copy + s * step, at + s * size * bytes, static_cast<size_t>(size * bytes));
    return {copy, step};
}

// The scores of sixteen slots for a query of `wide` numbers.
template <int32_t TYPE>
INLINE void scores_of(const char* query, const SlotRows& keys, int64_t wide, float scale, float* scores) {
    for (int64_t s = 0; s < kSlots; s += kSlotSums) {
        F16 sum[kSlotSums];
        repeat<kSlotSums>([&](int i) ALWAYS { sum[i] = zero_f(); });
        for (int64_t byte = 0; byte < wide * size_of(TYPE); byte += kColumnsAtOnce * size_of(TYPE)) {
            F16 part[2];
            read_two<TYPE>(query + byte, part);
            repeat<kSlotSums>([&](int i) ALWAYS {
                F16 key[2];
                read_two<TYPE>(keys.at + (s + i) * keys.step + byte, key);
                sum[i] = multiply_add(part[1], key[1], multiply_add(part[0], key[0], sum[i]));
            });
        }
        float totals[kSlotSums];
        totals_of(sum, totals);
        for (int i = 0; i < kSlotSums; ++i) scores[s + i] = totals[i] * scale;
    }
}

// to [32 * TWOS] += the values of sixteen slots times their weights.
template <int32_t TYPE, int TWOS>
INLINE void add_weighted(const float* weights, const char* values, int64_t step, float* to) {
    F16 sum[2 * TWOS];
    unroll<2 * TWOS>([&](auto v) ALWAYS { sum[v] = load<F16>(to + 16 * v); });
    for (int64_t s = 0; s < kSlots; ++s) {
        const F16 weight = spread<F16>(weights[s]);
        unroll<TWOS>([&](auto t) ALWAYS {
            F16 value[2];
            read_two<TYPE>(values + s * step + t * kColumnsAtOnce * size_of(TYPE), value);
            unroll<2>([&](auto i) ALWAYS { sum[2 * t + i] = multiply_add(weight, value[i], sum[2 * t + i]); });
        });
    }
    unroll<2 * TWOS>([&](auto v) ALWAYS { store(to + 16 * v, sum[v]); });
}

template <int32_t TYPE>
INLINE void add_values(const float* weights, const SlotRows& values, int64_t wide, float* to) {
    int64_t e = 0;
    for (; e + 2 * kColumnsAtOnce <= wide; e += 2 * kColumnsAtOnce) {
        add_weighted<TYPE, 2>(weights, values.at + e * size_of(TYPE), values.step, to + e);
    }
    if (e < wide) add_weighted<TYPE, 1>(weights, values.at + e * size_of(TYPE), values.step, to + e);
}

// Before the runs: the queries of a head [G][filled_up(D)] in their type, zeros behind each, and the token's own key and value in
// their slot. Queries and key are turned to the angles of the token.
inline void place_token(const Attend& a, int64_t sequence, int64_t head, char* queries) {
    const int64_t D = a.key_size, G = a.queries / a.heads, step = filled_up(D) * size_of(a.type);
    const int64_t slot = (sequence * a.heads + head) * a.slots + *a.slot_at, angle = a.angles_per_sequence ? sequence * D : 0;
    float cosine[kMostHead], sine[kMostHead], row[kMostHead];
    if (a.cosine) to_floats(a.cosine, angle, a.type, cosine, D), to_floats(a.sine, angle, a.type, sine, D);
    memset(queries, 0, static_cast<size_t>(G * step));
    for (int64_t g = 0; g < G; ++g) {
        to_floats(a.q, sequence * a.q_step + (head * G + g) * D, a.type, row, D);
        if (a.cosine) rotate(row, cosine, sine, D, a.type);
        from_floats(queries + g * step, 0, a.type, row, D);
    }
    to_floats(a.k, sequence * a.k_step + head * D, a.type, row, D);
    if (a.cosine) rotate(row, cosine, sine, D, a.type);
    from_floats(a.keys, slot * D, a.type, row, D);
    to_floats(a.v, sequence * a.v_step + head * a.value_size, a.type, row, a.value_size);
    from_floats(a.values, slot * a.value_size, a.type, row, a.value_size);
}

// Sixteen scores, of which the first `count` are there, become weights e^(score - peak); what the query has so far,
// [wide] sums, peak and sum, is brought to the same peak.
INLINE void soften(float* scores, int64_t count, int64_t wide, float* to) {
    for (int64_t s = count; s < kSlots; ++s) scores[s] = kNoScore;
    const F16 score = load<F16>(scores);
    const float peak = to[wide], now = largest_of(score);
    if (now > peak) {
        const float kept = exponential(peak - now);
        for (int64_t e = 0; e < wide; e += 16) store(to + e, load<F16>(to + e) * spread<F16>(kept));
        to[wide] = now, to[wide + 1] *= kept;
    }
    const F16 weight = exponential(score - spread<F16>(to[wide]));
    store(scores, weight);
    to[wide + 1] += total_of(weight);
}

// One run for all queries of its head: `to` [G][run_floats].
template <int32_t TYPE>
void attend_run(const Attend& a, const SlotRun& run, const char* queries, float* to) {
    constexpr int64_t kBytesEach = size_of(TYPE);
    const int64_t D = filled_up(a.key_size), E = filled_up(a.value_size), G = a.queries / a.heads, each = run_floats(a);
    const int64_t base = (run.sequence * a.heads + run.head) * a.slots;
    alignas(64) char copy[kSlots * kMostHead * kBytesEach];
    float scores[kMostShare * kSlots];
    for (int64_t g = 0; g < G; ++g) {
        memset(to + g * each, 0, sizeof(float) * static_cast<size_t>(each));
        to[g * each + E] = kNoScore;
    }
    for (int64_t slot = run.first; slot < run.stop; slot += kSlots) {
        const int64_t now = run.stop - slot < kSlots ? run.stop - slot : kSlots;
        const SlotRows keys = rows_of(a.keys, base + slot, now, a.key_size, kBytesEach, copy);
        for (int64_t g = 0; g < G; ++g) scores_of<TYPE>(queries + g * D * kBytesEach, keys, D, a.scale, scores + g * kSlots);
        for (int64_t g = 0; g < G; ++g) soften(scores + g * kSlots, now, E, to + g * each);
        const SlotRows values = rows_of(a.values, base + slot, now, a.value_size, kBytesEach, copy);
        for (int64_t g = 0; g < G; ++g) add_values<TYPE>(scores + g * kSlots, values, E, to + g * each);
    }
}

// The runs of one query [runs][step] into its result.
inline void join_runs(const Attend& a, const float* runs, int64_t count, int64_t step, int64_t query) {
    const int64_t E = filled_up(a.value_size);
    float sum[kMostHead] = {}, out[kMostHead], peak = kNoScore, total = 0.0f;
    for (int64_t r = 0; r < count; ++r) peak = runs[r * step + E] > peak ? runs[r * step + E] : peak;
    for (int64_t r = 0; r < count; ++r) {
        const float* run = runs + r * step;
        if (run[E + 1] == 0.0f) continue;
        const float share = exponential(run[E] - peak);
        const F16 shares = spread<F16>(share);
        for (int64_t e = 0; e < E; e += 16) store(sum + e, multiply_add(shares, load<F16>(run + e), load<F16>(sum + e)));
        total += share * run[E + 1];
    }
    for (int64_t e = 0; e < E; ++e) {
        const int64_t from = a.type == kBfloat16 ? e / kColumnsAtOnce * kColumnsAtOnce + e % 2 * 16 + e % kColumnsAtOnce / 2 : e;
        out[e] = sum[from] / total;
    }
    from_floats(a.out, query * a.value_size, a.type, out, a.value_size);
}

inline Status attend(const Attend& a) {
    const int64_t G = a.queries / a.heads, end = *a.slot_at + 1, pairs = a.batch * a.heads;
    const int64_t in_run = filled_up(ceil_div(end, kMostRuns) > kLeastRun ? ceil_div(end, kMostRuns) : kLeastRun, kSlots);
    const int64_t runs = ceil_div(end, in_run), each = run_floats(a);
    const auto attend_type = a.type == kFloat32 ? attend_run<kFloat32> : a.type == kFloat16 ? attend_run<kFloat16> : attend_run<kBfloat16>;
    const int64_t query_bytes = (G * filled_up(a.key_size) * size_of(a.type) + 63) / 64 * 64;
    char* queries = static_cast<char*>(
        scratch(kStepScratch, static_cast<size_t>(pairs * (query_bytes + runs * G * each * static_cast<int64_t>(sizeof(float))))));
    if (!queries) return kOutOfMemory;
    float* results = reinterpret_cast<float*>(queries + pairs * query_bytes);
    parallel(pairs, pairs < kManyHeads ? 1 : a.threads, [&](int64_t pair, int) {
        place_token(a, pair / a.heads, pair % a.heads, queries + pair * query_bytes);
    });
    // A thread takes runs that lie behind each other: what a machine reads ahead at the end of one is not lost.
    const int64_t all = pairs * runs, threads = end * a.key_size * pairs < kFewNumbers ? 1 : a.threads, grain = ceil_div(all, 2 * threads);
    parallel(ceil_div(all, grain), static_cast<int>(threads), [&](int64_t piece, int) {
        for (int64_t number = piece * grain; number < (piece + 1) * grain && number < all; ++number) {
            const int64_t pair = number / runs, sequence = pair / a.heads, start = a.start[sequence];
            const int64_t begin = a.window && end - a.window > start ? end - a.window : start, first = begin + number % runs * in_run;
            const SlotRun run = {sequence, pair % a.heads, first, first + in_run < end ? first + in_run : end};
            attend_type(a, run, queries + pair * query_bytes, results + number * G * each);
        }
    });
    parallel(pairs, pairs < kManyHeads ? 1 : a.threads, [&](int64_t pair, int) {
        for (int64_t g = 0; g < G; ++g) join_runs(a, results + (pair * runs * G + g) * each, runs, G * each, pair * G + g);
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
