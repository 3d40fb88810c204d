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

constexpr int kOwnStrips = 4;              // that are multiplied together: sixteen rows
constexpr int kOwnRegisters = 8;           // of the numbers of a step of them
constexpr int64_t kOwnStep = kOwnRegisters * kVector;
constexpr int kOwnFew = 16;                // tokens whose sums stay in registers beside the decoding
constexpr int kOwnRows = 12;               // of a block where there are more
constexpr int kOwnUnits = 2;               // four strips each, that share a block's activations once they are decoded
constexpr int64_t kOwnPanel = 256 * 1024;  // bytes of decoded strips that stay in the second-level cache while blocks pass
constexpr int64_t kOwnSmall = 48 * 1024;   // bytes of codes below which waking a second thread costs more than it saves

struct OwnPlan {
    const OwnTables* weight;
    const Call* call;
    int64_t units, strips, tiles, groups, blocks;  // units: of four strips; groups: of columns that have tables of their own
    int block_rows;
    uint8_t* x;         // [block][step][row][16] bfloat16
    int64_t* table_at;  // [step]: bytes from the first table of a strip
};

INLINE NativeF own_dot(const NativeF& sum, const NativeU& w, const uint8_t* x) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(word_of(x)));
    return reinterpret_cast<NativeF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w),
                                                      reinterpret_cast<__m512bh>(pair)));
}

// The low and high bytes of the numbers that a register of codes stands for, in tables of the four rows.
template <int BITS>
INLINE void own_bytes(const NativeU& code, const uint8_t* table, NativeU& low, NativeU& high) {
    const NativeU first = load<U16>(table).part[0];
    low = look_up(first, code);
    high = BITS == 4 ? look_up(load<U16>(table + 64).part[0], code) : look_up(first, code | (NativeU{} + 0x08080808u));
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

// Four registers whose runs are rows of four pairs of columns, turned into four whose lanes are the rows of one pair.
INLINE void own_turn(const NativeU (&row)[4], NativeU* pair) {
    const __m512i ab = _mm512_unpacklo_epi32(raw(row[0]), raw(row[1])), cd = _mm512_unpacklo_epi32(raw(row[2]), raw(row[3]));
    const __m512i AB = _mm512_unpackhi_epi32(raw(row[0]), raw(row[1])), CD = _mm512_unpackhi_epi32(raw(row[2]), raw(row[3]));
    pair[0] = words(_mm512_unpacklo_epi64(ab, cd)), pair[1] = words(_mm512_unpackhi_epi64(ab, cd));
    pair[2] = words(_mm512_unpacklo_epi64(AB, CD)), pair[3] = words(_mm512_unpackhi_epi64(AB, CD));
}

// Four strips whose steps are decoded together; those beyond the last repeat it.
template <int BITS, bool SHARED>
struct OwnUnit {
    const OwnPlan& plan;
    const uint8_t *codes[kOwnStrips], *tables[kOwnStrips];

    INLINE OwnUnit(const OwnPlan& of, int64_t unit) : plan(of) {
        for (int r = 0; r < kOwnStrips; ++r) {
            const int64_t wanted = unit * kOwnStrips + r, strip = wanted < of.strips ? wanted : of.strips - 1;
            const int64_t run = SHARED ? strip * kLookupStrip / of.weight->shared : strip;
            codes[r] = static_cast<const uint8_t*>(of.weight->codes) + strip * of.tiles * tile_bytes<BITS>();
            tables[r] = static_cast<const uint8_t*>(of.weight->table) + run * of.groups * (SHARED ? shared_table_bytes(BITS) : own_table_bytes(BITS));
        }
    }

    // The numbers of a step, a pair of columns in each register: lane 4 * i + r is row i of strip r.
    template <int STEP>
    INLINE void decode(int64_t tile, NativeU (&pair)[kOwnRegisters]) const {
        const int64_t at = plan.table_at[tile * 8 + STEP];
        NativeU first[kOwnStrips], last[kOwnStrips];
        repeat<kOwnStrips>([&](int r) ALWAYS {
            const NativeU code = quad<BITS, STEP>(codes[r] + tile * tile_bytes<BITS>()).part[0];
            NativeU low, high;
            if constexpr (SHARED) shared_bytes<BITS>(code, tables[r] + at, low, high);
            if constexpr (!SHARED) own_bytes<BITS>(code, tables[r] + at, low, high);
            first[r] = in_turn<1, 0>(low, high), last[r] = in_turn<1, 1>(low, high);
        });
        own_turn(first, pair), own_turn(last, pair + 4);
    }
};

// How far ahead of use codes are asked for, where their bytes and not the arithmetic are the bound.
constexpr int64_t kOwnAhead = 1536;

// Sums of four strips and up to 16 tokens: codes are decoded where they are multiplied.
template <int BITS, bool SHARED, int M>
INLINE void own_unit(const OwnPlan& plan, int64_t unit, NativeF (&total)[M]) {
    constexpr int kChains = M <= 8 ? 8 / M : 1;  // sums that take turns, to hide the latency of the product
    const OwnUnit<BITS, SHARED> from(plan, unit);
    const int64_t strip_bytes = plan.tiles * tile_bytes<BITS>();
    const uint8_t* x = plan.x;
    NativeF sum[M][kChains] = {};
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        if constexpr (M <= 4) {
            // Behind the end of a strip lies one of these; what is read next lies behind the last of them.
            const int64_t ahead = tile * tile_bytes<BITS>() + kOwnAhead;
            const int64_t next = ahead < strip_bytes ? ahead : ahead + (kOwnStrips - 1) * strip_bytes;
            repeat<kOwnStrips>([&](int r) ALWAYS {
                repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(from.codes[r] + next + line * kVector); });
            });
        }
        unroll<8>([&](auto step) ALWAYS {
            NativeU pair[kOwnRegisters];
            from.template decode<step>(tile, pair);
            const auto multiply = [&](int p) ALWAYS {
                repeat<M>([&](int m) ALWAYS { sum[m][p % kChains] = own_dot(sum[m][p % kChains], pair[p], x + m * 32 + p * 4); });
            };
            if constexpr (M <= 4) {
                repeat<kOwnRegisters>(multiply);
            } else {
#pragma GCC unroll 1  // through memory: that costs nothing beside so many products, and is a fraction of the code
                for (int p = 0; p < kOwnRegisters; ++p) multiply(p);
            }
            x += M * 32;
        });
    }
    repeat<M>([&](int m) ALWAYS {
        total[m] = sum[m][0];
        repeat<kChains - 1>([&](int c) ALWAYS { total[m] += sum[m][c + 1]; });
    });
}

