// Small floats on 256-bit registers: a code of 5 to 8 bits is put where a float16 has its sign, exponent and mantissa, and the processor
// makes float32 of that, subnormal numbers included: exact float32 products as `Exact`.
//
//     e4m3   s eeee mmm    ->   s 0eeee mmm 0000000        the number times 2^-8: a unit, which goes into the factor of all scales
//
// The 16-bit lanes of a register of codes are columns 0 and 2, or, an octet of bits higher, 1 and 3. What becomes floats of four rows
// is parted into columns by a shuffle, which leaves rows as 0 1 4 5 2 3 6 7; sums are brought into order at the end of a segment.
//
// Instructions for 64 weights and one row: 34 and 12 products and loads, 44 where codes may be no number; integers 24 and 12, and
// arithmetic on 32 bits 104.
#pragma once
#include "numerics.h"

namespace aerogel {
namespace UNIT {

// How codes of a float are read as float16.
struct HalfFloat {
    int shift;      // of a code whose sign is the highest of 16 bits
    uint16_t mask;  // sign, exponent and mantissa behind it
    int limit;      // magnitudes from here on are no numbers, whatever float16 has there
    float unit;     // number / float16

    // Finds the float whose numbers are a table of 2^bits; false where there is none.
    static bool find(const float* table, int bits, HalfFloat& to) {
        const uint32_t count = 1u << (bits - 1);
        int limit = static_cast<int>(count);
        while (limit > 2 && table[limit - 1] != table[limit - 1]) --limit;
        for (int exponent = 5; exponent > 0; --exponent) {
            if (bits - 1 < exponent) continue;
            HalfFloat h{5 - exponent, 0, limit, 1.0f};
            h.mask = static_cast<uint16_t>(0x8000u | (count - 1) << (16 - h.shift - bits));
            h.unit = table[1] / half_to_float(h.bits(1, bits));
            bool all = h.unit > 0.0f && (float_to_bits(h.unit) & 0x7fffffu) == 0;
            for (uint32_t code = 0; all && code < 2 * count; ++code) {
                const bool none = static_cast<int>(code & (count - 1)) >= limit;
                all = none ? table[code] != table[code] : float_to_bits(table[code]) == float_to_bits(half_to_float(h.bits(code, bits)) * h.unit);
            }
            if (all && (bits == 8 || limit == static_cast<int>(count))) return to = h, true;
        }
        return false;
    }
    uint16_t bits(uint32_t code, int width) const {
        return static_cast<uint16_t>(static_cast<int16_t>(code << (16 - width)) >> shift) & mask;
    }
};

struct Halves : NothingFolded, FloatSums {
    using Operand = F16;
    static constexpr int kOperands = 4, kWordBytes = 4, kLongestSegment = 256;
    static constexpr bool kTerms = false, kOnlyOneRow = false, kTiles = false;
    static constexpr Form form(Form) { return kOneTable; }
    template <int BITS, Form FORM>
    static constexpr bool runs() {
        return FORM == kOneTable && (BITS == 5 || BITS == 6 || BITS == 8);
    }
    template <int BITS, Form FORM>
    static constexpr int bias() {
        return 0;
    }
    static constexpr uint32_t kPickedBytes = 0;

    // Whether a weight is of this kind, and then what its sums are to be multiplied with.
    static bool holds(const Weight& weight, float& unit) {
        const bool width = weight.bits == 5 || weight.bits == 6 || weight.bits == 8;
        HalfFloat h;
        if (!weight.table || weight.pick || !width || !HalfFloat::find(static_cast<const float*>(weight.table), weight.bits, h)) return false;
        return unit = h.unit, true;
    }

    struct Decoder {
        __m128i shift;
        __m256i mask;
        int limit;
    };
    template <int BITS, Form FORM>
    static void write_decoder(const Weight& weight, uint8_t* to) {
        HalfFloat h{};
        HalfFloat::find(static_cast<const float*>(weight.table), BITS, h);
        memcpy(to, &h, sizeof h);
    }
    template <int BITS, Form FORM>
    static INLINE Decoder decoder(const uint8_t* written) {
        HalfFloat h;
        memcpy(&h, written, sizeof h);
        return {_mm_cvtsi32_si128(h.shift), _mm256_set1_epi16(static_cast<int16_t>(h.mask)), h.limit};
    }

    // Two columns of eight rows, those of the low and of the high 16 bits of each lane.
    static INLINE void columns(__m256i halves, NativeF& low, NativeF& high) {
        const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)), last = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
        low = reinterpret_cast<NativeF>(_mm256_shuffle_ps(first, last, 0x88));
        high = reinterpret_cast<NativeF>(_mm256_shuffle_ps(first, last, 0xdd));
    }

    template <int BITS, Form FORM, int STEP, int ROWS>
    static INLINE void weights(const Decoder& d, const uint8_t* tile, const U16&, Operand (&out)[kOperands]) {
        const U16 u = quad<BITS, STEP>(tile);
        unroll<2>([&](auto p) ALWAYS {
            const __m256i code = _mm256_slli_epi32(reinterpret_cast<__m256i>(u.part[p]), 8 - BITS);
            __m256i odd = _mm256_and_si256(_mm256_sra_epi16(code, d.shift), d.mask);
            __m256i even = _mm256_and_si256(_mm256_sra_epi16(_mm256_slli_epi16(code, 8), d.shift), d.mask);
            if (BITS == 8 && d.limit < 128) {
                // All bits of what is no number. The bits below an odd column's are those of another in the same row, which has none either.
                const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi8(0x7f));
                const __m256i none = _mm256_cmpgt_epi8(magnitude, _mm256_set1_epi8(static_cast<char>(d.limit - 1)));
                odd = _mm256_or_si256(odd, none), even = _mm256_or_si256(even, _mm256_slli_epi16(none, 8));
            }
            columns(even, out[0].part[p], out[2].part[p]);
            columns(odd, out[1].part[p], out[3].part[p]);
        });
    }
    template <Range>
    static INLINE Accumulator dot(const Accumulator& sum, const Operand& w, const uint8_t* x) {
        return multiply_add(w, spread<F16>(bits_to_float(word_of(x))), sum);
    }
    static INLINE F16 value(const Accumulator& sum) {
        F16 v;
        unroll<2>([&](auto p) ALWAYS {
            v.part[p] = reinterpret_cast<NativeF>(_mm256_permute4x64_pd(reinterpret_cast<__m256d>(sum.part[p]), 0xd8));
        });
        return v;
    }
};

}  // namespace UNIT
}  // namespace aerogel
