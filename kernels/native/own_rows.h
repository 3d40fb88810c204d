// A product with a weight whose rows have tables of their own, from activations to results: own_kernel.h and own_lanes.h.
#pragma once
#if defined(__AVX512BF16__)
#include "own_lanes.h"
#else
#include "own_kernel.h"
#endif

namespace aerogel {
namespace UNIT {

// Adds the four lanes of each row of a unit's sums, and the bias, rounds and stores.
template <int M>
inline void own_finish_runs(const OwnPlan& plan, int64_t first, int64_t token, const F16 (&run)[M][kOwnStrips]) {
#if defined(__AVX512BF16__)
    NativeF total[M];
    repeat<M>([&](int m) ALWAYS { total[m] = own_turned(run[m]); });
    own_finish<M>(plan, first, token, total);
#else
    const Call& call = *plan.call;
    const int64_t rows = plan.weight->rows, row0 = first * kLookupStrip, left = rows - row0;
    const int count = static_cast<int>(left < 16 ? left : 16);
    for (int m = 0; m < M && token + m < call.tokens; ++m) {
        float lanes[16 * kLookupStrip], out[16] = {};
        for (int r = 0; r < kOwnStrips; ++r) store(lanes + 16 * r, run[m][r]);
        for (int row = 0; row < count; ++row) {
            const float* lane = lanes + 4 * row;
            out[row] = (lane[0] + lane[1]) + (lane[2] + lane[3]);
            if (call.bias) out[row] += read_float(call.bias, row0 + row, call.bias_type);
        }
        store_floats(call.y, (token + m) * rows + row0, kBfloat16, out, count);
    }
#endif
}

// The results of M tokens from `token` on in the rows of strips first .. stop - 1.
template <int BITS, bool SHARED, int M>
void own_rows(const OwnPlan& plan, int64_t first, int64_t stop, int64_t token) {
    const uint8_t* x = plan.x_of(token);
    for (; first < stop; first += kOwnStrips) {
        if constexpr (M <= 4) {
            constexpr int R = M == 1 ? 1 : kOwnTogether;  // one token waits for memory, which likes one stream better than four
            F16 run[M][kOwnStrips];
            for (int r = 0; r < kOwnStrips; r += R) {
                F16 some[M][R];
                own_runs<BITS, SHARED, R, M>(plan, first + r, x, some);
                repeat<M>([&](int m) ALWAYS { repeat<R>([&](int i) ALWAYS { run[m][r + i] = some[m][i]; }); });
            }
            own_finish_runs<M>(plan, first, token, run);
        }
#if defined(__AVX512BF16__)
        if constexpr (M > 4) {
            NativeF total[M];
            own_lanes<BITS, SHARED, M>(plan, first, x, total);
            own_finish<M>(plan, first, token, total);
        }
#endif
    }
}

// Rows of the block that begins with a token: the smallest size that holds all tokens left.
inline int own_block_rows(int64_t left) {
    for (int rows : {1, 4, 8}) {
        if (left <= rows && rows <= kOwnTokens) return rows;
    }
    return kOwnTokens;
}

// One token among those of its block, zeros beyond the last column. As floats the even ones of eight come before the odd ones.
inline void own_place(const OwnPlan& plan, int64_t token) {
    const int64_t K = plan.weight->columns, steps = plan.tiles * 8, first = token / kOwnTokens * kOwnTokens;
    const int64_t rows = own_block_rows(plan.call->tokens - first);
    uint8_t* to = plan.x + (first * steps + token - first) * kOwnStep;
    const uint16_t* from = static_cast<const uint16_t*>(plan.call->x) + token * K;
    for (int64_t step = 0; step < steps; ++step, from += kLookupStep, to += rows * kOwnStep) {
        const int64_t left = K - step * kLookupStep;
        uint16_t values[kLookupStep] = {};
        if (left > 0) memcpy(values, from, static_cast<size_t>(left < kLookupStep ? left : kLookupStep) * 2);
#if defined(__AVX512BF16__)
        memcpy(to, values, sizeof values);
#else
        for (int k = 0; k < kLookupStep; ++k) {
            const float value = bits_to_float(uint32_t{values[k]} << 16);
            memcpy(to + k / 8 * kOwnEight + k % 2 * 16 + k % 8 / 2 * 4, &value, 4);
        }
#endif
    }
}

using OwnRows = void (*)(const OwnPlan&, int64_t first, int64_t stop, int64_t token);

// All rows and tokens. Codes are decoded anew for each block of tokens: the products leave time for it.
inline void own_all(const OwnPlan& plan, OwnRows (*rows_for)(int)) {
    const int64_t tokens = plan.call->tokens, blocks = ceil_div(tokens, kOwnTokens);
    const int64_t units = ceil_div(plan.strips, kOwnStrips), unit_bytes = kOwnStrips * plan.tiles * kVector * plan.weight->bits;
    const int threads = units * unit_bytes * blocks < kOwnSmall ? 1 : plan.call->threads;
    const int64_t even = threads == 1 ? units : units / (threads * 6), most = blocks == 1 ? even : kOwnPiece / unit_bytes;
    const int64_t wanted = even < most ? even : most, size = (wanted > 1 ? wanted : 1) * kOwnStrips;
    parallel(ceil_div(plan.strips, size), threads, [&](int64_t piece, int) {
        const int64_t first = piece * size, stop = first + size < plan.strips ? first + size : plan.strips;
        for (int64_t token = 0; token < tokens; token += kOwnTokens) rows_for(own_block_rows(tokens - token))(plan, first, stop, token);
    });
}

template <int BITS, bool SHARED>
OwnRows own_rows_for(int block_rows) {
    switch (block_rows) {
        case 1: return own_rows<BITS, SHARED, 1>;
#if defined(__AVX2__) || defined(__aarch64__)
        case 4: return own_rows<BITS, SHARED, 4>;
#endif
#if defined(__AVX512BF16__)
        case 8: return own_rows<BITS, SHARED, 8>;
        case 16: return own_rows<BITS, SHARED, 16>;
#endif
        default: return nullptr;
    }
}

#if !defined(__AVX512F__)
// Of sixteen columns of a strip: the even ones of the first eight, the odd ones, and the same of the last.
template <int BITS, bool SHARED, int STEP>
LOOKUP_STEP void own_numbers(const OwnStrips<BITS, SHARED, 1>& from, int64_t tile, float* to) {
    repeat<kParts>([&](int part) ALWAYS {
        NativeU w[2][1];
        from.template decode<STEP>(tile, part, w);
        repeat<2>([&](int half) ALWAYS {
            const OwnPairs pairs = own_pairs(w[half][0]);
            memcpy(to + 32 * half + part * kNative, &pairs.even, sizeof pairs.even);
            memcpy(to + 32 * half + 16 + part * kNative, &pairs.odd, sizeof pairs.odd);
        });
    });
}
template <int BITS, bool SHARED>
int64_t own_panel(const void* of, int64_t strip, int64_t tile, int64_t tiles, float* to) {
    const OwnStrips<BITS, SHARED, 1> from(*static_cast<const OwnPlan*>(of), strip);
    for (const int64_t stop = tile + tiles; tile < stop; ++tile, to += kFours * 16) {
        unroll<8>([&](auto step) ALWAYS { own_numbers<BITS, SHARED, step>(from, tile, to + step * 64); });
    }
    return tiles * kFours;
}

inline void own_finish_panel(const void* of, int64_t strip, int64_t first, int64_t tokens, const float* total) {
    const OwnPlan& plan = *static_cast<const OwnPlan*>(of);
    const Call& call = *plan.call;
    const int64_t rows = plan.weight->rows, row0 = strip * kLookupStrip, left = rows - row0;
    const int count = static_cast<int>(left < kLookupStrip ? left : kLookupStrip);
    for (int64_t token = first; token < first + tokens && token < call.tokens; ++token, total += 16) {
        float out[16] = {};  // as many as a store reads
        for (int row = 0; row < count; ++row) {
            const float* lane = total + 4 * row;
            out[row] = (lane[0] + lane[1]) + (lane[2] + lane[3]);
            if (call.bias) out[row] += read_float(call.bias, row0 + row, call.bias_type);
        }
        store_floats(call.y, token * rows + row0, kBfloat16, out, count);
    }
}
#endif

// Whether panels are decoded. With wide registers four strips meet four tokens together, and bfloat16 lets more tokens share a decoding.
inline bool own_many(const Call& call) { return kNative < 16 && call.tokens >= kPanelTokens; }

template <int BITS>
Status own_width(const OwnPlan& plan) {
#if !defined(__AVX512F__)
    if (own_many(*plan.call)) {
        const auto panel = plan.weight->shared ? own_panel<BITS, true> : own_panel<BITS, false>;
        float* x = reinterpret_cast<float*>(plan.x);
        return run_panels({plan.call, &plan, plan.weight->columns, plan.strips, plan.tiles, x, true, nullptr, plan.tiles * kFours, panel, own_finish_panel});
    }
#endif
    return own_all(plan, plan.weight->shared ? own_rows_for<BITS, true> : own_rows_for<BITS, false>), kDone;
}

inline Status own_tables(const OwnTables& weight, const Call& call) {
    OwnPlan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.strips = ceil_div(weight.rows, kLookupStrip), plan.tiles = ceil_div(weight.columns, kLookupTile);
    plan.groups = own_table_groups(weight);
    const int64_t last = (call.tokens - 1) / kOwnTokens * kOwnTokens, rows = last + own_block_rows(call.tokens - last);
    const bool many = own_many(call);
    const size_t few_bytes = static_cast<size_t>(rows * plan.tiles * kLookupTile) * kOwnElement;
    const size_t x_bytes = many ? run_panels_bytes(call.tokens, plan.tiles) : few_bytes;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + static_cast<size_t>(plan.tiles * 8) * 4));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.group_at = reinterpret_cast<int32_t*>(memory + x_bytes);
    for (int64_t step = 0; step < plan.tiles * 8; ++step) {
        const int64_t found = step * kLookupStep / own_table_columns(weight);
        plan.group_at[step] = static_cast<int32_t>(found < plan.groups ? found : plan.groups - 1);
    }
    if (rows > call.tokens && !many) memset(memory, 0, x_bytes);
    for (int64_t token = 0; token < call.tokens && !many; ++token) own_place(plan, token);
    switch (weight.bits) {
        case 1: return own_width<1>(plan);
        case 2: return own_width<2>(plan);
        case 3: return own_width<3>(plan);
        case 4: return own_width<4>(plan);
        default: return kBadWidth;
    }
}

}  // namespace UNIT
}  // namespace aerogel
