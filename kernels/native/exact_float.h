// Exact activations as float32 products: see numerics.h.
#pragma once
#include "numerics.h"

namespace aerogel {
namespace UNIT {

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
};

}  // namespace UNIT
}  // namespace aerogel
