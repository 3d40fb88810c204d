// Sixteen lanes of float or of 32-bit integers, in as many registers as the instruction set needs.
//
// Everything here is compiled once per instruction set, in the unit's own namespace: an inline function that two units
// shared would be merged by the linker, and the widest version would then run on the smallest machine. For the same reason
// no function of the standard library's templates is called in these headers.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "layout.h"

// Checks of a sanitizer multiply the code of what is inlined; its build leaves the loops to the compiler.
#if defined(AEROGEL_SANITIZE)
#define ALWAYS
#else
#define ALWAYS __attribute__((always_inline))
#endif
#define INLINE inline ALWAYS

namespace aerogel {
namespace UNIT {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = 16 / kNative;

typedef float NativeF __attribute__((vector_size(4 * kNative)));
typedef int32_t NativeI __attribute__((vector_size(4 * kNative)));
typedef uint32_t NativeU __attribute__((vector_size(4 * kNative)));

// Compile-time loops: a body gets its index as a constant, so that shift counts are immediates and arrays are registers.
template <int V>
struct Const {
    constexpr operator int() const { return V; }
};
template <class F, int... I>
INLINE void unroll_each(F&& f, std::integer_sequence<int, I...>) {
    (f(Const<I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
    unroll_each(f, std::make_integer_sequence<int, N>{});
}

// The same where the body does not need its index as a constant: it is compiled once and repeated by the optimiser.
template <int N, class F>
INLINE void repeat(F&& f) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) f(i);
}

struct F16 {
    NativeF part[kParts];
};
struct U16 {
    NativeU part[kParts];
};
struct I16 {
    NativeI part[kParts];
};

template <class V, class T>
INLINE V spread(T value) {
    V v;
    // Subtracting zero changes no number, so nothing but the broadcast is left; adding it would turn -0 into 0.
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = value - decltype(v.part[0] + v.part[0]){}; });
    return v;
}

template <class V>
INLINE V load(const void* from) {
    V v;
    unroll<kParts>([&](auto p) ALWAYS { memcpy(&v.part[p], static_cast<const char*>(from) + p * 4 * kNative, 4 * kNative); });
    return v;
}

template <class V>
INLINE void store(void* to, const V& v) {
    unroll<kParts>([&](auto p) ALWAYS { memcpy(static_cast<char*>(to) + p * 4 * kNative, &v.part[p], 4 * kNative); });
}

INLINE F16 zero_f() { return spread<F16>(0.0f); }
INLINE I16 zero_i() { return spread<I16>(0); }

#define LANEWISE(V, NAME, SYMBOL)                                                           \
    INLINE V NAME(const V& a, const V& b) {                                                 \
        V v;                                                                                \
        unroll<kParts>([&](auto p) ALWAYS { v.part[p] = a.part[p] SYMBOL b.part[p]; });     \
        return v;                                                                           \
    }
LANEWISE(F16, operator+, +)
LANEWISE(F16, operator-, -)
LANEWISE(F16, operator*, *)
LANEWISE(I16, operator+, +)
LANEWISE(I16, operator-, -)
LANEWISE(I16, operator^, ^)
LANEWISE(U16, operator|, |)
#undef LANEWISE

// a * b + c, fused where the machine fuses.
INLINE F16 multiply_add(const F16& a, const F16& b, const F16& c) {
    F16 v;
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = a.part[p] * b.part[p] + c.part[p]; });
    return v;
}

// |a|; and the larger of two numbers, b where a is not a number.
INLINE F16 magnitude(const F16& a) {
    F16 v;
    unroll<kParts>([&](auto p) ALWAYS {
        v.part[p] = reinterpret_cast<NativeF>(reinterpret_cast<NativeU>(a.part[p]) & 0x7fffffffu);
    });
    return v;
}
INLINE F16 larger(const F16& a, const F16& b) {
    F16 v;
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p]; });
    return v;
}

INLINE F16 to_float(const I16& a) {
    F16 v;
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = __builtin_convertvector(a.part[p], NativeF); });
    return v;
}

