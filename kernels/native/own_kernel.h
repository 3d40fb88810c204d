// y = x W^T for weights whose rows have tables of their own: bytes are looked up, interleaved to bfloat16 and multiplied.
//
// A register holds the codes of four rows and sixteen columns, a row in each run of 128 bits, which is where a lookup finds its
// table. Interleaved, the low and high bytes are sixteen numbers of each row in two registers; each meets eight activations,
// repeated in every run. The four lanes of a run are parts of one row's sum and are added at its end.
//
// Instructions for 128 weights and M tokens: 10 for the codes, 4 M products. Sums are float32 over all columns.
#pragma once
#include "bytes.h"
#include "codes.h"
#include "numbers.h"
#include "own.h"
#include "pool.h"
#include "scratch.h"

namespace aerogel {
namespace UNIT {

constexpr int kOwnRows = 12;               // tokens of a block where there are many; two strips share their activations
constexpr int kOwnFewer = 8;               // up to two such blocks; loads of activations would hold up one strip with sixteen
constexpr int64_t kOwnPiece = 256 * 1024;  // bytes of codes that stay in the second-level cache while blocks of tokens pass

struct OwnPlan {
    const OwnTables* weight;
    const Call* call;
    int64_t strips, tiles, groups, blocks;  // groups: of columns that have tables of their own
    int block_rows;
    uint8_t* x;         // [block][step][row][16] bfloat16
    int32_t* group_at;  // [step]
};

INLINE NativeF own_dot(const NativeF& sum, const NativeU& w, const NativeU& x) {
    return reinterpret_cast<NativeF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w),
                                                      reinterpret_cast<__m512bh>(raw(x))));
}

// The low and high bytes of the numbers that a register of codes stands for, in tables of the four rows.
template <int BITS>
INLINE void own_bytes(const NativeU& code, const NativeU (&table)[2], NativeU& low, NativeU& high) {
    low = look_up(table[0], code);
    high = BITS == 4 ? look_up(table[1], code) : look_up(table[0], code | (NativeU{} + 0x08080808u));
}

// The same in tables that all rows share, one for the first eight of the sixteen columns and one for the last. Of up to 3 bits
// both have sixteen low bytes, of 4 bits both have all bytes in half a register.
template <int BITS>
INLINE void shared_bytes(const NativeU& code, const uint8_t* table, NativeU& low, NativeU& high) {
    constexpr uint32_t kLast = (BITS == 4 ? 16u : 8u) * 0x01010101u;
    const NativeU at = code | NativeU{0, 0, kLast, kLast, 0, 0, kLast, kLast, 0, 0, kLast, kLast, 0, 0, kLast, kLast};
    if constexpr (BITS == 4) {
        const __m512i all = raw(load<U16>(table).part[0]);
        low = words(_mm512_permutexvar_epi8(raw(at), all));
        high = words(_mm512_permutexvar_epi8(raw(at | (NativeU{} + 0x20202020u)), all));
    } else {
        low = look_up(every_run(table), at), high = look_up(every_run(table + 16), at);
    }
}

