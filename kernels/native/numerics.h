// The two kinds of arithmetic, as operands and a dot product.
//
// A step of four columns gives kOperands vectors of weights; each meets 32 bits of an activation row, broadcast:
//
//     Exact, bfloat16 dot product   2 operands   two columns each; activations are split into 1 (bfloat16), 2 (float16)
//                                                or 3 (float32) bfloat16 terms whose sum is the value exactly
//     Exact, float32                4 operands   one column each
//     Int8                          1 operand    four columns of bytes
//
// Codes are small integers, which bfloat16 holds exactly, so every product is exact and only float32 sums round: scales are
// applied to sums. So does it the floats of up to 8 bits; numbers of other tables are rounded where the operands are bfloat16.
// `bias` is what was added to the signed code q and has to be taken out again, times the sum of the activations; it joins the
// zero point, so it costs nothing.
#pragma once
#include "codes.h"

namespace aerogel {
namespace UNIT {

// What codes may be, where that takes other instructions: up to 15, so that the sums of a tile's eight steps fit in 16 bits
// (8 * 2 * 15 * 127 = 30480); up to 127; signed bytes; signed bytes whose activations have 128 added, see Int8::moves.
enum Range { kNibbles, kBytes, kWide, kMoved };

// What codes are: integers, or numbers of one table, or of one that is picked for each scale. An arithmetic says which of them
// its loops are compiled for, `form` of the weight's own.
enum Form { kIntegers, kOneTable, kTables };

// Bytes that hold whatever an arithmetic keeps of a weight's tables.
constexpr int kDecoderBytes = 512;

// What an arithmetic has that applies scales to sums only.
struct NothingFolded {
    static constexpr bool kFolds = false;
    static bool folds(const Weight&, int64_t) { return false; }
};

// What an arithmetic on integers alone has in the place of tables.
struct IntegersOnly : NothingFolded {
    static constexpr Form form(Form given) { return given; }
    template <int BITS, Form FORM>
    static constexpr bool runs() {
        return FORM == kIntegers;
    }
    struct Decoder {};
    template <int BITS, Form FORM>
    static void write_decoder(const Weight&, uint8_t*) {}
    template <int BITS, Form FORM>
    static INLINE Decoder decoder(const uint8_t*) {
        return {};
    }
    template <int BITS>
    static constexpr uint32_t pick_step() {
        return 0;
    }
};

INLINE uint32_t word_of(const uint8_t* x) {
    uint32_t word;
    memcpy(&word, x, 4);
    return word;
}

#if defined(__AVX512BF16__)

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

struct Exact {
    using Accumulator = F16;
    using Operand = U16;
    static constexpr int kOperands = 2, kWordBytes = 4, kLongestSegment = 256;
    static constexpr bool kTerms = true, kOnlyOneRow = false, kTiles = false, kFolds = true;
    // Whether scales are multiplied into the decoded numbers of a weight that meets `rows`, so that sums need not end with a group.
    // It has to be exact: bfloat16 must hold all products, which have no more than its eight digits and are normal numbers.
    // Scales other than e4m3 have to be read for that, which takes as long as some rows.
    static bool folds(const Weight& weight, int64_t rows) {
        const bool known = weight.scale_type == kFloat8E4m3;
        if (!weight.table || weight.group == 0 || weight.scale_type < kBfloat16 || rows <= (known ? 16 : 64)) return false;
        const float* table = static_cast<const float*>(weight.table);
        Extent numbers, scales;
        for (int64_t i = 0; i < weight.table_bytes / 4; ++i) numbers.add(float_to_bits(table[i]));
        if (known) scales.add(0x3f900000u), scales.add(0x3b000000u), scales.add(0x43f00000u);  // 1.125, 2^-9, 480
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
        return FORM == kTables || BITS == 6 ? 64 : BITS <= 5 ? 32 : 256;
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
    // What a pick adds to the indices of a lane.
    template <int BITS>
    static constexpr uint32_t pick_step() {
        return 0x00010001u << BITS;
    }

    // Byte BYTE, 0 low and 1 high, of the numbers of 64 codes.
    template <int BYTE>
    static INLINE __m512i plane(const Decoder& d, __m512i u, __mmask64 upper) {
        const __m512i low = _mm512_permutex2var_epi8(d.part[4 * BYTE], u, d.part[4 * BYTE + 1]);
        return _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(d.part[4 * BYTE + 2], u, d.part[4 * BYTE + 3]));
    }

