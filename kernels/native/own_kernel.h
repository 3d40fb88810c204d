// y = x W^T for weights whose rows have tables of their own: bytes are looked up, interleaved to bfloat16 and multiplied.
//
// A register holds the codes of four rows and sixteen columns, a row in each run of 128 bits, which is where a lookup finds its
// table. Interleaved, the low and high bytes are sixteen numbers of each row in two registers; each meets eight activations,
// repeated in every run. The four lanes of a run are parts of one row's sum and are added at its end.
//
// Up to four tokens are multiplied where codes are decoded; for more, the numbers of some strips are kept in the second-level cache.
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

constexpr int kOwnRows = 12;               // tokens of a block where there are many
constexpr int kOwnFewer = 8;               // up to two such blocks
constexpr int kOwnStrips = 2;              // that share a block's activations once they are decoded
constexpr int64_t kOwnTiles = 8;           // decoded at a time for two blocks: 16 KB of two strips
constexpr int64_t kOwnPanel = 256 * 1024;  // bytes of decoded strips that stay in the second-level cache while blocks pass
constexpr int64_t kOwnSmall = 48 * 1024;   // bytes of codes below which waking a second thread costs more than it saves

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

// What a strip keeps at hand while its steps are decoded one after the other. Tables hold for F steps; 0: for one, and rows share them.
template <int BITS, int F>
struct OwnStrip {
    static constexpr bool kShared = F == 0;
    static constexpr int64_t kBytes = kShared ? shared_table_bytes(BITS) : own_table_bytes(BITS);
    const OwnPlan& plan;
    const uint8_t *codes, *tables;
    NativeU table[2] = {};

    INLINE OwnStrip(const OwnPlan& of, int64_t strip) : plan(of) {
        const int64_t run = kShared ? strip * kLookupStrip / of.weight->shared : strip;
        codes = static_cast<const uint8_t*>(of.weight->codes) + strip * of.tiles * tile_bytes<BITS>();
        tables = static_cast<const uint8_t*>(of.weight->table) + run * of.groups * kBytes;
    }

    // The numbers of a step: the first and the last eight columns of the four rows.
    template <int STEP>
    INLINE void decode(int64_t tile, NativeU (&w)[2]) {
        const NativeU code = quad<BITS, STEP>(codes + tile * tile_bytes<BITS>()).part[0];
        NativeU low, high;
        if constexpr (kShared) {
            shared_bytes<BITS>(code, tables + plan.group_at[tile * 8 + STEP] * kBytes, low, high);
        } else {
            if constexpr (STEP % F == 0) {
                const uint8_t* from = tables + plan.group_at[tile * 8 + STEP] * kBytes;
                table[0] = load<U16>(from).part[0];
                if constexpr (BITS == 4) table[1] = load<U16>(from + 64).part[0];
            }
            own_bytes<BITS>(code, table, low, high);
        }
        w[0] = in_turn<1, 0>(low, high), w[1] = in_turn<1, 1>(low, high);
    }
};

// Sums of a strip and M tokens, a row in each run.
template <int BITS, int F, int M>
INLINE void own_strip(const OwnPlan& plan, int64_t strip, NativeF (&total)[M]) {
    constexpr int kChains = M == 1 ? 4 : 2;  // sums that take turns, to hide the latency of the product
    OwnStrip<BITS, F> from(plan, strip);
    const uint8_t* x = plan.x;
    NativeF sum[M][kChains] = {};
    for (int64_t tile = 0; tile < plan.tiles; ++tile, x += 8 * M * 32) {
        const uint8_t* ahead = from.codes + tile * tile_bytes<BITS>() + 1536;
        repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(ahead + line * kVector); });
        unroll<8>([&](auto step) ALWAYS {
            NativeU w[2];
            from.template decode<step>(tile, w);
            unroll<2>([&](auto half) ALWAYS {
                constexpr int kChain = (2 * step + half) % kChains;
                repeat<M>([&](int m) ALWAYS {
                    sum[m][kChain] = own_dot(sum[m][kChain], w[half], every_run(x + (step * M + m) * 32 + half * 16));
                });
            });
        });
    }
    repeat<M>([&](int m) ALWAYS {
        total[m] = sum[m][0];
        repeat<kChains - 1>([&](int c) ALWAYS { total[m] += sum[m][c + 1]; });
    });
}

