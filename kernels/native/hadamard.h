// y = x D H in runs of `block` inputs, the fast Walsh-Hadamard transform: log2(block) additions a number instead of `block` products.
//
// H of Sylvester's order is a Kronecker product of [1 1; 1 -1], one factor for each binary digit of an index, in any order. Digits
// that name a vector are sums and differences of two vectors; of the four that name a lane, each is one exchange of lanes and one
// product with signs, which is exact. Four vectors stay in registers; digits above them pass through memory once each.
//
// Instructions for sixteen numbers on AVX-512 with blocks of 64: 10 for the transform, 16 for signs and 16-bit numbers.
#pragma once
#include "numbers.h"
#include "pool.h"
#include "scratch.h"
#include "step_structs.h"

namespace aerogel {
namespace UNIT {

// Numbers that are worth a second thread, and how many of them a thread takes at a time.
constexpr int64_t kManyTurned = 16384, kTurnedAtOnce = 4096;
// Numbers whose transform stays in registers.
constexpr int kTurnedHeld = 64;

// Lane i of the result is lane i ^ S.
template <int S>
INLINE NativeF exchanged(const NativeF& v) {
#if defined(__AVX512F__)
    const __m512 a = reinterpret_cast<__m512>(v);
    if constexpr (S >= 4) return reinterpret_cast<NativeF>(_mm512_shuffle_f32x4(a, a, S == 8 ? 0x4e : 0xb1));
    return reinterpret_cast<NativeF>(_mm512_permute_ps(a, S == 2 ? 0x4e : 0xb1));
#elif defined(__AVX2__)
    const __m256 a = reinterpret_cast<__m256>(v);
    if constexpr (S == 4) return reinterpret_cast<NativeF>(_mm256_permute2f128_ps(a, a, 1));
    return reinterpret_cast<NativeF>(_mm256_permute_ps(a, S == 2 ? 0x4e : 0xb1));
#else
    NativeF w;
    for (int lane = 0; lane < kNative; ++lane) w[lane] = v[lane ^ S];
    return w;
#endif
}

// The factor of the digit S of a lane.
template <int S>
INLINE void turn_lanes(F16& v) {
    if constexpr (S >= kNative) {
        constexpr int kFar = S / kNative;
        unroll<kParts>([&](auto p) ALWAYS {
            if constexpr ((p & kFar) == 0) {
                const NativeF low = v.part[p], high = v.part[p + kFar];
                v.part[p] = low + high, v.part[p + kFar] = low - high;
            }
        });
    } else {
        NativeF sign;
        for (int lane = 0; lane < kNative; ++lane) sign[lane] = lane & S ? -1.0f : 1.0f;
        unroll<kParts>([&](auto p) ALWAYS { v.part[p] = v.part[p] * sign + exchanged<S>(v.part[p]); });
    }
}

// Factors of `span` lanes, at most sixteen.
INLINE void turn_lanes(F16& v, int64_t span) {
    if (span > 8) turn_lanes<8>(v);
    if (span > 4) turn_lanes<4>(v);
    if (span > 2) turn_lanes<2>(v);
    if (span > 1) turn_lanes<1>(v);
}

INLINE void turn_pair(F16& low, F16& high) {
    const F16 a = low;
    low = a + high, high = a - high;
}

// Sixteen inputs under their signs.
INLINE F16 signed_inputs(const Hadamard& h, int64_t at, int64_t column) {
    return load_floats(h.x, at, h.type) * load_bytes(h.signs + column);
}

// The digits that stay in registers, of COUNT vectors that lie side by side, `at` numbers into y: of `values` where they are given, else
// of the inputs.
template <int COUNT>
INLINE void turn_piece(const Hadamard& h, int64_t at, int64_t column, const F16& unit, const float* values) {
    F16 v[COUNT];
    float lanes[16];
    repeat<COUNT>([&](int i) ALWAYS { v[i] = values ? load<F16>(values + 16 * i) : signed_inputs(h, at + 16 * i, column + 16 * i); });
    for (int far = COUNT / 2; far > 0; far /= 2) {
        repeat<COUNT>([&](int i) ALWAYS {
            if ((i & far) == 0) turn_pair(v[i], v[i + far]);
        });
    }
    repeat<COUNT>([&](int i) ALWAYS {
        turn_lanes(v[i], 16);
        store(lanes, v[i] * unit);
        store_floats(h.y, at + 16 * i, h.type, lanes, 16);
    });
}

// The digits of 64 and more of one run, in memory.
inline void turn_far(float* values, int64_t block) {
    for (int64_t far = block / 2; far >= kTurnedHeld; far /= 2) {
        for (int64_t begin = 0; begin < block; begin += 2 * far) {
            for (int64_t i = begin; i < begin + far; i += 16) {
                F16 low = load<F16>(values + i), high = load<F16>(values + i + far);
                turn_pair(low, high);
                store(values + i, low), store(values + i + far, high);
            }
        }
    }
}

// A run of 128 or more, with room for it.
inline void turn_long(const Hadamard& h, int64_t at, int64_t column, const F16& unit, float* values) {
    for (int64_t i = 0; i < h.block; i += 16) store(values + i, signed_inputs(h, at + i, column + i));
    turn_far(values, h.block);
    for (int64_t i = 0; i < h.block; i += kTurnedHeld) turn_piece<kTurnedHeld / 16>(h, at + i, column + i, unit, values + i);
}

// Runs of up to 8 that share a vector, `count` numbers of it.
inline void turn_short(const Hadamard& h, int64_t at, int64_t column, const F16& unit, int64_t count) {
    float lanes[16] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = read_float(h.x, at + i, h.type) * h.signs[column + i];
    F16 v = load<F16>(lanes);
    turn_lanes(v, h.block);
    store(lanes, v * unit);
    store_floats(h.y, at, h.type, lanes, static_cast<int>(count));
}

// One row; `values` holds a run of 128 or more.
inline void turn_row(const Hadamard& h, int64_t row, float* values) {
    const int64_t from = row * h.size, step = h.block < 16 ? 16 : h.block;
    const F16 unit = spread<F16>(1.0f / __builtin_sqrtf(static_cast<float>(h.block)));
    for (int64_t column = 0; column < h.size; column += step) {
        const int64_t at = from + column, left = h.size - column;
        if (h.block == 64) {
            turn_piece<4>(h, at, column, unit, nullptr);
        } else if (h.block == 32) {
            turn_piece<2>(h, at, column, unit, nullptr);
        } else if (h.block == 16) {
            turn_piece<1>(h, at, column, unit, nullptr);
        } else if (h.block < 16) {
            turn_short(h, at, column, unit, left < 16 ? left : 16);
        } else {
            turn_long(h, at, column, unit, values);
        }
    }
}

inline Status hadamard(const Hadamard& h) {
    const int threads = h.rows * h.size < kManyTurned || h.threads < 1 ? 1 : h.threads;
    const size_t each = static_cast<size_t>(h.block > kTurnedHeld ? h.block : 16);
    float* memory = static_cast<float*>(scratch(kStepScratch, sizeof(float) * each * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    const int64_t together = ceil_div(kTurnedAtOnce, h.size);
    parallel(ceil_div(h.rows, together), threads, [&](int64_t piece, int worker) {
        const int64_t stop = (piece + 1) * together;
        for (int64_t row = piece * together; row < (stop < h.rows ? stop : h.rows); ++row) {
            turn_row(h, row, memory + each * static_cast<size_t>(worker));
        }
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
