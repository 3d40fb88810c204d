// A token's activations brought to 8 bits: what `quantize.cu` does with what is there, and `quantize_made.cu` where it is made.
//
//     int8   scale = max |x| / 127, code = round(x / scale), ties to even
//     e4m3   scale = max |x| / 448, code = the nearest e4m3 number to x / scale
//
// The largest |x| is found among the bits as integers, where infinity comes after all numbers and NaN after infinity: then
// the scale is not finite, and so is whatever is multiplied with it: damage stays visible, in its own token.
//
// Set from outside: FP16, the type of x. OUTPUT 0: int8, PERMUTED 1 in the order that `fragment8.cuh` wants: of 16 columns
// 4t .. 4t+3 are 2t, 2t+8, 2t+1, 2t+9. OUTPUT 1: e4m3. OUTPUT 2: the rounded numbers themselves, code * scale, in x's type.

#pragma once
#include "pieces.cuh"

constexpr float LARGEST = OUTPUT == 1 ? 448.0f : 127.0f;
constexpr float ONES_IN_LOW_BITS = 12582912.0f;  // 1.5 * 2^23: to add it rounds to an integer, which the low bits then hold

typedef Piece<16> Sixteen;

// The larger of both halves.
INLINE u32 larger_halves(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    asm("max.u16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
#else
    return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16;
#endif
}

// The largest |x| so far, as bits: of even columns in the lower half, of odd ones in the upper half.
INLINE u32 largest_of(const Sixteen& v, u32 largest) {
UNROLL
    for (int i = 0; i < 8; i++) largest = larger_halves(largest, v.words[i] & 0x7FFF7FFF);
    return largest;
}

// The largest of all threads' numbers, for a block of WARPS warps; once in a kernel.
template <int WARPS> INLINE u32 largest_of_block(u32 mine) {
    __shared__ u32 found[WARPS];
    mine = max(mine >> 16, mine & 0xFFFF);
UNROLL
    for (int step = 16; step; step /= 2) mine = max(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, step));
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = mine;
    __syncthreads();
UNROLL
    for (int i = 0; i < WARPS; i++) mine = max(mine, found[i]);
    return mine;
}

// The scale of a token whose largest |x| has these bits.
INLINE float scale_of(u32 largest) { return largest ? __fdiv_rn(from_half((u16)largest), LARGEST) : 1.0f; }

// x over a scale, correctly rounded: from the rounded reciprocal one step with an exact remainder gives the quotient (Markstein
// 1990), where nothing leaves the range of normal numbers; elsewhere both are brought there first. Where the scale was made for
// the numbers, no quotient is beyond LARGEST; a stored scale was not.
struct Divisor {
    float scale, shift, shifted, reciprocal;
    bool normal, made_for_them;
    INLINE Divisor(float by, bool made) : scale(by), normal(by > 1e-25f && by < 1e25f), made_for_them(made) {
        shift = normal ? 1.0f : by < 1.0f ? 0x1p64f : 0x1p-64f;
        shifted = by * shift, reciprocal = __frcp_rn(shifted);
    }

    template <bool NORMAL> INLINE float under(float x) const {
        if (!NORMAL) x *= shift;
        const float near = x * reciprocal;
        return __fmaf_rn(__fmaf_rn(-near, shifted, x), reciprocal, near);
    }
    // The nearest integer, ties to even, in the low bits.
    template <bool NORMAL, bool BOUNDED> INLINE float int8_under(float x) const {
        const float units = under<NORMAL>(x);
        return (BOUNDED ? units : fmaxf(-127.0f, fminf(127.0f, units))) + ONES_IN_LOW_BITS;
    }
};

INLINE u32 e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
INLINE u32 low_bytes(float a, float b, float c, float d) {
    const u32 ab = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
    return __byte_perm(ab, __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040), 0x5410);
}

template <bool NORMAL, bool BOUNDED> INLINE void write16_as(u8* codes, size_t at, const Sixteen& v, const Divisor& by) {
#if OUTPUT == 2
    Sixteen back;
UNROLL
    for (int i = 0; i < 8; i++) {
        const float low = by.int8_under<NORMAL, BOUNDED>(v[2 * i]), high = by.int8_under<NORMAL, BOUNDED>(v[2 * i + 1]);
        back.words[i] = to_pair((low - ONES_IN_LOW_BITS) * by.scale, (high - ONES_IN_LOW_BITS) * by.scale);
    }
    write_piece((u16*)codes + at, 0, 16, true, back);
#else
    u32 words[4];
UNROLL
    for (int i = 0; i < 4; i++) {
#if OUTPUT == 1
        words[i] = e4m3_pair(by.under<NORMAL>(v[4 * i]), by.under<NORMAL>(v[4 * i + 1])) |
                   e4m3_pair(by.under<NORMAL>(v[4 * i + 2]), by.under<NORMAL>(v[4 * i + 3])) << 16;
#else
        float units[4];
UNROLL
        for (int j = 0; j < 4; j++)
            units[j] = by.int8_under<NORMAL, BOUNDED>(v[PERMUTED ? 2 * i + j / 2 + 8 * (j % 2) : 4 * i + j]);
        words[i] = low_bytes(units[0], units[1], units[2], units[3]);
#endif
    }
    *(uint4*)(codes + at) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// The numbers of 16 columns over their scale, as codes; `at` counts numbers of the output.
INLINE void write16(u8* codes, size_t at, const Sixteen& v, const Divisor& by) {
    if (!by.normal) write16_as<false, false>(codes, at, v, by);
    else if (by.made_for_them) write16_as<true, true>(codes, at, v, by);
    else write16_as<true, false>(codes, at, v, by);
}
