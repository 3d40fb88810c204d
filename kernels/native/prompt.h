// Causal attention of a whole prompt, in float32: every token looks at itself and at all before it.
//
// A block of queries is multiplied with the transposed keys, its scores are exponentiated as they lie, and multiplied with the
// values. Both products are of the same kind, a few rows by two vectors of columns, whose sums stay in registers. Scores of
// a row are kept in full, so nothing is rescaled: a block of rows by all keys stays in the second-level cache up to some ten
// thousand tokens. Keys and values become floats once for all queries that share them; where angles are given they are rotated
// on the way, and put into the slots that the steps behind the prompt will read.
#pragma once
#include "step.h"

namespace aerogel {
namespace UNIT {

constexpr int kQueryRows = kNative == 16 ? 12 : kNative == 8 ? 6 : 4;
constexpr int kColumnVectors = kNative == 16 ? 2 : 1;
constexpr int64_t kColumns = 16 * kColumnVectors;

inline int64_t padded(int64_t count) { return ceil_div(count, kColumns) * kColumns; }

// c [kQueryRows, columns] = a [kQueryRows, count] b [count, columns]; columns are a multiple of kColumns.
inline void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, int64_t columns, float* c,
                    int64_t c_stride) {
    for (int64_t column = 0; column < columns; column += kColumns) {
        F16 sum[kQueryRows][kColumnVectors];
        repeat<kQueryRows>([&](int m) ALWAYS { repeat<kColumnVectors>([&](int v) ALWAYS { sum[m][v] = zero_f(); }); });
        for (int64_t k = 0; k < count; ++k) {
            F16 row[kColumnVectors];
            repeat<kColumnVectors>([&](int v) ALWAYS { row[v] = load<F16>(b + k * b_stride + column + 16 * v); });
            repeat<kQueryRows>([&](int m) ALWAYS {
                const F16 left = spread<F16>(a[m * a_stride + k]);
                repeat<kColumnVectors>([&](int v) ALWAYS { sum[m][v] = multiply_add(left, row[v], sum[m][v]); });
            });
        }
        repeat<kQueryRows>([&](int m) ALWAYS {
            repeat<kColumnVectors>([&](int v) ALWAYS { store(c + m * c_stride + column + 16 * v, sum[m][v]); });
        });
    }
}

// e^(score - largest) of scores begin .. seen - 1, zeros for all others up to `count`; returns their sum, 1 where there are none.
inline float exponentials(float* score, int64_t begin, int64_t seen, int64_t count) {
    float lanes[16];
    if (seen <= begin) {
        memset(score, 0, sizeof(float) * static_cast<size_t>(count));
        return 1.0f;
    }
    // Whole vectors are worked on: what is not seen in the first and the last of them is so small that nothing is left of it.
    const int64_t first = begin / 16 * 16, stop = ceil_div(seen, 16) * 16;
    for (int64_t s = first; s < begin; ++s) score[s] = -3.4e38f;
    for (int64_t s = seen; s < stop; ++s) score[s] = -3.4e38f;
    F16 peak = spread<F16>(-3.4e38f), sum = zero_f();
    for (int64_t s = first; s < stop; s += 16) peak = larger(load<F16>(score + s), peak);
    store(lanes, peak);
    for (int lane = 1; lane < 16; ++lane) lanes[0] = lanes[lane] > lanes[0] ? lanes[lane] : lanes[0];
    peak = spread<F16>(lanes[0]);
    for (int64_t s = first; s < stop; s += 16) {
        const F16 value = exponential(load<F16>(score + s) - peak);
        store(score + s, value);
        sum = sum + value;
    }
    memset(score, 0, sizeof(float) * static_cast<size_t>(first));
    memset(score + stop, 0, sizeof(float) * static_cast<size_t>(count - stop));
    store(lanes, sum);
    for (int lane = 1; lane < 16; ++lane) lanes[0] += lanes[lane];
    return lanes[0];
}

// Turns a query or key to the angles of its token, where there are any.
inline void turn(const Prompt& p, int64_t sequence, int64_t token, float* x) {
    if (!p.cosine) return;
    float cosine[kMostHead], sine[kMostHead];
    const int64_t at = ((p.angles_per_sequence ? sequence * p.tokens : 0) + token) * p.key_size;
    to_floats(p.cosine, at, p.type, cosine, p.key_size);
    to_floats(p.sine, at, p.type, sine, p.key_size);
    rotate(x, cosine, sine, p.key_size, p.type);
}

// Keys [D, tokens] and values [tokens, E] of one head as floats, columns filled up with zeros.
inline void spread_head(const Prompt& p, int64_t sequence, int64_t head, float* keys, float* values) {
    const int64_t wide = padded(p.tokens), E = padded(p.value_size);
    float row[kMostHead];
    memset(keys, 0, sizeof(float) * static_cast<size_t>(p.key_size * wide));
    memset(values, 0, sizeof(float) * static_cast<size_t>(wide * E));
    for (int64_t t = 0; t < p.tokens; ++t) {
        to_floats(p.k, sequence * p.k_strides[0] + head * p.k_strides[1] + t * p.k_strides[2], p.type, row, p.key_size);
        turn(p, sequence, t, row);
        for (int64_t d = 0; d < p.key_size; ++d) keys[d * wide + t] = row[d];
        to_floats(p.v, sequence * p.v_strides[0] + head * p.v_strides[1] + t * p.v_strides[2], p.type, values + t * E, p.value_size);
        if (!p.keys) continue;
        const int64_t slot = (sequence * p.heads + head) * p.slots + t;
        from_floats(p.keys, slot * p.key_size, p.type, row, p.key_size);
        from_floats(p.values, slot * p.value_size, p.type, values + t * E, p.value_size);
    }
}

// Queries first .. first + kQueryRows - 1 of one head; `memory` holds queries, scores and results.
inline void attend_rows(const Prompt& p, int64_t sequence, int64_t head, int64_t first, const float* keys, const float* values,
                        float* memory) {
    const int64_t wide = padded(p.tokens), E = padded(p.value_size), D = p.key_size;
    const int64_t last = first + kQueryRows < p.tokens ? first + kQueryRows : p.tokens, rows = last - first;
    float *queries = memory, *scores = queries + kQueryRows * D, *out = scores + kQueryRows * wide;
    memset(queries, 0, sizeof(float) * static_cast<size_t>(kQueryRows * D));
    for (int64_t m = 0; m < rows; ++m) {
        float* query = queries + m * D;
        to_floats(p.q, sequence * p.q_strides[0] + head * p.q_strides[1] + (first + m) * p.q_strides[2], p.type, query, D);
        turn(p, sequence, first + m, query);
        for (int64_t d = 0; d < D; ++d) query[d] *= p.scale;
    }
    product(queries, D, keys, wide, D, padded(last), scores, wide);
    const int64_t begin = p.start ? p.start[sequence] : 0;
    float total[kQueryRows];
    for (int64_t m = 0; m < kQueryRows; ++m) {
        total[m] = exponentials(scores + m * wide, begin, m < rows ? first + m + 1 : last, padded(last));
    }
    product(scores, wide, values, E, last, E, out, E);
    for (int64_t m = 0; m < rows; ++m) {
        float* row = out + m * E;
        for (int64_t e = 0; e < p.value_size; ++e) row[e] /= total[m];
        const int64_t at = sequence * (p.tokens - p.wanted) + first + m - p.wanted;
        from_floats(p.out, (at * p.queries + head) * p.value_size, p.type, row, p.value_size);
    }
}

inline Status attend_prompt(const Prompt& p) {
    const int64_t wide = padded(p.tokens), E = padded(p.value_size), D = p.key_size, pairs = p.batch * p.heads;
    const size_t key_floats = static_cast<size_t>(D * wide), head_floats = key_floats + static_cast<size_t>(wide * E);
    const size_t row_floats = static_cast<size_t>(kQueryRows * (D + wide + E) + 15) / 16 * 16;
    const size_t floats = head_floats * static_cast<size_t>(pairs) + row_floats * static_cast<size_t>(p.threads);
    float* memory = static_cast<float*>(scratch(kStepScratch, sizeof(float) * floats));
    if (!memory) return kOutOfMemory;
    const auto head_at = [&](int64_t pair) { return memory + head_floats * static_cast<size_t>(pair); };
    parallel(pairs, p.threads, [&](int64_t pair, int) {
        spread_head(p, pair / p.heads, pair % p.heads, head_at(pair), head_at(pair) + key_floats);
    });
    const int64_t blocks = ceil_div(p.tokens - p.wanted, kQueryRows), each = p.batch * p.queries, shared = p.queries / p.heads;
    float* rest = head_at(pairs);
    parallel(blocks * each, p.threads, [&](int64_t piece, int worker) {
        const int64_t block = piece / each, sequence = piece % each / p.queries, head = piece % p.queries;
        const float* keys = head_at(sequence * p.heads + head / shared);
        float* mine = rest + row_floats * static_cast<size_t>(worker);
        attend_rows(p, sequence, head, p.wanted + block * kQueryRows, keys, keys + key_floats, mine);
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
