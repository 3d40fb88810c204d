// y = x W^T for weights whose rows have tables of their own: bytes are looked up, interleaved to bfloat16 and multiplied.
//
// A register holds the codes of four rows and sixteen columns, a row in each run of 128 bits, which is where a lookup finds its
// table. Interleaved, the low and high bytes are sixteen numbers of each row in two registers. Up to four tokens meet them there:
// eight activations, repeated in every run, whose four parts of a row's sum are added at its end. More tokens meet the registers of
// four strips turned such that a lane is a row: then an activation is the same in all lanes, which a product reads without an
// instruction of its own. Repeating sixteen bytes takes one on some machines, in the unit that also looks up and interleaves.
//
// Instructions for 128 weights and M tokens: 10 for the codes, 4 M products, 2 M repetitions of activations where four strips share
// them; 18 and 4 M where numbers are turned. Sums are float32 over all columns.
#pragma once
#include "bytes.h"
#include "codes.h"
#include "numbers.h"
#include "own.h"
#include "pool.h"
#include "scratch.h"

namespace aerogel {
namespace UNIT {

constexpr int kOwnStrips = 4;              // that are multiplied together: sixteen rows, a unit
constexpr int kOwnTokens = 16;             // of a block: their sums stay in registers beside the decoding
constexpr int64_t kOwnPiece = 256 * 1024;  // bytes of codes that stay in the second-level cache while blocks of tokens pass
constexpr int64_t kOwnSmall = 48 * 1024;   // bytes of codes below which waking a second thread costs more than it saves

struct OwnPlan {
    const OwnTables* weight;
    const Call* call;
    int64_t strips, tiles, groups;  // groups: of columns that have tables of their own
    uint8_t* x;                     // [block][step][row][16] bfloat16
    int32_t* group_at;              // [step]

    const uint8_t* x_of(int64_t token) const { return x + token * tiles * kLookupTile * 2; }
};

INLINE NativeF own_dot(const NativeF& sum, const NativeU& w, const NativeU& x) {
    return reinterpret_cast<NativeF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w),
                                                      reinterpret_cast<__m512bh>(raw(x))));
}
// The same with two numbers for all lanes. In one instruction, which the compiler does not make of a product and a broadcast.
INLINE void own_add(NativeF& sum, const NativeU& w, const uint8_t* x) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const uint8_t(*)[4]>(x)));
}

// The low and high bytes of the numbers that a register of codes stands for, in tables of the four rows.
template <int BITS>
INLINE void own_bytes(const NativeU& code, const uint8_t* table, NativeU& low, NativeU& high) {
    const NativeU first = load<U16>(table).part[0];
    low = look_up(first, code);
    high = BITS == 4 ? look_up(load<U16>(table + 64).part[0], code) : look_up(first, code | (NativeU{} + 0x08080808u));
}

// The same in tables that all rows share, one for the first eight of the sixteen columns and one for the last. All their bytes are in
// one register, or in half of it up to 3 bits.
template <int BITS>
INLINE void shared_bytes(const NativeU& code, const uint8_t* table, NativeU& low, NativeU& high) {
    constexpr uint32_t kLast = (BITS == 4 ? 16u : 8u) * 0x01010101u;
    const NativeU at = code | NativeU{0, 0, kLast, kLast, 0, 0, kLast, kLast, 0, 0, kLast, kLast, 0, 0, kLast, kLast};
    __m512i all;
    if constexpr (BITS == 4) all = raw(load<U16>(table).part[0]);
    if constexpr (BITS <= 3) all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    low = words(_mm512_permutexvar_epi8(raw(at), all));
    high = words(_mm512_permutexvar_epi8(raw(at | (NativeU{} + 2 * kLast)), all));
}

// Four registers whose runs are rows of four pairs of columns, turned into four whose lanes are the rows of one pair: lane
// 4 * i + r is row i of register r.
INLINE void own_turn(const NativeU (&row)[4], NativeU* pair) {
    const __m512i ab = _mm512_unpacklo_epi32(raw(row[0]), raw(row[1])), cd = _mm512_unpacklo_epi32(raw(row[2]), raw(row[3]));
    const __m512i AB = _mm512_unpackhi_epi32(raw(row[0]), raw(row[1])), CD = _mm512_unpackhi_epi32(raw(row[2]), raw(row[3]));
    pair[0] = words(_mm512_unpacklo_epi64(ab, cd)), pair[1] = words(_mm512_unpackhi_epi64(ab, cd));
    pair[2] = words(_mm512_unpacklo_epi64(AB, CD)), pair[3] = words(_mm512_unpackhi_epi64(AB, CD));
}