// The numbers of four strips as they are multiplied, [step][pair], a vector every `apart` bytes from `to` on.
template <int BITS, bool SHARED>
void own_decode(const OwnPlan& plan, int64_t unit, int64_t apart, uint8_t* to) {
    const OwnUnit<BITS, SHARED> from(plan, unit);
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        unroll<8>([&](auto step) ALWAYS {
            NativeU pair[kOwnRegisters];
            from.template decode<step>(tile, pair);
            repeat<kOwnRegisters>([&](int p) ALWAYS { memcpy(to + p * apart, &pair[p], kVector); });
            to += kOwnRegisters * apart;
        });
    }
}

// The products of R decoded units and a block of M tokens.
template <int R, int M>
INLINE void own_block(const OwnPlan& plan, const uint8_t* numbers, int64_t block, NativeF (&sum)[R][M]) {
    const uint8_t* x = plan.x + block * plan.tiles * 8 * M * 32;
    for (int64_t step = 0; step < 8 * plan.tiles; ++step, x += M * 32) {
        repeat<kOwnRegisters>([&](int p) ALWAYS {
            NativeU w[R];
            repeat<R>([&](int r) ALWAYS { w[r] = load<U16>(numbers + r * kVector).part[0]; });
            repeat<M>([&](int m) ALWAYS { repeat<R>([&](int r) ALWAYS { sum[r][m] = own_dot(sum[r][m], w[r], x + m * 32 + p * 4); }); });
            numbers += R * kVector;
        });
    }
}

// Brings the rows of a unit's sums into their order, adds the bias, rounds and stores.
template <int M>
inline void own_finish(const OwnPlan& plan, int64_t unit, int64_t block, const NativeF (&total)[M]) {
    const Call& call = *plan.call;
    const int64_t rows = plan.weight->rows, row0 = unit * kOwnStrips * kLookupStrip, left = rows - row0;
    const int count = static_cast<int>(left < 16 ? left : 16);
    float bias[16] = {};
    for (int row = 0; call.bias && row < count; ++row) bias[row] = read_float(call.bias, row0 + row, call.bias_type);
    const __m512i places = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
    uint16_t* to = static_cast<uint16_t*>(call.y) + block * M * rows + row0;
    for (int m = 0; m < M && block * M + m < call.tokens; ++m, to += rows) {
        const __m512 sums = _mm512_add_ps(_mm512_permutexvar_ps(places, reinterpret_cast<__m512>(total[m])), _mm512_loadu_ps(bias));
        _mm256_mask_storeu_epi16(to, there, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums)));
    }
}

