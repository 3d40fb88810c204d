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

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// One number of 16 bits to float and back, without instructions that not every machine has.
INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent is moved by a multiplication, which takes subnormal numbers along.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 makes the hardware round at the right place
        const float shifted = bits_to_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}
INLINE uint16_t float_to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

INLINE int64_t size_of(int32_t type) { return type == kFloat32 ? 4 : 2; }

INLINE float read_float(const void* from, int64_t index, int32_t type) {
    if (type == kFloat32) {
        float value;
        memcpy(&value, static_cast<const char*>(from) + 4 * index, 4);
        return value;
    }
    uint16_t raw;
    memcpy(&raw, static_cast<const char*>(from) + 2 * index, 2);
    return type == kFloat16 ? half_to_float(raw) : bits_to_float(static_cast<uint32_t>(raw) << 16);
}

// Sixteen numbers of any type as floats. Without instructions for it that is too much code to repeat wherever it is called.
#if defined(__AVX2__)
INLINE
#else
inline __attribute__((noinline))
#endif
F16 load_floats(const void* from, int64_t index, int32_t type) {
    if (type == kFloat32) return load<F16>(static_cast<const char*>(from) + 4 * index);
    const char* raw = static_cast<const char*>(from) + 2 * index;
    F16 v;
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw));
    if (type == kFloat16) {
        v.part[0] = reinterpret_cast<NativeF>(_mm512_cvtph_ps(bits));
    } else {
        v.part[0] = reinterpret_cast<NativeF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
#elif defined(__AVX2__)
    unroll<2>([&](auto p) ALWAYS {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(raw + 16 * p));
        if (type == kFloat16) {
            v.part[p] = reinterpret_cast<NativeF>(_mm256_cvtph_ps(bits));
        } else {
            v.part[p] = reinterpret_cast<NativeF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        }
    });
#else
    for (int lane = 0; lane < 16; ++lane) v.part[lane / kNative][lane % kNative] = read_float(raw, lane, type);
#endif
    return v;
}

// Sixteen signed bytes as floats.
INLINE F16 load_bytes(const int8_t* from) {
    F16 v;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    v.part[0] = reinterpret_cast<NativeF>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#else
    for (int lane = 0; lane < 16; ++lane) v.part[lane / kNative][lane % kNative] = from[lane];
#endif
    return v;
}

// Sixteen bytes as lanes.
INLINE U16 load_lanes(const uint8_t* from) {
    U16 byte;
#if defined(__AVX512F__)
    byte.part[0] = reinterpret_cast<NativeU>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    for (int lane = 0; lane < 16; ++lane) byte.part[lane / kNative][lane % kNative] = from[lane];
#endif
    return byte;
}

// Sixteen scales of eight bits as floats, of a type of ScaleType.
INLINE F16 load_small(const uint8_t* from, int32_t type) {
    const U16 byte = load_lanes(from);
    F16 v;
    unroll<kParts>([&](auto p) ALWAYS {
        const NativeU b = byte.part[p];
        if (type == kFloat8E8m0) {
            const NativeU bits = b << 23;
            v.part[p] = reinterpret_cast<NativeF>(bits | (reinterpret_cast<NativeU>(b == 0u) & 0x00400000u));  // 2^-127 is subnormal
        } else {
            // The exponent is moved by a multiplication, which takes subnormal numbers along.
            v.part[p] = reinterpret_cast<NativeF>((b & 0x80u) << 24 | (b & 0x7fu) << 20) * 0x1p120f;
        }
    });
    return v;
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

// Sixteen floats rounded to bfloat16, ties to even; what is not a number stays so.
INLINE void to_bfloats(const float* from, uint16_t* to) {
#if defined(__AVX512F__)
    const __m512 value = _mm512_loadu_ps(from);
    const __m512i bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, none, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
#elif defined(__AVX2__)
    __m256i half[2];
    for (int i = 0; i < 2; ++i) {
        const __m256 value = _mm256_loadu_ps(from + 8 * i);
        const __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        half[i] = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), none);
    }
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), both);
#else
    for (int lane = 0; lane < 16; ++lane) to[lane] = float_to_bfloat(from[lane]);
#endif
}

// The first `count` of sixteen floats, rounded to `type`.
INLINE void store_floats(void* to, int64_t index, int32_t type, const float* from, int count) {
    if (type == kFloat32) {
        memcpy(static_cast<char*>(to) + 4 * index, from, 4 * static_cast<size_t>(count));
        return;
    }
    uint16_t raw[16];
    if (type == kFloat16) {
#if defined(__F16C__)
        for (int lane = 0; lane < 16; lane += 8) {
            const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + lane), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(raw + lane), rounded);
        }
#else
        for (int lane = 0; lane < 16; ++lane) raw[lane] = float_to_half(from[lane]);
#endif
    } else {
        to_bfloats(from, raw);
    }
    char* at = static_cast<char*>(to) + 2 * index;
    if (count == 16) {
        memcpy(at, raw, sizeof raw);  // of a size known here: no call
    } else {
        memcpy(at, raw, 2 * static_cast<size_t>(count));
    }
}

// Reads a multiple of 256 bytes as fast as memory gives them; what comes back depends on every byte.
inline uint64_t read_all(const void* memory, int64_t bytes) {
    const char* from = static_cast<const char*>(memory);
    U16 seen[4];
    for (U16& each : seen) each = spread<U16>(0u);
    for (int64_t at = 0; at < bytes; at += 256) {
        unroll<4>([&](auto i) ALWAYS { seen[i] = seen[i] | load<U16>(from + at + 64 * i); });
    }
    uint64_t words[8];
    store(words, (seen[0] | seen[1]) | (seen[2] | seen[3]));
    for (int i = 1; i < 8; ++i) words[0] |= words[i];
    return words[0];
}

}  // namespace UNIT
}  // namespace aerogel
