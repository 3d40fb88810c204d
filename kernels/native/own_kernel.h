// y = x W^T for weights whose rows have tables of their own: bytes are looked up, interleaved to bfloat16 and multiplied.
//
// A run of 128 bits, in which every machine can look bytes up, holds codes of one row and sixteen columns. Interleaved, the low and
// high bytes are two registers of eight numbers each, in pairs of columns. Up to four tokens meet them there: eight activations,
// repeated in every run, whose four parts of a row's sum are added at its end. Where bfloat16 is multiplied more tokens share a
// decoding (own_lanes.h); elsewhere the two numbers of a pair become floats by a shift and a mask, and so do activations when they
// are placed: for 32 weights on AVX2 10 instructions, and 4 products for each token. Sums are float32 over all columns.
#pragma once
#include "bytes.h"
#include "codes.h"
#include "numbers.h"
#include "own.h"
#include "run_panels.h"

namespace aerogel {
namespace UNIT {

// Tokens of a block, whose sums stay in registers beside the decoding, and bytes of an activation.
#if defined(__AVX512BF16__)
constexpr int kOwnTokens = 16, kOwnElement = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kOwnTokens = 4, kOwnElement = 4;
#else
constexpr int kOwnTokens = 1, kOwnElement = 4;  // a loop would take seconds to compile for a machine that hardly anyone has
#endif
constexpr int kOwnTogether = kNative == 16 ? 4 : 1;  // strips that a few tokens meet together
constexpr int kOwnParts = kNative == 8 ? 2 : 1;      // parts of a strip that meet what is read of a token together
constexpr int kOwnEight = 8 * kOwnElement, kOwnStep = 2 * kOwnEight;
constexpr int kOwnStrips = 4;              // of a unit of work: sixteen rows
constexpr int64_t kOwnPiece = 256 * 1024;  // bytes of codes that stay in the second-level cache while blocks of tokens pass
constexpr int64_t kOwnSmall = 48 * 1024;   // bytes of codes below which waking a second thread costs more than it saves

struct OwnPlan {
    const OwnTables* weight;
    const Call* call;
    int64_t strips, tiles, groups;  // groups: of columns that have tables of their own
    uint8_t* x;                     // [block][step][row][16], see own_place
    int32_t* group_at;              // [step]

    const uint8_t* x_of(int64_t token) const { return x + token * tiles * kLookupTile * kOwnElement; }
};

// Pairs of columns as they are multiplied: numbers of a register, and eight activations.
#if defined(__AVX512BF16__)
using OwnPairs = NativeU;
INLINE OwnPairs own_pairs(const NativeU& w) { return w; }
INLINE OwnPairs own_eight(const uint8_t* x) { return every_run(x); }
INLINE NativeF own_dot(const NativeF& sum, const OwnPairs& w, const OwnPairs& x) {
    return reinterpret_cast<NativeF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w),
                                                      reinterpret_cast<__m512bh>(raw(x))));
}
#else
struct OwnPairs {
    NativeF even, odd;
};
INLINE OwnPairs own_pairs(const NativeU& w) { return {reinterpret_cast<NativeF>(w << 16), reinterpret_cast<NativeF>(w & 0xffff0000u)}; }
INLINE OwnPairs own_eight(const uint8_t* x) {
    return {reinterpret_cast<NativeF>(every_run(x)), reinterpret_cast<NativeF>(every_run(x + 16))};
}
INLINE NativeF own_dot(const NativeF& sum, const OwnPairs& w, const OwnPairs& x) { return w.odd * x.odd + (w.even * x.even + sum); }
#endif

// The codes of a step of the rows of a part of a strip; bits 4 to 6 of a byte may be anything where lookups leave them out.
template <int BITS, int STEP>
INLINE NativeU own_codes(const uint8_t* tile, int part) {
#if defined(__AVX2__)
    if constexpr (BITS == 3) return threes<STEP>(tile).part[part];
#endif
    return quad<BITS, STEP>(tile).part[part];
}

// The low and high bytes of the numbers that a register of codes stands for, in tables of the rows of its part of a strip.
template <int BITS>
INLINE void own_bytes(const NativeU& code, int part, const uint8_t* table, NativeU& low, NativeU& high) {
    const NativeU first = load<U16>(table).part[part];
    low = look_up(first, code);
    high = BITS == 4 ? look_up(load<U16>(table + 64).part[part], code) : look_up(first, code | (NativeU{} + 0x08080808u));
}