    template <int BITS, Form FORM, int STEP>
    static INLINE void weights(const Decoder& d, const uint8_t* tile, const U16& pick, Operand (&out)[kOperands]) {
        __m512i u;
        if constexpr (BITS == 4 || BITS == 2) {
            // One limb: its neighbours are bits that an index leaves out.
            constexpr int kPer = 8 / BITS, kShift = BITS * (STEP % kPer);
            u = _mm512_srli_epi32(reinterpret_cast<__m512i>(load<U16>(tile + kVector * (STEP / kPer)).part[0]), kShift);
        } else {
            u = reinterpret_cast<__m512i>(quad<BITS, STEP>(tile).part[0]);
        }
        __m512i first, second;
        if constexpr (entries<BITS, FORM>() == 256) {
            const __mmask64 upper = _mm512_movepi8_mask(BITS == 7 ? _mm512_setzero_si512() : u), odd = 0xaaaaaaaaaaaaaaaaull;
            const __m512i low = plane<0>(d, u, upper), high = plane<1>(d, u, upper);
            first = _mm512_mask_blend_epi8(odd, low, _mm512_slli_epi16(high, 8));
            second = _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(low, 8), high);
        } else {
            __m512i even = u, odd = _mm512_srli_epi32(u, 8);
            if constexpr (FORM == kTables) {
                const __m512i mask = _mm512_set1_epi16((1 << BITS) - 1), added = reinterpret_cast<__m512i>(pick.part[0]);
                constexpr int kAndOr = 0xea;  // (a & b) | c
                even = _mm512_ternarylogic_epi32(even, mask, added, kAndOr), odd = _mm512_ternarylogic_epi32(odd, mask, added, kAndOr);
            }
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
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(word_of(x)));
        Accumulator v;
        v.part[0] = reinterpret_cast<NativeF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum.part[0]),
                                                               reinterpret_cast<__m512bh>(w.part[0]),
                                                               reinterpret_cast<__m512bh>(pair)));
        return v;
    }
    template <int BITS>
    static constexpr Range range() {
        return kBytes;
    }
    template <int BITS>
    static constexpr bool moves() {
        return false;
    }
    template <int BITS>
    static constexpr bool signed_codes() {
        return false;
    }
    static INLINE Accumulator none() { return zero_f(); }
    static INLINE F16 value(const Accumulator& sum) { return sum; }
};

#else

struct Exact : NothingFolded {
    using Accumulator = F16;
    using Operand = F16;
    static constexpr int kOperands = 4, kWordBytes = 4, kLongestSegment = 256;
    static constexpr bool kTerms = false, kOnlyOneRow = false, kTiles = false;
    // One table is one of several.
    static constexpr Form form(Form given) { return given == kIntegers ? kIntegers : kTables; }
    template <int BITS, Form FORM>
    static constexpr bool runs() {
        return FORM != kOneTable;
    }
    template <int BITS, Form FORM>
    static constexpr int bias() {
        return FORM == kIntegers ? 1 << (BITS - 1) : 0;
    }
    struct Decoder {
        const float* table;
    };
    template <int BITS, Form FORM>
    static void write_decoder(const Weight& weight, uint8_t* to) {
        memcpy(to, &weight.table, sizeof weight.table);
    }
    template <int BITS, Form FORM>
    static INLINE Decoder decoder(const uint8_t* written) {
        Decoder d;
        memcpy(&d.table, written, sizeof d.table);
        return d;
    }
    template <int BITS>
    static constexpr uint32_t pick_step() {
        return 1u << BITS;
    }
    template <int BITS, Form FORM, int STEP>
    static INLINE void weights(const Decoder& d, const uint8_t* tile, const U16& pick, Operand (&out)[kOperands]) {
        const U16 u = quad<BITS, STEP>(tile);
        unroll<4>([&](auto j) ALWAYS {
            const U16 code = field<8 * j>(u, 0xffu);
            unroll<kParts>([&](auto p) ALWAYS {
                if constexpr (FORM == kIntegers) {
                    out[j].part[p] = __builtin_convertvector(reinterpret_cast<NativeI>(code.part[p]), NativeF);
                } else {
                    out[j].part[p] = gather(d.table, code.part[p] + pick.part[p]);
                }
            });
        });
    }
    template <Range>
    static INLINE Accumulator dot(const Accumulator& sum, const Operand& w, const uint8_t* x) {
        return multiply_add(w, spread<F16>(bits_to_float(word_of(x))), sum);
    }
    template <int BITS>
    static constexpr Range range() {
        return kBytes;
    }
    template <int BITS>
    static constexpr bool moves() {
        return false;
    }
    template <int BITS>
    static constexpr bool signed_codes() {
        return false;
    }
    static INLINE Accumulator none() { return zero_f(); }
    static INLINE F16 value(const Accumulator& sum) { return sum; }
};

#endif

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
    template <int BITS, Form FORM, int STEP>
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
