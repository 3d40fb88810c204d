// Codes out of a tile: for one step, four columns of sixteen rows, one code per byte.
//
//     4 bits:  (v >> 4 * (step % 2)) & 0x0f0f0f0f, v the vector of steps step / 2 * 2 ..
//     3 bits:  two bits of one vector, or-ed with one bit of another
//
// Steps and shifts are compile-time constants, so a load that two steps share is done once.
#pragma once
#include "vector.h"

namespace aerogel {
namespace UNIT {

// One limb of `WIDTH` bits that begins at byte BEGIN of a tile and is worth 2^VALUE.
template <int WIDTH, int BEGIN, int VALUE, int STEP>
INLINE U16 limb(const uint8_t* tile) {
    constexpr int kPer = 8 / WIDTH, kShift = WIDTH * (STEP % kPer);
    constexpr uint32_t kMask = ((1u << WIDTH) - 1) * 0x01010101u;
    const U16 v = load<U16>(tile + BEGIN + kVector * (STEP / kPer));
    // The mask cuts what a shift brings over from the neighbouring byte, so it is applied where the field will stand.
    if constexpr (WIDTH == 8) return v;
    if constexpr (kShift >= VALUE) return field<kShift - VALUE>(v, kMask << VALUE);
    if constexpr (kShift < VALUE) return field<0>(shift_left<VALUE - kShift>(v), kMask << VALUE);
}

template <int BITS>
constexpr int tile_bytes() {
    return kVector * BITS;
}

// Codes u of columns 4 * STEP .. 4 * STEP + 3, byte j of lane i: row i, column j.
template <int BITS, int STEP>
INLINE U16 quad(const uint8_t* tile) {
    if constexpr (BITS == 8) return limb<8, 0, 0, STEP>(tile);
    if constexpr (BITS == 7) {
        return limb<4, 0, 0, STEP>(tile) | limb<2, 256, 4, STEP>(tile) | limb<1, 384, 6, STEP>(tile);
    }
    if constexpr (BITS == 6) return limb<4, 0, 0, STEP>(tile) | limb<2, 256, 4, STEP>(tile);
    if constexpr (BITS == 5) return limb<4, 0, 0, STEP>(tile) | limb<1, 256, 4, STEP>(tile);
    if constexpr (BITS == 4) return limb<4, 0, 0, STEP>(tile);
    if constexpr (BITS == 3) return limb<2, 0, 0, STEP>(tile) | limb<1, 128, 2, STEP>(tile);
    if constexpr (BITS == 2) return limb<2, 0, 0, STEP>(tile);
    if constexpr (BITS == 1) return limb<1, 0, 0, STEP>(tile);
}

// `quad` of three bits, but for bits 4 to 6 of each byte, which may be anything. Two steps share a mask of each limb, whose bits lie four
// apart, and nothing is combined with two others at once, which takes the place of a product on Zen 4.
template <int STEP>
INLINE U16 threes(const uint8_t* tile) {
    constexpr int kSecond = STEP % 4 / 2 * 4, kTo = STEP - 2;
    const U16 low = field<2 * (STEP % 2)>(load<U16>(tile + kVector * (STEP / 4)), 0x33333333u);
    const U16 high = field<0>(load<U16>(tile + 2 * kVector), 0x11111111u << STEP % 4);
    if constexpr (kTo < 0) return field<kSecond>(low, ~0u) | shift_left<-kTo>(high);
    if constexpr (kTo >= 0) return field<kSecond>(low, ~0u) | field<kTo>(high, ~0u);
}

// Distances 0 to 7 for all lanes. From memory a shift is one instruction, by a number in a general register three.
#define ALL_LANES(n) {n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n}
alignas(64) static const uint32_t kShifts[8][16] = {ALL_LANES(0), ALL_LANES(1), ALL_LANES(2), ALL_LANES(3),
                                                    ALL_LANES(4), ALL_LANES(5), ALL_LANES(6), ALL_LANES(7)};
#undef ALL_LANES

// A tile whose first steps are those of one of its PIECES: a part of it, or where limbs share vectors, of octets what is written to `moved`.
template <int BITS, int PIECES>
INLINE const uint8_t* piece_codes(const uint8_t* tile, int64_t piece, uint8_t (&moved)[tile_bytes<BITS>()]) {
    static_assert(BITS == 4 || PIECES == 4, "only codes of four bits are taken in other pieces than octets");
    if constexpr (BITS == 4) return tile + kVector * 4 / PIECES * piece;
    int begin = 0;
    unroll<4>([&](auto limb) ALWAYS {
        constexpr int kWidth = 8 >> limb, kPer = 8 / kWidth;  // steps of a vector
        if constexpr (BITS == 8 ? kWidth == 8 : kWidth < 8 && (BITS & kWidth) != 0) {
            const int64_t step = 2 * piece;
            const U16 v = load<U16>(tile + begin + kVector * (step / kPer));
            const U16 distance = load<U16>(kShifts[kWidth * (step % kPer)]);
            U16 shifted;
            unroll<kParts>([&](auto p) ALWAYS { shifted.part[p] = v.part[p] >> distance.part[p]; });
            store(moved + begin, shifted);
            if constexpr (kPer == 1) store(moved + begin + kVector, load<U16>(tile + begin + kVector * (step + 1)));
            begin += kVector * kWidth;
        }
    });
    return moved;
}

}  // namespace UNIT
}  // namespace aerogel
