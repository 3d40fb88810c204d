// One token on 256-bit registers: exact float32 products as `Exact`, with a quarter fewer instructions for each code.
//
// `Exact` takes a code to a float by shift, mask and conversion. Here codes of up to 4 bits pick the two bytes of q as bfloat16
// from tables of 16 bytes, 32 codes at once; interleaved they are pairs of columns in 32-bit lanes, and a shift and a mask make
// two floats of each. The tables hold q itself, so nothing has to be taken out of the sums again.
//
//     bytes   r0c0 r0c1 r0c2 r0c3 r1c0 ...       interleaved    (r0c0 r0c1) (r0c2 r0c3) (r1c0 r1c1) ...
//     even    r0c0 r0c2 r1c0 r1c2 ...            odd            r0c1 r0c3 r1c1 r1c3 ...
//
// A lane is thus one of two sums of a row, added up at the end of a segment; activations lie as 0 2 1 3 and are broadcast in
// pairs. One strip and one chain of sums: with more the compiler keeps sums in memory.
#pragma once
#include "two_bytes.h"

namespace aerogel {
namespace UNIT {

// The two bytes of integers.
struct IntegerBytes : IntegersOnly {
    template <int BITS, Form FORM>
    static constexpr bool runs() {
        return FORM == kIntegers && BITS <= 4;
    }
    static bool holds(const Weight& weight) { return weight.bits <= 4 && !weight.table; }
    // Byte BYTE of q as bfloat16 for the codes 0 .. 2^BITS - 1, repeated to 16.
    template <int BITS, int BYTE>
    static INLINE NativeU table() {
        alignas(16) uint8_t entries[16];
        for (int i = 0; i < 16; ++i) {
            const float q = static_cast<float>((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
            entries[i] = static_cast<uint8_t>(float_to_bits(q) >> (16 + 8 * BYTE));
        }
        return every_run(entries);
    }
    template <int BITS>
    static INLINE void look_up(const Decoder&, const NativeU& codes, NativeU& low, NativeU& high) {
        low = UNIT::look_up(table<BITS, 0>(), codes), high = UNIT::look_up(table<BITS, 1>(), codes);
    }
};

template <class Bytes>
struct PairsOf : Bytes, FloatSums {
    struct Accumulator {
        NativeF part[4];  // rows 0 1 4 5, rows 2 3 6 7, and the same of the second eight
    };
    using Operand = Accumulator;
    static constexpr int kOperands = 2, kWordBytes = 8, kLongestSegment = 256;
    static constexpr bool kTerms = false, kOnlyOneRow = true, kTiles = false;
    template <int BITS, Form FORM>
    static constexpr int bias() {
        return 0;
    }

    template <int BITS, Form FORM, int STEP, int ROWS>
    static INLINE void weights(const typename Bytes::Decoder& decoder, const uint8_t* tile, const U16&, Operand (&out)[kOperands]) {
        const U16 u = quad<BITS, STEP>(tile);
        unroll<2>([&](auto p) ALWAYS {
            NativeU low, high;
            Bytes::template look_up<BITS>(decoder, u.part[p], low, high);
            const NativeU pairs[2] = {in_turn<1, false>(low, high), in_turn<1, true>(low, high)};
            unroll<2>([&](auto i) ALWAYS {
                out[0].part[2 * p + i] = reinterpret_cast<NativeF>(pairs[i] << 16);
                out[1].part[2 * p + i] = reinterpret_cast<NativeF>(pairs[i] & 0xffff0000u);
            });
        });
    }

    template <Range RANGE>
    static INLINE Accumulator dot(const Accumulator& sum, const Operand& w, const uint8_t* x) {
        double pair;
        memcpy(&pair, x, 8);
        const NativeF both = reinterpret_cast<NativeF>(_mm256_set1_pd(pair));
        Accumulator v;
        unroll<4>([&](auto i) ALWAYS { v.part[i] = w.part[i] * both + sum.part[i]; });
        return v;
    }
    static INLINE Accumulator none() {
        Accumulator v;
        unroll<4>([&](auto i) ALWAYS { v.part[i] = NativeF{}; });
        return v;
    }
    static INLINE F16 value(const Accumulator& sum) {
        F16 v;
        unroll<2>([&](auto p) ALWAYS {
            v.part[p] = reinterpret_cast<NativeF>(
                _mm256_hadd_ps(reinterpret_cast<__m256>(sum.part[2 * p]), reinterpret_cast<__m256>(sum.part[2 * p + 1])));
        });
        return v;
    }
};

using Pairs = PairsOf<IntegerBytes>;
using FloatPairs = PairsOf<FloatBytes>;

}  // namespace UNIT
}  // namespace aerogel