// The numbers of a strip as they are multiplied, [step][half], a vector every `apart` bytes from `to` on; of some tiles.
template <int BITS, int F>
void own_decode(const OwnPlan& plan, int64_t strip, int64_t tile, int64_t stop, int64_t apart, uint8_t* to) {
    OwnStrip<BITS, F> from(plan, strip);
    for (; tile < stop; ++tile) {
        unroll<8>([&](auto step) ALWAYS {
            NativeU w[2];
            from.template decode<step>(tile, w);
            memcpy(to, &w[0], kVector), memcpy(to + apart, &w[1], kVector);
            to += 2 * apart;
        });
    }
}

// Adds the products of R decoded strips and a block of M tokens, of tiles `tile` .. `stop`, at whose numbers `numbers` begin.
template <int R, int M>
INLINE void own_block(const OwnPlan& plan, const uint8_t* numbers, int64_t block, int64_t tile, int64_t stop, NativeF (&sum)[R][M]) {
    const uint8_t* x = plan.x + (block * plan.tiles + tile) * 8 * M * 32;
    for (int64_t step = 8 * tile; step < 8 * stop; ++step, x += M * 32, numbers += 2 * R * kVector) {
        unroll<2>([&](auto half) ALWAYS {
            NativeU w[R];
            repeat<R>([&](int r) ALWAYS { w[r] = load<U16>(numbers + (half * R + r) * kVector).part[0]; });
            repeat<M>([&](int m) ALWAYS {
                const NativeU eight = every_run(x + m * 32 + half * 16);
                repeat<R>([&](int r) ALWAYS { sum[r][m] = own_dot(sum[r][m], w[r], eight); });
            });
        });
    }
}

// Adds the lanes of each run, four tokens together, rounds and stores.
template <int M>
inline void own_finish(const OwnPlan& plan, int64_t strip, int64_t block, const NativeF (&total)[M]) {
    const Call& call = *plan.call;
    const int64_t row0 = strip * kLookupStrip, left = plan.weight->rows - row0;
    const size_t bytes = 2 * static_cast<size_t>(left < kLookupStrip ? left : kLookupStrip);
    float bias[kLookupStrip] = {};
    for (int row = 0; call.bias && row < kLookupStrip && row < left; ++row) bias[row] = read_float(call.bias, row0 + row, call.bias_type);
    // From [row][token] to [token][row].
    const __m512i turned = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int m = 0; m < M && block * M + m < call.tokens; m += 4) {
        const auto of = [&](int i) ALWAYS { return m + i < M ? reinterpret_cast<__m512>(total[m + i]) : _mm512_setzero_ps(); };
        const __m512 a = of(0), b = of(1), c = of(2), d = of(3);
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m512 sums = _mm512_add_ps(_mm512_permutexvar_ps(turned, all), _mm512_broadcast_f32x4(_mm_loadu_ps(bias)));
        uint64_t out[4];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums)));
        for (int i = 0; i < 4 && m + i < M && block * M + m + i < call.tokens; ++i) {
            uint16_t* to = static_cast<uint16_t*>(call.y) + (block * M + m + i) * plan.weight->rows + row0;
            if (bytes == 8) {
                memcpy(to, &out[i], 8);  // of a size known here: no call
            } else {
                memcpy(to, &out[i], bytes);
            }
        }
    }
}

// Up to four tokens: codes are decoded where they are multiplied.
template <int BITS, int F, int M>
void own_few(const OwnPlan& plan) {
    const int threads = plan.strips * plan.tiles * tile_bytes<BITS>() < kOwnSmall ? 1 : plan.call->threads;
    const int64_t even = plan.strips / (threads * 6), size = threads == 1 ? plan.strips : even > 1 ? even : 1;
    parallel(ceil_div(plan.strips, size), threads, [&](int64_t piece, int) {
        const int64_t stop = (piece + 1) * size < plan.strips ? (piece + 1) * size : plan.strips;
        for (int64_t strip = piece * size; strip < stop; ++strip) {
            NativeF total[M];
            own_strip<BITS, F, M>(plan, strip, total);
            own_finish<M>(plan, strip, 0, total);
        }
    });
}

using OwnDecode = void (*)(const OwnPlan&, int64_t strip, int64_t tile, int64_t stop, int64_t apart, uint8_t* to);

