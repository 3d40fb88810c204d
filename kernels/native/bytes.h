// Operations on bytes in runs of 128 bits, in as many registers as the instruction set needs: lookups in tables of 16 bytes.
//
// A run is the unit in which every instruction set can look bytes up, so each run has its own table and the four runs of
// sixteen lanes belong to four rows.
#pragma once
#include "codes.h"

namespace aerogel {
namespace UNIT {

// What a loop does with a register of codes. Where lookups are loops themselves it is a function: inlined everywhere it would take
// minutes to compile.
#if defined(__AVX2__) || defined(__aarch64__)
#define LOOKUP_STEP static INLINE
#else
#define LOOKUP_STEP static __attribute__((noinline))
#endif

#if defined(__AVX512F__)
using Raw = __m512i;
#elif defined(__AVX2__)
using Raw = __m256i;
#elif !defined(__aarch64__)
struct Raw {
    uint8_t byte[16];
};
INLINE Raw raw(const NativeU& v) {
    Raw r;
    memcpy(&r, &v, 16);
    return r;
}
INLINE NativeU words(const Raw& r) {
    NativeU v;
    memcpy(&v, &r, 16);
    return v;
}
#endif
#if defined(__AVX2__)
INLINE Raw raw(const NativeU& v) { return reinterpret_cast<Raw>(v); }
INLINE NativeU words(const Raw& r) { return reinterpret_cast<NativeU>(r); }
#endif

// Codes as indices of `look_up`: what that does not look at may be anything.
template <int BITS, int STEP>
INLINE U16 indices(const uint8_t* tile) {
#if defined(__AVX2__)
    if constexpr (BITS == 3) return threes<STEP>(tile);
#endif
    return quad<BITS, STEP>(tile);
}

// table[index] byte by byte within runs; an index lies below 16, but for bits 4 to 6 on x86.
INLINE NativeU look_up(const NativeU& table, const NativeU& index) {
#if defined(__AVX512F__)
    return words(_mm512_shuffle_epi8(raw(table), raw(index)));
#elif defined(__AVX2__)
    return words(_mm256_shuffle_epi8(raw(table), raw(index)));
#elif defined(__aarch64__)
    return reinterpret_cast<NativeU>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(table), reinterpret_cast<uint8x16_t>(index)));
#else
    const Raw from = raw(table), at = raw(index);
    Raw found;
    for (int i = 0; i < 16; ++i) found.byte[i] = from.byte[at.byte[i] & 15];
    return words(found);
#endif
}

// Elements of SIZE bytes of the low (or high) halves of every run, one from `a`, one from `b`, in turn.
template <int SIZE, bool HIGH>
INLINE NativeU in_turn(const NativeU& a, const NativeU& b) {
#if defined(__AVX512F__)
    if constexpr (SIZE == 1) return words(HIGH ? _mm512_unpackhi_epi8(raw(a), raw(b)) : _mm512_unpacklo_epi8(raw(a), raw(b)));
    return words(HIGH ? _mm512_unpackhi_epi16(raw(a), raw(b)) : _mm512_unpacklo_epi16(raw(a), raw(b)));
#elif defined(__AVX2__)
    if constexpr (SIZE == 1) return words(HIGH ? _mm256_unpackhi_epi8(raw(a), raw(b)) : _mm256_unpacklo_epi8(raw(a), raw(b)));
    return words(HIGH ? _mm256_unpackhi_epi16(raw(a), raw(b)) : _mm256_unpacklo_epi16(raw(a), raw(b)));
#elif defined(__aarch64__)
    const uint8x16_t low = reinterpret_cast<uint8x16_t>(a), high = reinterpret_cast<uint8x16_t>(b);
    if constexpr (SIZE == 1) return reinterpret_cast<NativeU>(HIGH ? vzip2q_u8(low, high) : vzip1q_u8(low, high));
    const uint16x8_t left = reinterpret_cast<uint16x8_t>(a), right = reinterpret_cast<uint16x8_t>(b);
    return reinterpret_cast<NativeU>(HIGH ? vzip2q_u16(left, right) : vzip1q_u16(left, right));
#else
    const Raw left = raw(a), right = raw(b);
    Raw found;
    for (int i = 0; i < 8; ++i) {
        const int from = i / SIZE * SIZE, part = i % SIZE, to = 2 * from + part;
        found.byte[to] = left.byte[i + (HIGH ? 8 : 0)];
        found.byte[to + SIZE] = right.byte[i + (HIGH ? 8 : 0)];
    }
    return words(found);
#endif
}

// sum + the products of two neighbouring numbers of 16 bits.
INLINE NativeI dot_pairs(const NativeI& sum, const NativeU& a, const NativeU& b) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<NativeI>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), raw(a), raw(b)));
#elif defined(__AVX2__)
    return sum + reinterpret_cast<NativeI>(_mm256_madd_epi16(raw(a), raw(b)));
#elif defined(__aarch64__)
    const int16x8_t left = reinterpret_cast<int16x8_t>(a), right = reinterpret_cast<int16x8_t>(b);
    const int32x4_t low = vmull_s16(vget_low_s16(left), vget_low_s16(right)), high = vmull_high_s16(left, right);
    return sum + reinterpret_cast<NativeI>(vpaddq_s32(low, high));
#else
    const NativeI left = reinterpret_cast<const NativeI&>(a), right = reinterpret_cast<const NativeI&>(b);
    return sum + ((left << 16) >> 16) * ((right << 16) >> 16) + (left >> 16) * (right >> 16);
#endif
}

// Keeps the compiler from adding products up in another order, for which more of them have to be kept than there are registers.
template <class Sum>
INLINE void in_this_order(Sum& sum) {
#if defined(__AVX2__)
    asm("" : "+v"(sum));
#else
    (void)sum;
#endif
}

// The same 16 bytes in every run.
INLINE NativeU every_run(const void* from) {
#if defined(__AVX512F__)
    return words(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return words(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
    NativeU v;
    memcpy(&v, from, 16);
    return v;
#endif
}

#if defined(__AVX2__)
// All four runs of the first two and the last two.
INLINE U16 joined(__m256i low, __m256i high) {
    U16 v;
#if defined(__AVX512F__)
    v.part[0] = words(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
    v.part[0] = words(low), v.part[1] = words(high);
#endif
    return v;
}
#endif

// Sixteen bytes of its own for each of the four runs.
INLINE U16 four_runs(const uint8_t* const (&from)[4]) {
#if defined(__AVX2__)
    __m128i run[4];
    for (int i = 0; i < 4; ++i) run[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
    return joined(_mm256_set_m128i(run[1], run[0]), _mm256_set_m128i(run[3], run[2]));
#else
    U16 v;
    for (int i = 0; i < 4; ++i) memcpy(&v.part[i], from[i], 16);
    return v;
#endif
}

// 32 bytes of its own for the first two runs, and for the last two.
INLINE U16 two_halves(const uint8_t* first, const uint8_t* second) {
#if defined(__AVX2__)
    return joined(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
#else
    const uint8_t* const run[4] = {first, first + 16, second, second + 16};
    return four_runs(run);
#endif
}

}  // namespace UNIT
}  // namespace aerogel
