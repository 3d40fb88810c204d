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

}  // namespace UNIT
}  // namespace aerogel