// Up to 16 tokens.
template <int BITS, bool SHARED, int M>
void own_few(const OwnPlan& plan) {
    const int threads = plan.strips * plan.tiles * tile_bytes<BITS>() < kOwnSmall ? 1 : plan.call->threads;
    const int64_t even = plan.units / (threads * 6), size = threads == 1 ? plan.units : even > 1 ? even : 1;
    parallel(ceil_div(plan.units, size), threads, [&](int64_t piece, int) {
        const int64_t stop = (piece + 1) * size < plan.units ? (piece + 1) * size : plan.units;
        for (int64_t unit = piece * size; unit < stop; ++unit) {
            NativeF total[M];
            own_unit<BITS, SHARED, M>(plan, unit, total);
            own_finish<M>(plan, unit, 0, total);
        }
    });
}

using OwnDecode = void (*)(const OwnPlan&, int64_t unit, int64_t apart, uint8_t* to);

// More tokens: some units are decoded into the second-level cache, where all blocks of tokens meet them.
template <int M>
Status own_many(const OwnPlan& plan, OwnDecode decode) {
    constexpr int R = kOwnUnits;
    const int64_t unit_bytes = plan.tiles * 8 * kOwnStep;
    const int threads = plan.units * unit_bytes < 4 * kOwnSmall ? 1 : plan.call->threads;
    const int64_t even = plan.units / (threads * 6), most = kOwnPanel / unit_bytes, wanted = even < most ? even : most;
    const int64_t size = wanted > R ? wanted / R * R : R;
    const size_t bytes = static_cast<size_t>(size * unit_bytes);
    uint8_t* memory = static_cast<uint8_t*>(scratch(kWorkerScratch, bytes * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    parallel(ceil_div(plan.units, size), threads, [&](int64_t piece, int worker) {
        uint8_t* numbers = memory + bytes * static_cast<size_t>(worker);
        const int64_t first = piece * size, stop = first + size < plan.units ? first + size : plan.units;
        for (int64_t i = 0; i < ceil_div(stop - first, R) * R; ++i) {
            const int64_t unit = first + i < stop ? first + i : stop - 1;
            decode(plan, unit, R * kVector, numbers + i / R * R * unit_bytes + i % R * kVector);
        }
        for (int64_t block = 0; block < plan.blocks; ++block) {
            for (int64_t unit = first; unit < stop; unit += R) {
                NativeF total[R][M] = {};
                own_block<R, M>(plan, numbers + (unit - first) * unit_bytes, block, total);
                for (int r = 0; r < R && unit + r < stop; ++r) own_finish<M>(plan, unit + r, block, total[r]);
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

template <int BITS, bool SHARED>
Status own_tokens(const OwnPlan& plan) {
    if (plan.block_rows == 1) return own_few<BITS, SHARED, 1>(plan), kDone;
    if (plan.block_rows == 4) return own_few<BITS, SHARED, 4>(plan), kDone;
    if (plan.block_rows == 8) return own_few<BITS, SHARED, 8>(plan), kDone;
    if (plan.block_rows == kOwnFew) return own_few<BITS, SHARED, kOwnFew>(plan), kDone;
    return own_many<kOwnRows>(plan, own_decode<BITS, SHARED>);
}
template <int BITS>
Status own_width(const OwnPlan& plan) {
    return plan.weight->shared ? own_tokens<BITS, true>(plan) : own_tokens<BITS, false>(plan);
}

inline Status own_tables(const OwnTables& weight, const Call& call) {
    OwnPlan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.strips = ceil_div(weight.rows, kLookupStrip), plan.tiles = ceil_div(weight.columns, kLookupTile);
    plan.units = ceil_div(plan.strips, kOwnStrips), plan.groups = own_table_groups(weight);
    const int64_t tokens = call.tokens, table_bytes = weight.shared ? shared_table_bytes(weight.bits) : own_table_bytes(weight.bits);
    plan.block_rows = tokens == 1 ? 1 : tokens <= 4 ? 4 : tokens <= 8 ? 8 : tokens <= kOwnFew ? kOwnFew : kOwnRows;
    plan.blocks = ceil_div(call.tokens, plan.block_rows);
    const size_t x_bytes = static_cast<size_t>(plan.blocks * plan.block_rows * plan.tiles * kLookupTile) * 2;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + static_cast<size_t>(plan.tiles * 8) * sizeof(int64_t)));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.table_at = reinterpret_cast<int64_t*>(memory + x_bytes);
    for (int64_t step = 0; step < plan.tiles * 8; ++step) {
        const int64_t found = step * kLookupStep / own_table_columns(weight);
        plan.table_at[step] = (found < plan.groups ? found : plan.groups - 1) * table_bytes;
    }
    if (call.tokens % plan.block_rows) memset(memory, 0, x_bytes);
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
