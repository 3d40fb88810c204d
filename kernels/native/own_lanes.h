// Many tokens against weights whose rows have tables of their own, where bfloat16 is multiplied (own_kernel.h).
//
// The numbers of four strips are turned such that a lane is a row: then an activation is the same in all lanes, which a product reads
// without an instruction of its own. Repeating sixteen bytes takes one on some machines, in the unit that also looks up and interleaves.
//
// Instructions for 128 weights and M tokens: 18 and 4 M; where rows stay in runs 10 for the codes, 4 M products and 2 M repetitions of
// activations, which four strips share.
#pragma once
#include "own_kernel.h"

namespace aerogel {
namespace UNIT {

// A product with two numbers for all lanes. In one instruction, which the compiler does not make of a product and a broadcast.
INLINE void own_add(NativeF& sum, const NativeU& w, const uint8_t* x) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const uint8_t(*)[4]>(x)));
}

// Four registers whose runs are rows of four pairs of columns, turned into four whose lanes are the rows of one pair: lane
// 4 * i + r is row i of register r.
INLINE void own_turn(const NativeU (&row)[4], NativeU* pair) {
    const __m512i ab = _mm512_unpacklo_epi32(raw(row[0]), raw(row[1])), cd = _mm512_unpacklo_epi32(raw(row[2]), raw(row[3]));
    const __m512i AB = _mm512_unpackhi_epi32(raw(row[0]), raw(row[1])), CD = _mm512_unpackhi_epi32(raw(row[2]), raw(row[3]));
    pair[0] = words(_mm512_unpacklo_epi64(ab, cd)), pair[1] = words(_mm512_unpackhi_epi64(ab, cd));
    pair[2] = words(_mm512_unpacklo_epi64(AB, CD)), pair[3] = words(_mm512_unpackhi_epi64(AB, CD));
}

// Sums of four strips and M tokens, a row in each lane.
template <int BITS, bool SHARED, int M>
INLINE void own_lanes(const OwnPlan& plan, int64_t first, const uint8_t* x, NativeF (&total)[M]) {
    const OwnStrips<BITS, SHARED, kOwnStrips> from(plan, first);
    repeat<M>([&](int m) ALWAYS { total[m] = NativeF{}; });
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        unroll<8>([&](auto step) ALWAYS {
            NativeU w[2][kOwnStrips];
            from.template decode<step>(tile, 0, w);
            unroll<2>([&](auto half) ALWAYS {
                NativeU pair[4];
                own_turn(w[half], pair);
                repeat<4>([&](int p) ALWAYS {
                    repeat<M>([&](int m) ALWAYS { own_add(total[m], pair[p], x + m * kOwnStep + half * kOwnEight + p * 4); });
                });
            });
            x += M * kOwnStep;
        });
    }
}

// The same from sums of runs.
INLINE NativeF own_turned(const F16 (&run)[kOwnStrips]) {
    NativeU row[kOwnStrips], part[4];
    repeat<kOwnStrips>([&](int r) ALWAYS { row[r] = reinterpret_cast<NativeU>(run[r].part[0]); });
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

}  // namespace UNIT
}  // namespace aerogel