// Strips whose steps are decoded together; those beyond the last repeat it.
template <int BITS, bool SHARED, int R>
struct OwnStrips {
    static constexpr int64_t kTableBytes = SHARED ? shared_table_bytes(BITS) : own_table_bytes(BITS);
    const OwnPlan& plan;
    const uint8_t *codes[R], *tables[R];

    INLINE OwnStrips(const OwnPlan& of, int64_t first) : plan(of) {
        for (int r = 0; r < R; ++r) {
            const int64_t strip = first + r < of.strips ? first + r : of.strips - 1;
            const int64_t run = SHARED ? strip * kLookupStrip / of.weight->shared : strip;
            codes[r] = static_cast<const uint8_t*>(of.weight->codes) + strip * of.tiles * tile_bytes<BITS>();
            tables[r] = static_cast<const uint8_t*>(of.weight->table) + run * of.groups * kTableBytes;
        }
    }

    // The numbers of a step of each strip: the first and the last eight columns, a row in each run.
    template <int STEP>
    INLINE void decode(int64_t tile, NativeU (&w)[2][R]) const {
        const int64_t at = plan.group_at[tile * 8 + STEP] * kTableBytes;
        repeat<R>([&](int r) ALWAYS {
            const NativeU code = quad<BITS, STEP>(codes[r] + tile * tile_bytes<BITS>()).part[0];
            NativeU low, high;
            if constexpr (SHARED) shared_bytes<BITS>(code, tables[r] + at, low, high);
            if constexpr (!SHARED) own_bytes<BITS>(code, tables[r] + at, low, high);
            w[0][r] = in_turn<1, 0>(low, high), w[1][r] = in_turn<1, 1>(low, high);
        });
    }
};

// How far ahead of use codes are asked for, where their bytes and not the arithmetic are the bound.
constexpr int64_t kOwnAhead = 1536;

// Sums of R strips and M tokens, for so few that turning numbers would cost more than their products: rows stay in their runs.
template <int BITS, bool SHARED, int R, int M>
INLINE void own_runs(const OwnPlan& plan, int64_t first, const uint8_t* x, NativeF (&total)[M][R]) {
    constexpr int kChains = R * M < 8 ? 4 : 1;  // sums that take turns, to hide the latency of the product
    const OwnStrips<BITS, SHARED, R> from(plan, first);
    const int64_t strip_bytes = plan.tiles * tile_bytes<BITS>();
    NativeF sum[M][R][kChains] = {};
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        // Behind the end of a strip lies one of these; what is read next lies behind the last of them.
        const int64_t ahead = tile * tile_bytes<BITS>() + kOwnAhead, next = ahead < strip_bytes ? ahead : ahead + (R - 1) * strip_bytes;
        repeat<R>([&](int r) ALWAYS { repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(from.codes[r] + next + line * kVector); }); });
        unroll<8>([&](auto step) ALWAYS {
            NativeU w[2][R];
            from.template decode<step>(tile, w);
            unroll<2>([&](auto half) ALWAYS {
                repeat<M>([&](int m) ALWAYS {
                    const NativeU eight = every_run(x + m * 32 + half * 16);
                    repeat<R>([&](int r) ALWAYS {
                        NativeF& into = sum[m][r][(2 * step + half) % kChains];
                        into = own_dot(into, w[half][r], eight);
                    });
                });
            });
            x += M * 32;
        });
    }
    repeat<M>([&](int m) ALWAYS {
        repeat<R>([&](int r) ALWAYS {
            total[m][r] = sum[m][r][0];
            repeat<kChains - 1>([&](int c) ALWAYS { total[m][r] += sum[m][r][c + 1]; });
        });
    });
}

// Sums of four strips and M tokens, a row in each lane.
template <int BITS, bool SHARED, int M>
INLINE void own_lanes(const OwnPlan& plan, int64_t first, const uint8_t* x, NativeF (&total)[M]) {
    const OwnStrips<BITS, SHARED, kOwnStrips> from(plan, first);
    repeat<M>([&](int m) ALWAYS { total[m] = NativeF{}; });
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        unroll<8>([&](auto step) ALWAYS {
            NativeU w[2][kOwnStrips];
            from.template decode<step>(tile, w);
            unroll<2>([&](auto half) ALWAYS {
                NativeU pair[4];
                own_turn(w[half], pair);
                repeat<4>([&](int p) ALWAYS {
                    repeat<M>([&](int m) ALWAYS { own_add(total[m], pair[p], x + m * 32 + half * 16 + p * 4); });
                });
            });
            x += M * 32;
        });
    }
}