// The same in tables that all rows share, one for the first eight of the sixteen columns and one for the last.
template <int BITS>
INLINE void shared_bytes(const NativeU& code, const uint8_t* table, NativeU& low, NativeU& high) {
#if defined(__AVX512VBMI__)
    // All their bytes are in one register, or in half of it up to 3 bits.
    constexpr uint32_t kLast = (BITS == 4 ? 16u : 8u) * 0x01010101u;
    const NativeU at = (BITS == 3 ? code & 0x07070707u : code) | NativeU{0, 0, kLast, kLast, 0, 0, kLast, kLast, 0, 0, kLast, kLast, 0, 0, kLast, kLast};
    __m512i all;
    if constexpr (BITS == 4) all = raw(load<U16>(table).part[0]);
    if constexpr (BITS <= 3) all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    low = words(_mm512_permutexvar_epi8(raw(at), all));
    high = words(_mm512_permutexvar_epi8(raw(at | (NativeU{} + 2 * kLast)), all));
#else
    alignas(16) static const uint32_t eights[4] = {0, 0, 0xffffffffu, 0xffffffffu};
    const NativeU last = every_run(eights);
    if constexpr (BITS <= 3) {
        const NativeU at = code | (last & 0x08080808u);
        low = look_up(every_run(table), at), high = look_up(every_run(table + 16), at);
    } else {
        const auto both = [&](const uint8_t* two) ALWAYS {
            return (look_up(every_run(two), code) & ~last) | (look_up(every_run(two + 16), code) & last);
        };
        low = both(table), high = both(table + 32);
    }
#endif
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

    // The numbers of a step of each strip, of the rows of a part: the first and the last eight columns, a row in each run.
    template <int STEP>
    INLINE void decode(int64_t tile, int part, NativeU (&w)[2][R]) const {
        const int64_t at = plan.group_at[tile * 8 + STEP] * kTableBytes;
        repeat<R>([&](int r) ALWAYS {
            const NativeU code = own_codes<BITS, STEP>(codes[r] + tile * tile_bytes<BITS>(), part);
            NativeU low, high;
            if constexpr (SHARED) shared_bytes<BITS>(code, tables[r] + at, low, high);
            if constexpr (!SHARED) own_bytes<BITS>(code, part, tables[r] + at, low, high);
            w[0][r] = in_turn<1, 0>(low, high), w[1][r] = in_turn<1, 1>(low, high);
        });
    }
};

// How far ahead of use codes are asked for, where their bytes and not the arithmetic are the bound.
constexpr int64_t kOwnAhead = 1536;

template <int BITS, bool SHARED, int R, int M, int CHAINS, int STEP>
LOOKUP_STEP void own_step(const OwnStrips<BITS, SHARED, R>& from, int64_t tile, const uint8_t* x, F16 (&sum)[M][R][CHAINS]) {
    repeat<kParts / kOwnParts>([&](int group) ALWAYS {
        NativeU w[kOwnParts][2][R];
        repeat<kOwnParts>([&](int p) ALWAYS { from.template decode<STEP>(tile, group * kOwnParts + p, w[p]); });
        unroll<2>([&](auto half) ALWAYS {
            OwnPairs pairs[kOwnParts][R];
            repeat<kOwnParts * R>([&](int i) ALWAYS { pairs[i / R][i % R] = own_pairs(w[i / R][half][i % R]); });
            repeat<M>([&](int m) ALWAYS {
                const OwnPairs eight = own_eight(x + m * kOwnStep + half * kOwnEight);
                repeat<kOwnParts * R>([&](int i) ALWAYS {
                    NativeF& into = sum[m][i % R][(2 * STEP + half) % CHAINS].part[group * kOwnParts + i / R];
                    NativeF added = own_dot(into, pairs[i / R][i % R], eight);
                    if constexpr (kOwnParts > 1) in_this_order(added);
                    into = added;
                });
            });
        });
    });
}

// Sums of R strips and M tokens, for so few that turning numbers would cost more than their products: rows stay in their runs.
template <int BITS, bool SHARED, int R, int M>
INLINE void own_runs(const OwnPlan& plan, int64_t first, const uint8_t* x, F16 (&total)[M][R]) {
    constexpr int kChains = R * M * kParts < 8 ? 4 / kParts + (kParts > 4) : 1;  // sums that take turns, to hide the latency of the product
    const OwnStrips<BITS, SHARED, R> from(plan, first);
    const int64_t strip_bytes = plan.tiles * tile_bytes<BITS>();
    const int64_t tables_ahead = plan.groups * from.kTableBytes / plan.tiles * (kOwnAhead / tile_bytes<BITS>());
    F16 sum[M][R][kChains];
    repeat<M * R * kChains>([&](int i) ALWAYS { (&sum[0][0][0])[i] = zero_f(); });
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        // Behind the end of a strip lies one of these; what is read next lies behind the last of them.
        const int64_t ahead = tile * tile_bytes<BITS>() + kOwnAhead, next = ahead < strip_bytes ? ahead : ahead + (R - 1) * strip_bytes;
        repeat<R>([&](int r) ALWAYS { repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(from.codes[r] + next + line * kVector); }); });
        if (R == 1 && !SHARED && plan.groups > 1) {  // the lines of groups of 64 columns
            const uint8_t* tables = from.tables[0] + plan.group_at[tile * 8] * from.kTableBytes + tables_ahead;
            repeat<2>([&](int line) ALWAYS { __builtin_prefetch(tables + line * kVector); });
        }
        unroll<8>([&](auto step) ALWAYS {
            own_step<BITS, SHARED, R, M, kChains, step>(from, tile, x, sum);
            x += M * kOwnStep;
        });
    }
    repeat<M>([&](int m) ALWAYS {
        repeat<R>([&](int r) ALWAYS {
            total[m][r] = sum[m][r][0];
            repeat<kChains - 1>([&](int c) ALWAYS { total[m][r] = total[m][r] + sum[m][r][c + 1]; });
        });
    });
}

}  // namespace UNIT
}  // namespace aerogel
