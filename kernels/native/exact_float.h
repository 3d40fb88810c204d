// Exact activations as float32 products: see numerics.h.
#pragma once
#include "numerics.h"

namespace aerogel {
namespace UNIT {

// Numbers of a sign, an exponent and a mantissa, whose code is just that: decoded by arithmetic, where a gather takes longer. With
// y = (1 + f) 2^(e + b), which the magnitude's bits are in their place, a normal number is y, and a subnormal one, e = 0, is
// f 2^(1 + b) = 2 y - 2 y_0 with y_0 = 2^b. That is the smaller of the two below the least normal number, 2 y_0, and the larger from
// there on. Magnitudes from `limit` on are infinite or no numbers.
struct SmallFloat {
    uint32_t shift, base, limit;  // of a magnitude to its place; the bits of y_0
    float twice;                  // 2 y_0

    // Finds the float whose numbers are a table of 2^bits; false where there is none.
    static bool find(const float* table, int bits, SmallFloat& to) {
        const uint32_t count = 1u << (bits - 1);
        for (uint32_t normal = 1; normal < count; normal *= 2) {
            SmallFloat f{static_cast<uint32_t>(__builtin_clz(normal)) - 8u, 0, count, table[normal]};
            f.base = float_to_bits(table[normal]) - (normal << f.shift);
            while (f.limit > normal && !(table[f.limit - 1] - table[f.limit - 1] == 0.0f)) --f.limit;
            bool all = true;
            for (uint32_t code = 0; all && code < 2 * count; ++code) {
                const uint32_t wanted = float_to_bits(table[code]), found = float_to_bits(f.number(code, count));
                all = wanted == found || (table[code] != table[code] && (found & 0x7fffffffu) > 0x7f800000u);
            }
            if (all) return to = f, true;
        }
        return false;
    }
    float number(uint32_t code, uint32_t count) const {
        const uint32_t magnitude = code & (count - 1), bits = (magnitude << shift) + base;
        const float y = bits_to_float(magnitude >= limit ? bits | 0x7f800000u : bits), below = 2.0f * y - twice;
        return bits_to_float(float_to_bits(y < below ? y : below) | (code & count ? 0x80000000u : 0u));
    }
    template <int BITS>
    INLINE NativeF numbers(const NativeU& code) const {
        const NativeU magnitude = code & ((1u << (BITS - 1)) - 1), bits = (magnitude << shift) + base;
        const NativeF y = reinterpret_cast<NativeF>(bits | (reinterpret_cast<NativeU>(magnitude >= limit) & 0x7f800000u));
        const NativeF below = 2.0f * y - twice, value = y < below ? y : below;
        return reinterpret_cast<NativeF>(reinterpret_cast<NativeU>(value) | (code >> (BITS - 1)) << 31);
    }
};

struct Exact : NothingFolded, FloatSums {
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
        const float* table;  // null where `small` says its numbers
        SmallFloat small;
    };
    template <int BITS, Form FORM>
    static void write_decoder(const Weight& weight, uint8_t* to) {
        Decoder d{static_cast<const float*>(weight.table), {}};
        if (kArithmetic<BITS, FORM> && !weight.pick && SmallFloat::find(d.table, BITS, d.small)) d.table = nullptr;
        memcpy(to, &d, sizeof d);
    }
    template <int BITS, Form FORM>
    static INLINE Decoder decoder(const uint8_t* written) {
        Decoder d;
        memcpy(&d, written, sizeof d);
        return d;
    }
    // Fewer bits have lookups of bytes (lookup_kernel.h).
    template <int BITS, Form FORM>
    static constexpr bool kArithmetic = FORM == kTables && BITS > 4;
    // A lane's picked table is added to each code when it is alone in a lane.
    static constexpr uint32_t kPickedBytes = 1u;
    template <int BITS, Form FORM, int STEP, int ROWS>
    static INLINE void weights(const Decoder& d, const uint8_t* tile, const U16& pick, Operand (&out)[kOperands]) {
        const U16 u = quad<BITS, STEP>(tile);
        unroll<4>([&](auto j) ALWAYS {
            const U16 code = field<8 * j>(u, 0xffu);
            unroll<kParts>([&](auto p) ALWAYS {
                if constexpr (FORM == kIntegers) {
                    out[j].part[p] = __builtin_convertvector(reinterpret_cast<NativeI>(code.part[p]), NativeF);
                } else if (kArithmetic<BITS, FORM> && !d.table) {
                    out[j].part[p] = d.small.template numbers<BITS>(code.part[p]);
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
};

}  // namespace UNIT
}  // namespace aerogel
