// Activations rounded to int8, and the products of bytes that machines have: see numerics.h.
#pragma once
#include "numerics.h"

namespace aerogel {
namespace UNIT {

struct Int8 : IntegersOnly {
    using Accumulator = I16;
    using Operand = U16;
    // Products that pass through sums of two in 16 bits; and machines whose product of bytes is signed, or is made so.
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
    static constexpr bool kPairs = true, kSigned = true;
#elif defined(__ARM_FEATURE_DOTPROD)
    static constexpr bool kPairs = false, kSigned = true;
#else
    static constexpr bool kPairs = false, kSigned = false;
#endif
    static constexpr int kOperands = 1, kWordBytes = 4, kLongestSegment = 128;
    static constexpr bool kTerms = false, kOnlyOneRow = false, kTiles = false;
    // The product of bytes has one unsigned side. Few rows give it to the codes: u x, less the offset times the sum of x, once
    // for every segment and row. A decoded panel is read by many rows, so there the codes are signed, zero point and all, and
    // the activations have 128 added: what that adds, 128 times the sum of a segment's codes, is where its sums begin.
    template <int BITS>
    static constexpr bool moves() {
#if defined(__AVX512VNNI__)
        return BITS < 8;  // q - z of eight bits needs nine
#else
        return false;
#endif
    }
    // Whether a decoded panel holds q - z.
    template <int BITS>
    static constexpr bool signed_codes() {
        return moves<BITS>();
    }
    template <int BITS, Form FORM>
    static constexpr int bias() {
        return kSigned && BITS == 8 ? 0 : 1 << (BITS - 1);  // 8-bit codes are moved before a signed product
    }
    template <int BITS, Form FORM, int STEP, int ROWS>
    static INLINE void weights(const Decoder&, const uint8_t* tile, const U16&, Operand (&out)[kOperands]) {
        out[0] = quad<BITS, STEP>(tile);
        if constexpr (kSigned && BITS == 8) unroll<kParts>([&](auto p) ALWAYS { out[0].part[p] ^= 0x80808080u; });
    }
    template <Range RANGE>
    static INLINE Accumulator dot(const Accumulator& sum, const Operand& w, const uint8_t* x) {
        Accumulator v;
        unroll<kParts>([&](auto p) ALWAYS { v.part[p] = dot_part<RANGE>(sum.part[p], w.part[p], word_of(x)); });
        return v;
    }
    template <int BITS>
    static constexpr Range range() {
        return !kPairs ? kBytes : BITS <= 4 ? kNibbles : BITS == 8 ? kWide : kBytes;
    }
    // With kNibbles, `dot` sums pairs in 16 bits; this adds such a sum to a whole one.
    static INLINE Accumulator joined(const Accumulator& sum, const Accumulator& pairs) {
        Accumulator v;
        unroll<kParts>([&](auto p) ALWAYS {
#if defined(__AVX2__) && !defined(__AVX512F__)
            v.part[p] = sum.part[p] + reinterpret_cast<NativeI>(
                                          _mm256_madd_epi16(reinterpret_cast<__m256i>(pairs.part[p]), _mm256_set1_epi16(1)));
#else
            v.part[p] = sum.part[p] + pairs.part[p];
#endif
        });
        return v;
    }
#if defined(__AVX512VNNI__)
    // a - b byte by byte; and sum - 128 times the four codes of each lane.
    static INLINE U16 less(const U16& a, const U16& b) {
        U16 v;
        v.part[0] = reinterpret_cast<NativeU>(_mm512_sub_epi8(reinterpret_cast<__m512i>(a.part[0]), reinterpret_cast<__m512i>(b.part[0])));
        return v;
    }
    static INLINE I16 less_moved(const I16& sum, const U16& codes) {
        const __m512i added = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(static_cast<char>(0x80)),
                                                  reinterpret_cast<__m512i>(codes.part[0]));
        I16 v;
        v.part[0] = sum.part[0] - reinterpret_cast<NativeI>(added);
        return v;
    }
#endif
    static INLINE Accumulator none() { return zero_i(); }
    static INLINE F16 value(const Accumulator& sum) { return to_float(sum); }

private:
    // sum + the products of four bytes, unsigned weights and signed activations.
    template <Range RANGE>
    static INLINE NativeI dot_part(NativeI sum, NativeU w, uint32_t x) {
#if defined(__AVX512VNNI__)
        const __m512i bytes = _mm512_set1_epi32(static_cast<int>(x)), codes = reinterpret_cast<__m512i>(w);
        const __m512i total = reinterpret_cast<__m512i>(sum);
        if constexpr (RANGE == kMoved) return reinterpret_cast<NativeI>(_mm512_dpbusd_epi32(total, bytes, codes));
        return reinterpret_cast<NativeI>(_mm512_dpbusd_epi32(total, codes, bytes));
#elif defined(__AVXVNNI__)
        return reinterpret_cast<NativeI>(_mm256_dpbusd_avx_epi32(
            reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(w), _mm256_set1_epi32(static_cast<int>(x))));
#elif defined(__AVX2__)
        const __m256i bytes = _mm256_set1_epi32(static_cast<int>(x)), ones = _mm256_set1_epi16(1);
        const __m256i codes = reinterpret_cast<__m256i>(w);
        __m256i total = reinterpret_cast<__m256i>(sum);
        if constexpr (RANGE == kNibbles) return reinterpret_cast<NativeI>(_mm256_add_epi16(total, _mm256_maddubs_epi16(codes, bytes)));
        if constexpr (RANGE == kWide) {
            // The instruction adds two products in 16 bits and saturates. Of unsigned codes they may reach 2 * 255 * 127, which
            // is too much; of |q| <= 128 and x with q's sign, |x| <= 127, they reach 32512, which fits.
            const __m256i sizes = _mm256_abs_epi8(codes), turned = _mm256_sign_epi8(bytes, codes);
            total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, turned), ones));
        } else {
            total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, bytes), ones));
        }
        return reinterpret_cast<NativeI>(total);
#elif defined(__ARM_FEATURE_DOTPROD)
        return reinterpret_cast<NativeI>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(w),
                                                   vreinterpretq_s8_u32(vdupq_n_u32(x))));
#else
        for (int j = 0; j < 4; ++j) {
            const int32_t value = static_cast<int8_t>(x >> (8 * j));
            sum += reinterpret_cast<NativeI>((w >> (8 * j)) & 0xffu) * value;
        }
        return sum;
#endif
    }
};

#if defined(AEROGEL_TILES)
// The same on tiles (amx.h), whose products are of signed bytes on both sides.
struct Tiles : Int8 {
    static constexpr bool kTiles = true;
    template <int BITS>
    static constexpr bool moves() {
        return false;
    }
    template <int BITS>
    static constexpr bool signed_codes() {
        return true;
    }
};
#endif

}  // namespace UNIT
}  // namespace aerogel
