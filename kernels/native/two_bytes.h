// Small floats on 256-bit registers: the two bytes of a code's number as bfloat16 are looked up, exact float32 products as `Exact`.
//
// Of a magnitude m, the code without its sign, the low byte of the number is that of m % 16 and the high byte that of m / 8:
//
//     e4m3   m = eeee mmm     ->   number  (e + 120) mmm0000     low byte  e0 mmm 0000, high byte  (e + 120) / 2
//
// and likewise of every float of 5 to 8 bits with 2 or 3 digits, and of RF8, whose digits are powers of two. Not so at the two ends: subnormal
// numbers, zero, infinity and what is no number. Magnitudes below 8 and from 120 on, m % 16 different for each, have bytes of their own.
//
// Instructions for 64 weights and one row: 34 and 10 products and loads (pairs.h), for some rows 38; integers of 8 bits 24 and 12.
#pragma once
#include "bytes.h"
#include "numerics.h"

namespace aerogel {
namespace UNIT {

// The bytes of sixteen numbers each: by m % 16 and m / 8, and of the ends by m % 16. A high byte by m / 8 has the sign where it is not taken.
struct ByteTables {
    uint8_t low[16], high[16], low_end[16], high_end[16];

    static constexpr uint8_t kEnd = 0x80;
    static bool at_end(uint32_t magnitude) { return magnitude < 8 || magnitude >= 120; }

    // Finds them for a table of 2^bits numbers; false where it is of another kind.
    static bool find(const float* table, int bits, ByteTables& to) {
        const uint32_t count = 1u << (bits - 1);
        ByteTables found{};
        for (uint32_t m = 0; m < count; ++m) found.put(m, float_to_bits(table[m]));
        for (uint32_t code = 0; code < 2 * count; ++code) {
            const uint32_t wanted = float_to_bits(table[code]), is = found.number(code % count) | code / count << 31;
            if (wanted != is && !(table[code] != table[code] && (is & 0x7fffffffu) > 0x7f800000u)) return false;
        }
        return to = found, true;
    }
    void put(uint32_t m, uint32_t bits) {
        const uint8_t lower = static_cast<uint8_t>(bits >> 16), upper = static_cast<uint8_t>(bits >> 24);
        if (at_end(m)) {
            low_end[m % 16] = lower, high_end[m % 16] = upper, high[m / 8] = kEnd;
        } else {
            low[m % 16] = lower, high[m / 8] = upper;
        }
    }
    uint32_t number(uint32_t m) const {
        const uint8_t inner = high[m / 8];
        const uint32_t lower = inner & kEnd ? low_end[m % 16] : low[m % 16], upper = inner & kEnd ? high_end[m % 16] : inner;
        return upper << 24 | lower << 16;
    }
};

// Bytes of `b` where those of `mask` have their sign. From the intrinsic function GCC makes a comparison before each.
INLINE __m256i by_sign(__m256i a, __m256i b, __m256i mask) {
    __m256i v;
    asm("vpblendvb %3, %2, %1, %0" : "=x"(v) : "x"(a), "xm"(b), "x"(mask));
    return v;
}

// The two bytes of codes of such a kind, 32 at once.
struct FloatBytes : NothingFolded {
    static constexpr Form form(Form) { return kOneTable; }
    template <int BITS, Form FORM>
    static constexpr bool runs() {
        return FORM == kOneTable && (BITS == 5 || BITS == 6 || BITS == 8);
    }
    static constexpr uint32_t kPickedBytes = 0;

    // Whether a weight is of this kind.
    static bool holds(const Weight& weight) {
        const bool width = weight.bits == 5 || weight.bits == 6 || weight.bits == 8;
        ByteTables tables;
        return weight.table && !weight.pick && width && ByteTables::find(static_cast<const float*>(weight.table), weight.bits, tables);
    }

    struct Decoder {
        NativeU low, high, low_end, high_end;
    };
    template <int BITS, Form FORM>
    static void write_decoder(const Weight& weight, uint8_t* to) {
        ByteTables tables{};
        ByteTables::find(static_cast<const float*>(weight.table), BITS, tables);
        memcpy(to, &tables, sizeof tables);
    }
    template <int BITS, Form FORM>
    static INLINE Decoder decoder(const uint8_t* written) {
        return {every_run(written), every_run(written + 16), every_run(written + 32), every_run(written + 48)};
    }

    // Low and high bytes in the order of the codes.
    template <int BITS>
    static INLINE void look_up(const Decoder& d, const NativeU& codes, NativeU& low, NativeU& high) {
        const __m256i code = raw(codes), fifteen = _mm256_set1_epi8(15), nibble = _mm256_and_si256(code, fifteen);
        const __m256i eighth = _mm256_and_si256(_mm256_srli_epi16(code, 3), _mm256_set1_epi8(BITS < 8 ? (1 << (BITS - 4)) - 1 : 15));
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 8 - BITS), _mm256_set1_epi8(-128));
        const __m256i inner = _mm256_shuffle_epi8(raw(d.high), eighth);
        const auto chosen = [&](__m256i found, const NativeU& ends) ALWAYS {
            return by_sign(found, _mm256_shuffle_epi8(raw(ends), nibble), inner);
        };
        low = words(chosen(_mm256_shuffle_epi8(raw(d.low), nibble), d.low_end));
        high = words(_mm256_or_si256(chosen(inner, d.high_end), sign));
    }
};

struct TwoBytes : FloatBytes, FloatSums {
    using Operand = F16;
    static constexpr int kOperands = 4, kWordBytes = 4, kLongestSegment = 256;
    static constexpr bool kTerms = false, kOnlyOneRow = false, kTiles = false;
    template <int BITS, Form FORM>
    static constexpr int bias() {
        return 0;
    }

    template <int BITS, Form FORM, int STEP, int ROWS>
    static INLINE void weights(const Decoder& d, const uint8_t* tile, const U16&, Operand (&out)[kOperands]) {
        const U16 u = quad<BITS, STEP>(tile);
        unroll<2>([&](auto p) ALWAYS {
            NativeU low, high;
            look_up<BITS>(d, u.part[p], low, high);
            const __m256 first = reinterpret_cast<__m256>(in_turn<1, false>(low, high)), last = reinterpret_cast<__m256>(in_turn<1, true>(low, high));
            columns(_mm256_shuffle_ps(first, last, 0x88), out[0].part[p], out[1].part[p]);
            columns(_mm256_shuffle_ps(first, last, 0xdd), out[2].part[p], out[3].part[p]);
        });
    }
    // Two columns of eight rows, those of the low and of the high 16 bits of each lane.
    static INLINE void columns(__m256 pairs, NativeF& low, NativeF& high) {
        const NativeU both = reinterpret_cast<NativeU>(pairs);
        low = reinterpret_cast<NativeF>(both << 16), high = reinterpret_cast<NativeF>(both & 0xffff0000u);
    }
    template <Range>
    static INLINE Accumulator dot(const Accumulator& sum, const Operand& w, const uint8_t* x) {
        return multiply_add(w, spread<F16>(bits_to_float(word_of(x))), sum);
    }
};

}  // namespace UNIT
}  // namespace aerogel
