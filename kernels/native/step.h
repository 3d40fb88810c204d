// The small operations between the matmuls of a decode step, norm and gate, and what attention is made of (attend.h, prompt.h).
//
// They round where the plain definitions round (aerogel/kernels/decode/ops.py): every product of a rotation, the sum of a
// residual, an activation before its product. Sums are in float32.
#pragma once
#include "numbers.h"
#include "pool.h"
#include "scratch.h"
#include "step_structs.h"

namespace aerogel {
namespace UNIT {

INLINE float rounded(float value, int32_t type) {
    if (type == kFloat16) return half_to_float(float_to_half(value));
    if (type == kBfloat16) return bits_to_float(static_cast<uint32_t>(float_to_bfloat(value)) << 16);
    return value;
}

INLINE void write_float(void* to, int64_t index, int32_t type, float value) {
    if (type == kFloat32) {
        memcpy(static_cast<char*>(to) + 4 * index, &value, 4);
        return;
    }
    const uint16_t raw = type == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
    memcpy(static_cast<char*>(to) + 2 * index, &raw, 2);
}

// `count` numbers to floats and back, sixteen at a time.
inline void to_floats(const void* from, int64_t index, int32_t type, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, load_floats(from, index + i, type));
    for (; i < count; ++i) to[i] = read_float(from, index + i, type);
}
inline void from_floats(void* to, int64_t index, int32_t type, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store_floats(to, index + i, type, from + i, 16);
    for (; i < count; ++i) write_float(to, index + i, type, from[i]);
}
inline void round_all(float* values, int32_t type, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = rounded(values[i], type);
}

// e^x for x <= 0 to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Below -87: 0.
INLINE float exponential(float x) {
    const float n = x * 1.44269504f + 12582912.0f, whole = n - 12582912.0f;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float power = bits_to_float((float_to_bits(n) - 0x4b400000u + 127u) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

// The same for sixteen.
INLINE F16 exponential(const F16& x) {
    F16 v;
    unroll<kParts>([&](auto i) ALWAYS {
        const NativeF n = x.part[i] * 1.44269504f + 12582912.0f, whole = n - 12582912.0f;
        const NativeF r = (x.part[i] - whole * 0.693359375f) + whole * 2.12194440e-4f;
        NativeF p = 1.9875691500e-4f * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const NativeF power = reinterpret_cast<NativeF>((reinterpret_cast<NativeU>(n) - 0x4b400000u + 127u) << 23);
        v.part[i] = x.part[i] < -87.0f ? NativeF{} : p * power;
    });
    return v;
}

// Sixteen lanes rounded to `type`.
INLINE F16 rounded_lanes(const F16& value, int32_t type) {
    if (type == kFloat32) return value;
    F16 v;
    if (type == kBfloat16) {
        unroll<kParts>([&](auto i) ALWAYS {
            const NativeU bits = reinterpret_cast<NativeU>(value.part[i]);
            const NativeU up = bits + 0x7fffu + (bits >> 16 & 1u), quiet = bits | 0x00400000u;
            const NativeI none = value.part[i] != value.part[i];
            v.part[i] = reinterpret_cast<NativeF>((none ? quiet : up) & 0xffff0000u);
        });
        return v;
    }
    float lanes[16];
    uint16_t raw[16];
    store(lanes, value);
    store_floats(raw, 0, type, lanes, 16);
    return load_floats(raw, 0, type);
}

// Sum of squares or of products, in a fixed order.
INLINE float inner(const float* a, const float* b, int64_t count) {
    F16 sum = zero_f();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) sum = multiply_add(load<F16>(a + i), load<F16>(b + i), sum);
    float total = total_of(sum);
    for (; i < count; ++i) total += a[i] * b[i];
    return total;
}

// x cos + [-x2, x1] sin, every product and the sum rounded.
inline void rotate(float* x, const float* cosine, const float* sine, int64_t size, int32_t type) {
    const int64_t half = size / 2;
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const F16 low = load<F16>(x + i), high = load<F16>(x + half + i);
        const F16 low_c = rounded_lanes(low * load<F16>(cosine + i), type), low_s = rounded_lanes(low * load<F16>(sine + half + i), type);
        const F16 high_c = rounded_lanes(high * load<F16>(cosine + half + i), type), high_s = rounded_lanes(high * load<F16>(sine + i), type);
        store(x + i, rounded_lanes(low_c - high_s, type));
        store(x + half + i, rounded_lanes(high_c + low_s, type));
    }
    for (; i < half; ++i) {
        const float low = x[i], high = x[half + i];
        x[i] = rounded(rounded(low * cosine[i], type) - rounded(high * sine[i], type), type);
        x[half + i] = rounded(rounded(high * cosine[half + i], type) + rounded(low * sine[half + i], type), type);
    }
}

// Rows that are worth a second thread, and how many of them a thread takes at a time.
constexpr int64_t kManyRows = 32, kRowsAtOnce = 16;

// y = norm(a + b) * weight over rows first .. stop - 1 of N; `sum` receives a + b, where there is a b.
inline void norm_rows(const Norm& n, int64_t first, int64_t stop, float* values) {
    float* other = values + n.size;
    for (int64_t row = first; row < stop; ++row) {
        to_floats(n.a, row * n.size, n.type, values, n.size);
        if (n.b) {
            to_floats(n.b, row * n.size, n.type, other, n.size);
            for (int64_t i = 0; i < n.size; ++i) values[i] += other[i];
            from_floats(n.sum, row * n.size, n.type, values, n.size);
            to_floats(n.sum, row * n.size, n.type, values, n.size);
        }
        const float scale = 1.0f / __builtin_sqrtf(inner(values, values, n.size) / static_cast<float>(n.size) + n.epsilon);
        for (int64_t i = 0; i < n.size; ++i) values[i] *= scale;
        if (n.round_first) {
            from_floats(n.y, row * n.size, n.type, values, n.size);
            to_floats(n.y, row * n.size, n.type, values, n.size);
        }
        to_floats(n.weight, 0, n.type, other, n.size);
        for (int64_t i = 0; i < n.size; ++i) values[i] *= other[i];
        from_floats(n.y, row * n.size, n.type, values, n.size);
    }
}

inline Status norm(const Norm& n) {
    const int threads = n.rows < kManyRows || n.threads < 1 ? 1 : n.threads;
    const size_t each = (2 * static_cast<size_t>(n.size) + 15) / 16 * 16;
    float* memory = static_cast<float*>(scratch(kStepScratch, sizeof(float) * each * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    parallel(ceil_div(n.rows, kRowsAtOnce), threads, [&](int64_t piece, int worker) {
        const int64_t first = piece * kRowsAtOnce, stop = first + kRowsAtOnce;
        norm_rows(n, first, stop < n.rows ? stop : n.rows, memory + each * static_cast<size_t>(worker));
    });
    return kDone;
}

// round(silu(g)) * u.
INLINE F16 gated(const F16& g, const F16& u, int32_t type) {
    const F16 e = exponential(zero_f() - magnitude(g));  // of the size's negative: never overflows
    F16 act;
    unroll<kParts>([&](auto i) ALWAYS {
        act.part[i] = (g.part[i] >= 0.0f ? g.part[i] : g.part[i] * e.part[i]) / (1.0f + e.part[i]);
    });
    return rounded_lanes(act, type) * u;
}

// Over rows first .. stop - 1, whose distances differ, since both are halves of one result.
inline void gate_rows(const Gate& p, int64_t first, int64_t stop) {
    float out[16];
    for (int64_t row = first; row < stop; ++row) {
        const int64_t g = row * p.g_stride, u = row * p.u_stride, y = row * p.size;
        int64_t at = 0;
        for (; at + 16 <= p.size; at += 16) {
            store(out, gated(load_floats(p.g, g + at, p.type), load_floats(p.u, u + at, p.type), p.type));
            store_floats(p.y, y + at, p.type, out, 16);
        }
        if (at < p.size) {
            float last[2][16] = {};
            to_floats(p.g, g + at, p.type, last[0], p.size - at);
            to_floats(p.u, u + at, p.type, last[1], p.size - at);
            store(out, gated(load<F16>(last[0]), load<F16>(last[1]), p.type));
            from_floats(p.y, y + at, p.type, out, p.size - at);
        }
    }
}

inline Status gate(const Gate& p) {
    parallel(ceil_div(p.rows, kRowsAtOnce), p.rows < kManyRows || p.threads < 1 ? 1 : p.threads, [&](int64_t piece, int) {
        const int64_t first = piece * kRowsAtOnce, stop = first + kRowsAtOnce;
        gate_rows(p, first, stop < p.rows ? stop : p.rows);
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