// The same from sums of runs.
INLINE NativeF own_turned(const NativeF (&run)[kOwnStrips]) {
    NativeU row[kOwnStrips], part[4];
    repeat<kOwnStrips>([&](int r) ALWAYS { row[r] = reinterpret_cast<NativeU>(run[r]); });
    own_turn(row, part);
    const auto of = [&](int i) ALWAYS { return reinterpret_cast<NativeF>(part[i]); };
    return (of(0) + of(1)) + (of(2) + of(3));
}

// Brings the rows of a unit's sums into their order, adds the bias, rounds and stores.
template <int M>
inline void own_finish(const OwnPlan& plan, int64_t first, int64_t token, const NativeF (&total)[M]) {
    const Call& call = *plan.call;
    const int64_t rows = plan.weight->rows, row0 = first * kLookupStrip, left = rows - row0;
    const int count = static_cast<int>(left < 16 ? left : 16);
    float bias[16] = {};
    for (int row = 0; call.bias && row < count; ++row) bias[row] = read_float(call.bias, row0 + row, call.bias_type);
    const __m512i places = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
    uint16_t* to = static_cast<uint16_t*>(call.y) + token * rows + row0;
    for (int m = 0; m < M && token + m < call.tokens; ++m, to += rows) {
        const __m512 sums = _mm512_add_ps(_mm512_permutexvar_ps(places, reinterpret_cast<__m512>(total[m])), _mm512_loadu_ps(bias));
        _mm256_mask_storeu_epi16(to, there, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums)));
    }
}

// The results of M tokens from `token` on in the rows of strips first .. stop - 1.
template <int BITS, bool SHARED, int M>
void own_rows(const OwnPlan& plan, int64_t first, int64_t stop, int64_t token) {
    const uint8_t* x = plan.x_of(token);
    for (; first < stop; first += kOwnStrips) {
        NativeF total[M];
        if constexpr (M <= 4) {
            constexpr int R = M == 1 ? 1 : kOwnStrips;  // one token waits for memory, which likes one stream better than four
            NativeF run[M][kOwnStrips];
            for (int r = 0; r < kOwnStrips; r += R) {
                NativeF some[M][R];
                own_runs<BITS, SHARED, R, M>(plan, first + r, x, some);
                repeat<M>([&](int m) ALWAYS { repeat<R>([&](int i) ALWAYS { run[m][r + i] = some[m][i]; }); });
            }
            repeat<M>([&](int m) ALWAYS { total[m] = own_turned(run[m]); });
        } else {
            own_lanes<BITS, SHARED, M>(plan, first, x, total);
        }
        own_finish<M>(plan, first, token, total);
    }
}

// Rows of the block that begins with a token: the smallest size that holds all tokens left.
inline int own_block_rows(int64_t left) { return left == 1 ? 1 : left <= 4 ? 4 : left <= 8 ? 8 : kOwnTokens; }

// One token among those of its block, zeros beyond the last column.
inline void own_place(const OwnPlan& plan, int64_t token) {
    const int64_t K = plan.weight->columns, steps = plan.tiles * 8, first = token / kOwnTokens * kOwnTokens;
    const int64_t rows = own_block_rows(plan.call->tokens - first);
    uint8_t* to = plan.x + (first * steps + token - first) * 32;
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
        case 4: return own_rows<BITS, SHARED, 4>;
        case 8: return own_rows<BITS, SHARED, 8>;
        default: return own_rows<BITS, SHARED, kOwnTokens>;
    }
}
template <int BITS>
Status own_width(const OwnPlan& plan) {
    return own_all(plan, plan.weight->shared ? own_rows_for<BITS, true> : own_rows_for<BITS, false>), kDone;
}

inline Status own_tables(const OwnTables& weight, const Call& call) {
    OwnPlan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.strips = ceil_div(weight.rows, kLookupStrip), plan.tiles = ceil_div(weight.columns, kLookupTile);
    plan.groups = own_table_groups(weight);
    const int64_t last = (call.tokens - 1) / kOwnTokens * kOwnTokens, rows = last + own_block_rows(call.tokens - last);
    const size_t x_bytes = static_cast<size_t>(rows * plan.tiles * kLookupTile) * 2;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + static_cast<size_t>(plan.tiles * 8) * 4));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.group_at = reinterpret_cast<int32_t*>(memory + x_bytes);
    for (int64_t step = 0; step < plan.tiles * 8; ++step) {
        const int64_t found = step * kLookupStep / own_table_columns(weight);
        plan.group_at[step] = static_cast<int32_t>(found < plan.groups ? found : plan.groups - 1);
    }
    if (rows > call.tokens) memset(memory, 0, x_bytes);
    for (int64_t token = 0; token < call.tokens; ++token) own_place(plan, token);
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
