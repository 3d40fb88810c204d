// Stored numbers as floats and back, one at a time and sixteen at once: float32, float16, bfloat16, signed bytes, and the small
// floats that scales are.
#pragma once
#include "vector.h"

namespace aerogel {
namespace UNIT {

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

INLINE constexpr int64_t size_of(int32_t type) { return type == kFloat32 ? 4 : 2; }

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
#elif defined(__AVX2__)
    unroll<2>([&](auto p) ALWAYS {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * p));
        v.part[p] = reinterpret_cast<NativeF>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
    });
#else
    for (int lane = 0; lane < 16; ++lane) v.part[lane / kNative][lane % kNative] = from[lane];
#endif
    return v;
}

// Sixteen signed bytes as lanes.
INLINE I16 load_lanes(const uint8_t* from) {
    I16 byte;
#if defined(__AVX512F__)
    byte.part[0] = reinterpret_cast<NativeI>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    unroll<2>([&](auto p) ALWAYS {
        byte.part[p] = reinterpret_cast<NativeI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * p))));
    });
#else
    for (int lane = 0; lane < 16; ++lane) byte.part[lane / kNative][lane % kNative] = static_cast<int8_t>(from[lane]);
#endif
    return byte;
}

// `value` in the lanes whose bit is set, zeros in the others.
INLINE U16 lanes_of(uint32_t bits, uint32_t value) {
    U16 v;
#if defined(__AVX512F__)
    v.part[0] = reinterpret_cast<NativeU>(_mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), static_cast<int>(value)));
#else
    for (int lane = 0; lane < 16; ++lane) v.part[lane / kNative][lane % kNative] = bits >> lane & 1u ? value : 0u;
#endif
    return v;
}

// Sixteen scales of eight bits as floats, of a type of ScaleType.
INLINE F16 load_small(const uint8_t* from, int32_t type) {
    const I16 byte = load_lanes(from);
    F16 v;
    unroll<kParts>([&](auto p) ALWAYS {
        const NativeU b = reinterpret_cast<NativeU>(byte.part[p]);
        if (type == kFloat8E8m0) {
            const NativeU bits = b << 24 >> 1;
            v.part[p] = reinterpret_cast<NativeF>(bits | (reinterpret_cast<NativeU>(bits == 0u) & 0x00400000u));  // 2^-127 is subnormal
        } else if (type == kFloat8E4m3) {
            // The exponent is moved by a multiplication, which takes subnormal numbers along.
            v.part[p] = reinterpret_cast<NativeF>(b << 20 & 0x87f00000u) * 0x1p120f;
        } else {
            v.part[p] = reinterpret_cast<NativeF>(b << 20 & 0x0ff00000u) * 0x1p112f;
        }
    });
    return v;
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

}  // namespace UNIT
}  // namespace aerogel
