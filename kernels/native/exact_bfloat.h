// Exact activations on machines that multiply pairs of bfloat16: see numerics.h.
#pragma once
#include "numerics.h"

namespace aerogel {
namespace UNIT {

// Of floats that are not zero: the least and largest exponent, as stored, and all bits behind the leading one.
struct Extent {
    uint32_t lowest = 255, highest = 0, mantissas = 0;

    INLINE void add(uint32_t bits) {
        const uint32_t exponent = bits >> 23 & 255u, mantissa = bits & 0x7fffffu;
        lowest = exponent < lowest && (exponent | mantissa) ? exponent : lowest;
        highest = exponent > highest ? exponent : highest;
        mantissas |= mantissa;
    }
    int digits() const { return mantissas ? 24 - __builtin_ctz(mantissas) : 1; }
};

// Adds the scales of a weight, in bfloat16 or powers of two, until they have more than so many digits.
inline void read_scales(const Weight& weight, int digits, Extent& to) {
    constexpr int64_t kSome = 1024;
    const bool powers = weight.scale_type == kFloat8E8m0;
    const int64_t count = powers ? weight.scale_bytes : weight.scale_bytes / 2;
    for (int64_t i = 0; i < count && to.digits() <= digits; i += kSome) {
        const int64_t stop = i + kSome < count ? i + kSome : count;
        for (int64_t j = i; powers && j < stop; ++j) {
            const uint32_t power = static_cast<const uint8_t*>(weight.scale)[j];
            to.add(power ? power << 23 : 0x00400000u);
        }
        for (int64_t j = i; !powers && j < stop; ++j) to.add(uint32_t{static_cast<const uint16_t*>(weight.scale)[j]} << 16);
    }
}

struct Exact : FloatSums {
    using Operand = U16;
    static constexpr int kOperands = 2, kWordBytes = 4, kLongestSegment = 256;
    static constexpr bool kTerms = true, kOnlyOneRow = false, kTiles = false, kFolds = true;
    // Whether scales are multiplied into the decoded numbers of a weight that meets `rows`, so that sums need not end with a group.
    // It has to be exact: bfloat16 must hold all products, which have no more than its eight digits and are normal numbers.
    // Scales but for e4m3 and ue5m3 have to be read for that, which takes as long as some rows; and up to some rows only groups of 16
    // have so many scales that it is faster.
    static bool folds(const Weight& weight, int64_t rows) {
        const bool known = weight.scale_type == kFloat8E4m3 || weight.scale_type == kFloat8Ue5m3;
        const int64_t few = known && weight.group <= 16 ? 16 : 64;
        if (!weight.table || weight.group == 0 || weight.scale_type < kBfloat16 || rows <= few) return false;
        const float* table = static_cast<const float*>(weight.table);
        Extent numbers, scales;
        for (int64_t i = 0; i < weight.table_bytes / 4; ++i) numbers.add(float_to_bits(table[i]));
        if (weight.scale_type == kFloat8E4m3) scales.add(0x3f900000u), scales.add(0x3b000000u), scales.add(0x43f00000u);   // 1.125, 2^-9, 480
        if (weight.scale_type == kFloat8Ue5m3) scales.add(0x3f900000u), scales.add(0x37000000u), scales.add(0x47f00000u);  // 2^-17, 122880
        if (!known) read_scales(weight, 8 - numbers.digits(), scales);
        return numbers.digits() + scales.digits() <= 8 && numbers.lowest + scales.lowest > 127 && numbers.highest + scales.highest <= 380;
    }
    static INLINE Operand scaled(const Operand& w, const F16& scale) {
        alignas(64) static const uint16_t order[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
                                                       17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
        const __m512i both = reinterpret_cast<__m512i>(w.part[0]);
        const __m512 factor = reinterpret_cast<__m512>(scale.part[0]);
        const __m512 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), factor);
        const __m512 high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000))), factor);
        Operand v;
        v.part[0] = reinterpret_cast<NativeU>(
            _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_load_si512(order), _mm512_castps_si512(high)));
        return v;
    }
    // Integers are one more table.
    static constexpr Form form(Form given) { return given == kIntegers ? kOneTable : given; }
    template <int BITS, Form FORM>
    static constexpr bool runs() {
        return FORM == kOneTable || (FORM == kTables && BITS <= 4);
    }
    template <int BITS, Form FORM>
    static constexpr int bias() {
        return 0;
    }

    // Entries of the table that registers hold: indices are of five bits at least, and codes of fewer bits repeat in them.
    template <int BITS, Form FORM>
    static constexpr int entries() {
        return BITS == 6 ? 64 : BITS <= 5 ? 32 : 256;
    }
    // Numbers of 16 bits; of 256 first all their low bytes, then all high ones.
    struct Decoder {
        __m512i part[8];
    };
    template <int BITS, Form FORM>
    static void write_decoder(const Weight& weight, uint8_t* to) {
        constexpr int kCount = entries<BITS, FORM>();
        const float* table = static_cast<const float*>(weight.table);
        const int held = FORM == kTables ? static_cast<int>(weight.table_bytes / 4) : 1 << BITS;
        for (int i = 0; i < kCount; ++i) {
            const int u = i % held;
            const uint16_t number = float_to_bfloat(table ? table[u] : static_cast<float>(u - (1 << (BITS - 1))));
            if constexpr (kCount == 256) {
                to[i] = static_cast<uint8_t>(number), to[256 + i] = static_cast<uint8_t>(number >> 8);
            } else {
                memcpy(to + 2 * i, &number, 2);
            }
        }
    }
    template <int BITS, Form FORM>
    static INLINE Decoder decoder(const uint8_t* written) {
        Decoder d;
        unroll<entries<BITS, FORM>() / 32>([&](auto i) ALWAYS { d.part[i] = _mm512_loadu_si512(written + 64 * i); });
        return d;
    }
    // A lane's picked table is added to four codes.
    static constexpr uint32_t kPickedBytes = 0x01010101u;

    // Byte BYTE, 0 low and 1 high, of the numbers of 64 codes.
    template <int BYTE>
    static INLINE __m512i plane(const Decoder& d, __m512i u, __mmask64 upper) {
        const __m512i low = _mm512_permutex2var_epi8(d.part[4 * BYTE], u, d.part[4 * BYTE + 1]);
        return _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(d.part[4 * BYTE + 2], u, d.part[4 * BYTE + 3]));
    }

    // Keeps the compiler from one instruction of three operands, which takes the place of a product on Zen 4; two of two operands do not.
    // Where one row leaves time for both, fewer are better.
    static INLINE void apart(__m512i& bits) { asm("" : "+v"(bits)); }

    template <int BITS, Form FORM, int STEP, int ROWS>
    static INLINE void weights(const Decoder& d, const uint8_t* tile, const U16& pick, Operand (&out)[kOperands]) {
        __m512i u;
        if constexpr (BITS == 4 || BITS <= 2) {
            // One limb: its neighbours are bits that an index leaves out.
            constexpr int kPer = 8 / BITS, kShift = BITS * (STEP % kPer);
            u = _mm512_srli_epi32(reinterpret_cast<__m512i>(load<U16>(tile + kVector * (STEP / kPer)).part[0]), kShift);
            if constexpr (FORM == kTables) {
                u = _mm512_and_si512(u, _mm512_set1_epi8((1 << BITS) - 1));
                if constexpr (ROWS > 1) apart(u);
                u = _mm512_or_si512(u, reinterpret_cast<__m512i>(pick.part[0]));
            }
        } else if constexpr (BITS == 3) {
            u = reinterpret_cast<__m512i>((FORM == kTables ? threes<STEP>(tile) | pick : threes<STEP>(tile)).part[0]);
        } else {
            u = reinterpret_cast<__m512i>((FORM == kTables ? quad<BITS, STEP>(tile) | pick : quad<BITS, STEP>(tile)).part[0]);
        }
        __m512i first, second;
        if constexpr (entries<BITS, FORM>() == 256) {
            const __mmask64 upper = _mm512_movepi8_mask(BITS == 7 ? _mm512_setzero_si512() : u), odd = 0xaaaaaaaaaaaaaaaaull;
            const __m512i low = plane<0>(d, u, upper), high = plane<1>(d, u, upper);
            first = _mm512_mask_blend_epi8(odd, low, _mm512_slli_epi16(high, 8));
            second = _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(low, 8), high);
        } else {
            const __m512i even = u, odd = _mm512_srli_epi32(u, 8);
            if constexpr (entries<BITS, FORM>() == 64) {
                first = _mm512_permutex2var_epi16(d.part[0], even, d.part[1]);
                second = _mm512_permutex2var_epi16(d.part[0], odd, d.part[1]);
            } else {
                first = _mm512_permutexvar_epi16(even, d.part[0]), second = _mm512_permutexvar_epi16(odd, d.part[0]);
            }
        }
        out[0].part[0] = reinterpret_cast<NativeU>(first), out[1].part[0] = reinterpret_cast<NativeU>(second);
    }

    template <Range>
    static INLINE Accumulator dot(const Accumulator& sum, const Operand& w, const uint8_t* x) {
        Accumulator v = sum;
        // One instruction, which the compiler does not make of a product and a broadcast: more of them are under way at once.
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(v.part[0]) : "v"(w.part[0]), "m"(*reinterpret_cast<const uint8_t(*)[4]>(x)));
        return v;
    }
};

}  // namespace UNIT
}  // namespace aerogel