// Sums [strip][token][16] of strips first .. first + R - 1 and M tokens, a row in each run. Tables hold for F steps; 0: for one, and
// rows share them. Strips beyond the last repeat it.
template <int BITS, int F, int R, int M>
void own_strips(const OwnPlan& plan, int64_t first, int64_t block, float* to) {
    constexpr int kChains = R * M == 1 ? 4 : R * M <= 4 ? 2 : 1;  // sums that take turns, to hide the latency of the product
    constexpr bool kShared = F == 0;
    constexpr int64_t kBytes = kShared ? shared_table_bytes(BITS) : own_table_bytes(BITS);
    const uint8_t *codes[R], *tables[R], *x = plan.x + block * plan.tiles * 8 * M * 32;
    for (int r = 0; r < R; ++r) {
        const int64_t strip = first + r < plan.strips ? first + r : plan.strips - 1;
        codes[r] = static_cast<const uint8_t*>(plan.weight->codes) + strip * plan.tiles * tile_bytes<BITS>();
        const int64_t run = kShared ? strip * kLookupStrip / plan.weight->shared : strip;
        tables[r] = static_cast<const uint8_t*>(plan.weight->table) + run * plan.groups * kBytes;
    }
    NativeF sum[R][M][kChains] = {};
    NativeU table[R][2] = {};
    for (int64_t tile = 0; tile < plan.tiles; ++tile, x += 8 * M * 32) {
        const int64_t at = tile * tile_bytes<BITS>();
        if constexpr (M <= 4) repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(codes[0] + at + line * kVector + 1536); });
        unroll<8>([&](auto step) ALWAYS {
            NativeU low[R], high[R];
            repeat<R>([&](int r) ALWAYS {
                const NativeU code = quad<BITS, step>(codes[r] + at).part[0];
                if constexpr (kShared) {
                    shared_bytes<BITS>(code, tables[r] + plan.group_at[tile * 8 + step] * kBytes, low[r], high[r]);
                } else {
                    if constexpr (step % F == 0) {
                        const uint8_t* from = tables[r] + plan.group_at[tile * 8 + step] * kBytes;
                        table[r][0] = load<U16>(from).part[0];
                        if constexpr (BITS == 4) table[r][1] = load<U16>(from + 64).part[0];
                    }
                    own_bytes<BITS>(code, table[r], low[r], high[r]);
                }
            });
            unroll<2>([&](auto half) ALWAYS {
                constexpr int kChain = (2 * step + half) % kChains;
                NativeU w[R];
                repeat<R>([&](int r) ALWAYS { w[r] = in_turn<1, half>(low[r], high[r]); });
                repeat<M>([&](int m) ALWAYS {
                    const NativeU eight = every_run(x + (step * M + m) * 32 + half * 16);
                    repeat<R>([&](int r) ALWAYS { sum[r][m][kChain] = own_dot(sum[r][m][kChain], w[r], eight); });
                });
            });
        });
    }
    repeat<R>([&](int r) ALWAYS {
        repeat<M>([&](int m) ALWAYS {
            F16 total;
            total.part[0] = sum[r][m][0];
            repeat<kChains - 1>([&](int c) ALWAYS { total.part[0] += sum[r][m][c + 1]; });
            store(to + (r * M + m) * 16, total);
        });
    });
}

// Adds the lanes of each run of a strip's sums [token][16], rounds and stores.
inline void own_finish(const OwnPlan& plan, int64_t strip, int64_t block, const float* total) {
    const Call& call = *plan.call;
    const int64_t row0 = strip * kLookupStrip, left = plan.weight->rows - row0;
    const int count = static_cast<int>(left < kLookupStrip ? left : kLookupStrip);
    float bias[kLookupStrip] = {};
    for (int row = 0; call.bias && row < count; ++row) bias[row] = read_float(call.bias, row0 + row, call.bias_type);
    const __m512i ends = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    const int64_t first = block * plan.block_rows, end = first + plan.block_rows, stop = end < call.tokens ? end : call.tokens;
    uint16_t* to = static_cast<uint16_t*>(call.y) + first * plan.weight->rows + row0;
    for (int64_t token = first; token < stop; ++token, to += plan.weight->rows, total += 16) {
        __m512 v = _mm512_loadu_ps(total);
        v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
        v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
        const __m128 sums = _mm_add_ps(_mm512_castps512_ps128(_mm512_permutexvar_ps(ends, v)), _mm_loadu_ps(bias));
        uint16_t out[8];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), reinterpret_cast<__m128i>(_mm_cvtneps_pbh(sums)));
        if (count == kLookupStrip) {
            memcpy(to, out, 8);  // of a size known here: no call
        } else {
            memcpy(to, out, 2 * static_cast<size_t>(count));
        }
    }
}

// What is compiled for every width, period of tables and size of block; all that lies around it is compiled once.
using OwnLoop = void (*)(const OwnPlan&, int64_t first, int64_t block, float* totals);