// (a >> shift) & mask, lane by lane.
template <int SHIFT>
INLINE U16 field(const U16& a, uint32_t mask) {
    U16 v;
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = (a.part[p] >> SHIFT) & mask; });
    return v;
}
template <int SHIFT>
INLINE U16 shift_left(const U16& a) {
    U16 v;
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = a.part[p] << SHIFT; });
    return v;
}

// The numbers of a table, one for each lane.
INLINE NativeF gather(const float* table, const NativeU& index) {
#if defined(__AVX512F__)
    return reinterpret_cast<NativeF>(_mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4));
#elif defined(__AVX2__)
    return reinterpret_cast<NativeF>(_mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4));
#else
    NativeF v;
    for (int lane = 0; lane < kNative; ++lane) v[lane] = table[index[lane]];
    return v;
#endif
}

INLINE I16 bits_of(const F16& a) {
    I16 v;
    unroll<kParts>([&](auto p) ALWAYS { v.part[p] = reinterpret_cast<NativeI>(a.part[p]); });
    return v;
}

// The low byte of each lane.
INLINE void store_bytes(void* to, const I16& v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v.part[0])));
#else
    int32_t lanes[16];
    uint8_t bytes[16];
    store(lanes, v);
    for (int lane = 0; lane < 16; ++lane) bytes[lane] = static_cast<uint8_t>(lanes[lane]);
    memcpy(to, bytes, sizeof bytes);
#endif
}

// The largest of sixteen lanes; which of them where one is not a number is left open.
INLINE float largest_of(const F16& v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v.part[0]));
#else
    float lanes[16];
    store(lanes, v);
    for (float lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
    return lanes[0];
#endif
}

// Sum of sixteen lanes, halves first.
INLINE float total_of(const F16& v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v.part[0]));
#else
    float lanes[16];
    store(lanes, v);
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
#endif
}

// The sums of N vectors' lanes; sixteen together take three instructions each where a register holds sixteen.
template <int N>
INLINE void totals_of(const F16 (&v)[N], float (&to)[N]) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
        const auto in = [&](int i) ALWAYS { return reinterpret_cast<__m512>(v[i].part[0]); };
        __m512 pairs[8], fours[4];
        // Quarters of vectors i and i + 4; then [i, i + 4, i + 8, i + 12]; then four lanes of each to one.
        unroll<8>([&](auto i) ALWAYS {
            const __m512 a = in(i % 4 + i / 4 * 8), b = in(i % 4 + i / 4 * 8 + 4);
            pairs[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        });
        unroll<4>([&](auto i) ALWAYS {
            const __m512 a = pairs[i], b = pairs[i + 4];
            fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        });
        const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(fours[0], fours[1]), _mm512_unpackhi_ps(fours[0], fours[1]));
        const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(fours[2], fours[3]), _mm512_unpackhi_ps(fours[2], fours[3]));
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee)));
        return;
    }
#endif
    for (int i = 0; i < N; ++i) to[i] = total_of(v[i]);
}

// Reads a multiple of 256 bytes as fast as memory gives them; what comes back depends on every byte. Four quarters at a time, as
// a product reads four strips: what a machine reads ahead ends with a page, and one stream alone gets three quarters of the speed.
inline uint64_t read_all(const void* memory, int64_t bytes) {
    const char* from = static_cast<const char*>(memory);
    U16 seen[4];
    for (U16& each : seen) each = spread<U16>(0u);
    for (int64_t at = 0; at < bytes / 4; at += 64) {
        unroll<4>([&](auto i) ALWAYS { seen[i] = seen[i] | load<U16>(from + i * (bytes / 4) + at); });
    }
    uint64_t words[8];
    store(words, (seen[0] | seen[1]) | (seen[2] | seen[3]));
    for (int i = 1; i < 8; ++i) words[0] |= words[i];
    return words[0];
}

}  // namespace UNIT
}  // namespace aerogel