// Two blocks of tokens: a few tiles at a time are decoded into the first-level cache, where both blocks meet them.
template <int M>
void own_two(const OwnPlan& plan, OwnDecode decode) {
    constexpr int R = kOwnStrips;
    const int threads = plan.strips * plan.tiles * 16 * kVector < 4 * kOwnSmall ? 1 : plan.call->threads;
    const int64_t even = plan.strips / (threads * 6), size = even > R ? even / R * R : R;
    parallel(ceil_div(plan.strips, size), threads, [&](int64_t piece, int) {
        alignas(kVector) uint8_t numbers[kOwnTiles * 16 * R * kVector];
        const int64_t stop = (piece + 1) * size < plan.strips ? (piece + 1) * size : plan.strips;
        for (int64_t strip = piece * size; strip < stop; strip += R) {
            NativeF total[2][R][M] = {};
            for (int64_t tile = 0; tile < plan.tiles; tile += kOwnTiles) {
                const int64_t end = tile + kOwnTiles < plan.tiles ? tile + kOwnTiles : plan.tiles;
                for (int r = 0; r < R; ++r) decode(plan, strip + r < stop ? strip + r : stop - 1, tile, end, R * kVector, numbers + r * kVector);
                for (int64_t block = 0; block < plan.blocks; ++block) own_block<R, M>(plan, numbers, block, tile, end, total[block]);
            }
            for (int64_t block = 0; block < plan.blocks; ++block) {
                for (int r = 0; r < R && strip + r < stop; ++r) own_finish<M>(plan, strip + r, block, total[block][r]);
            }
        }
    });
}

// More tokens: some strips are decoded into the second-level cache, where all blocks of tokens meet them.
template <int M>
Status own_many(const OwnPlan& plan, OwnDecode decode) {
    constexpr int R = kOwnStrips;
    const int64_t strip_bytes = plan.tiles * 16 * kVector;
    const int threads = plan.strips * strip_bytes < 4 * kOwnSmall ? 1 : plan.call->threads;
    const int64_t even = plan.strips / (threads * 6), most = kOwnPanel / strip_bytes, wanted = even < most ? even : most;
    const int64_t size = wanted > R ? wanted / R * R : R;
    const size_t bytes = static_cast<size_t>(size * strip_bytes);
    uint8_t* memory = static_cast<uint8_t*>(scratch(kWorkerScratch, bytes * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    parallel(ceil_div(plan.strips, size), threads, [&](int64_t piece, int worker) {
        uint8_t* numbers = memory + bytes * static_cast<size_t>(worker);
        const int64_t first = piece * size, stop = first + size < plan.strips ? first + size : plan.strips;
        for (int64_t i = 0; i < ceil_div(stop - first, R) * R; ++i) {
            const int64_t strip = first + i < stop ? first + i : stop - 1;
            decode(plan, strip, 0, plan.tiles, R * kVector, numbers + i / R * R * strip_bytes + i % R * kVector);
        }
        for (int64_t block = 0; block < plan.blocks; ++block) {
            for (int64_t strip = first; strip < stop; strip += R) {
                NativeF total[R][M] = {};
                own_block<R, M>(plan, numbers + (strip - first) * strip_bytes, block, 0, plan.tiles, total);
                for (int r = 0; r < R && strip + r < stop; ++r) own_finish<M>(plan, strip + r, block, total[r]);
            }
        }
    });
    return kDone;
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
Status own_tokens(const OwnPlan& plan) {
    if (plan.block_rows == 1) return own_few<BITS, F, 1>(plan), kDone;
    if (plan.block_rows == 4) return own_few<BITS, F, 4>(plan), kDone;
    if (plan.block_rows == kOwnFewer) return own_two<kOwnFewer>(plan, own_decode<BITS, F>), kDone;
    return own_many<kOwnRows>(plan, own_decode<BITS, F>);
}
template <int BITS>
Status own_groups(const OwnPlan& plan) {
    if (plan.weight->shared) return own_tokens<BITS, 0>(plan);
    if (plan.groups == 1 || plan.weight->group % 128 == 0) return own_tokens<BITS, 8>(plan);
    if (plan.weight->group % 32 == 0) return own_tokens<BITS, 2>(plan);
    return own_tokens<BITS, 1>(plan);
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
        case 1: return own_groups<1>(plan);
        case 2: return own_groups<2>(plan);
        case 3: return own_groups<3>(plan);
        case 4: return own_groups<4>(plan);
        default: return kBadWidth;
    }
}

}  // namespace UNIT
}  // namespace aerogel
