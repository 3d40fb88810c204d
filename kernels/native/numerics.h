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
//
// Here is what they have in common. `Exact` is in exact_bfloat.h and exact_float.h, `Int8` in int8.h.
#pragma once
#include "codes.h"
#include "numbers.h"

namespace aerogel {
namespace UNIT {

// What codes may be, where that takes other instructions: up to 15, so that the sums of a tile's eight steps fit in 16 bits
// (8 * 2 * 15 * 127 = 30480); up to 127; signed bytes; signed bytes whose activations have 128 added, see Int8::moves.
enum Range { kNibbles, kBytes, kWide, kMoved };

// What codes are: integers, or numbers of one table, or of one that is picked for each scale. An arithmetic says which of them
// its loops are compiled for, `form` of the weight's own.
enum Form { kIntegers, kOneTable, kTables };

// What `weights` of an arithmetic is told of the rows that its numbers meet where these are a panel's.
constexpr int kRowsOfPanel = 16;

// Bytes that hold whatever an arithmetic keeps of a weight's tables.
constexpr int kDecoderBytes = 512;

// What an arithmetic has that applies scales to sums only.
struct NothingFolded {
    static constexpr bool kFolds = false;
    static bool folds(const Weight&, int64_t) { return false; }
};

// What an arithmetic has whose sums are floats: they hold codes of any range, as these are.
struct FloatSums {
    using Accumulator = F16;
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
    static INLINE F16 none() { return zero_f(); }
    static INLINE F16 value(const F16& sum) { return sum; }
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
};

INLINE uint32_t word_of(const uint8_t* x) {
    uint32_t word;
    memcpy(&word, x, 4);
    return word;
}

}  // namespace UNIT
}  // namespace aerogel