// All strips and blocks by a loop that takes R strips at a time.
inline void own_all(const OwnPlan& plan, int64_t R, OwnLoop loop) {
    const int64_t strip_bytes = plan.tiles * kVector * plan.weight->bits, bytes = plan.strips * strip_bytes;
    const int threads = bytes < 48 * 1024 ? 1 : plan.call->threads;
    const int64_t even = plan.strips / (threads * 6), most = kOwnPiece / strip_bytes;
    const int64_t grain = threads == 1 && plan.blocks == 1 ? plan.strips : even < most || plan.blocks == 1 ? even : most;
    const int64_t size = grain > R ? grain / R * R : R;
    parallel(ceil_div(plan.strips, size), threads, [&](int64_t piece, int) {
        const int64_t stop = (piece + 1) * size < plan.strips ? (piece + 1) * size : plan.strips;
        alignas(64) float total[2 * kOwnRows * 16];
        for (int64_t block = 0; block < plan.blocks; ++block) {
            for (int64_t strip = piece * size; strip < stop; strip += R) {
                loop(plan, strip, block, total);
                for (int64_t r = 0; r < R && strip + r < stop; ++r) own_finish(plan, strip + r, block, total + r * plan.block_rows * 16);
            }
        }
    });
}

// One token among those of its block, zeros beyond the last column.
inline void own_place(const OwnPlan& plan, int64_t token) {
    const int64_t K = plan.weight->columns, rows = plan.block_rows, steps = plan.tiles * 8;
    uint8_t* to = plan.x + (token / rows * steps * rows + token % rows) * 32;
    const uint8_t* from = static_cast<const uint8_t*>(plan.call->x) + token * K * 2;
    for (int64_t step = 0; step < steps; ++step, to += rows * 32) {
        const int64_t left = K - step * kLookupStep;
        if (left >= kLookupStep) {
            memcpy(to, from + step * 32, 32);
        } else {
            memset(to, 0, 32);
            if (left > 0) memcpy(to, from + step * 32, static_cast<size_t>(left) * 2);
        }
    }
}

template <int BITS, int F>
void own_tokens(const OwnPlan& plan) {
    if (plan.block_rows == 1) return own_all(plan, 1, own_strips<BITS, F, 1, 1>);
    if (plan.block_rows == 4) return own_all(plan, 1, own_strips<BITS, F, 1, 4>);
    if (plan.block_rows == kOwnFewer) return own_all(plan, 2, own_strips<BITS, F, 2, kOwnFewer>);
    own_all(plan, 2, own_strips<BITS, F, 2, kOwnRows>);
}
template <int BITS>
void own_groups(const OwnPlan& plan) {
    if (plan.weight->shared) return own_tokens<BITS, 0>(plan);
    if (plan.groups == 1 || plan.weight->group % 128 == 0) return own_tokens<BITS, 8>(plan);
    if (plan.weight->group % 32 == 0) return own_tokens<BITS, 2>(plan);
    own_tokens<BITS, 1>(plan);
}

inline Status own_tables(const OwnTables& weight, const Call& call) {
    OwnPlan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.strips = ceil_div(weight.rows, kLookupStrip), plan.tiles = ceil_div(weight.columns, kLookupTile);
    plan.groups = own_table_groups(weight);
    plan.block_rows = call.tokens == 1 ? 1 : call.tokens <= 4 ? 4 : call.tokens <= 2 * kOwnFewer ? kOwnFewer : kOwnRows;
    plan.blocks = ceil_div(call.tokens, plan.block_rows);
    const size_t x_bytes = static_cast<size_t>(plan.blocks * plan.block_rows * plan.tiles * kLookupTile) * 2;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + static_cast<size_t>(plan.tiles * 8) * 4));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.group_at = reinterpret_cast<int32_t*>(memory + x_bytes);
    for (int64_t step = 0; step < plan.tiles * 8; ++step) {
        const int64_t found = step * kLookupStep / own_table_columns(weight);
        plan.group_at[step] = static_cast<int32_t>(found < plan.groups ? found : plan.groups - 1);
    }
    if (call.tokens % plan.block_rows) memset(memory, 0, x_bytes);
    for (int64_t token = 0; token < call.tokens; ++token) own_place(plan, token);
    switch (weight.bits) {
        case 1: own_groups<1>(plan); return kDone;
        case 2: own_groups<2>(plan); return kDone;
        case 3: own_groups<3>(plan); return kDone;
        case 4: own_groups<4>(plan); return kDone;
        default: return kBadWidth;
    }
}

}  // namespace UNIT
}  // namespace aerogel
