// Activations rounded to 8 bits, one scale a token, in one kernel: x ~ code * scale.
//
//     int8   scale = max |x| / 127, code = round(x / scale), ties to even
//     e4m3   scale = max |x| / 448, code = the nearest e4m3 number to x / scale
//
// A block takes a token and keeps 4096 columns of it in registers; what is longer is read again, from the cache: 2 bytes in
// and 1 out per number, so for 4096 tokens of 4096 a fifth of what the matmul behind it takes. (To keep more costs more than
// reading again: 2 and 4 times as much, 1.3 and 2.3 times the time, for there are fewer threads then.)
// On compute capability 9.0 the matmul behind it begins at once and fetches its weights meanwhile.
// The largest |x| is found among the bits as integers, where infinity comes after all numbers and NaN after infinity: then
// the scale is not finite, and so is whatever is multiplied with it: damage stays visible, in its own token.
//
// OUTPUT 0: int8, PERMUTED 1 in the order that `fragment8.cuh` wants: of 16 columns 4t .. 4t+3 are 2t, 2t+8, 2t+1, 2t+9.
// OUTPUT 1: e4m3. OUTPUT 2: the rounded numbers themselves, code * scale, in x's type (FP16 1: float16, 0: bfloat16).
// Columns from K to `columns` become zeros. x is contiguous in columns, each token at a multiple of 16 bytes.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 256;
constexpr float LARGEST = OUTPUT == 1 ? 448.0f : 127.0f;

struct Arguments {
    const u16* x;
    u8* codes;           // [tokens][columns] of the output's type
    float* scale;        // [tokens]
    const float* fixed;  // the scale of every token, or null
    int K, x_stride, columns;
};

__device__ float number(u32 bits) {
#if FP16
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
#else
    return __uint_as_float(bits << 16);
#endif
}
__device__ u32 rounded_bits(float value) {
    u16 h;
#if FP16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(value));
#endif
    return h;
}

// 16 columns from `column` on, two in a word, zeros beyond K.
struct Sixteen {
    u32 words[8];
    __device__ float operator[](int i) const { return number(words[i / 2] >> (16 * (i % 2)) & 0xFFFF); }
};

__device__ Sixteen read16(const Arguments& p, const u16* row, int column) {
    if (column + 16 <= p.K) {
        const uint4 low = *(const uint4*)(row + column), high = *(const uint4*)(row + column + 8);
        return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    }
    Sixteen v = {};
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (column + i < p.K) v.words[i / 2] |= (u32)row[column + i] << (16 * (i % 2));
    return v;
}

__device__ u32 largest_of_block(u32 mine) {
    __shared__ u32 found[THREADS / 32];
#pragma unroll
    for (int step = 16; step; step /= 2) mine = max(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, step));
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = mine;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) mine = max(mine, found[i]);
    return mine;
}

// x / scale, correctly rounded: from the rounded reciprocal one step with an exact remainder gives the quotient (Markstein
// 1990), where nothing leaves the range of normal numbers; elsewhere the division itself.
struct Divisor {
    float scale, reciprocal;
    bool normal;
    __device__ explicit Divisor(float by) : scale(by), reciprocal(__frcp_rn(by)), normal(by > 1e-25f && by < 1e25f) {}
    __device__ float under(float x) const {
        if (!normal) return __fdiv_rn(x, scale);
        const float near = x * reciprocal;
        return __fmaf_rn(__fmaf_rn(-near, scale, x), reciprocal, near);
    }
};

// The nearest integer, ties to even, as the low bits of a float whose units are ones.
__device__ float int8_units(float units) { return fmaxf(-127.0f, fminf(127.0f, units)) + 12582912.0f; }
__device__ u32 e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// The numbers of 16 columns over their scale, as codes.
__device__ void write16(const Arguments& p, int column, const Sixteen& v, const Divisor& by) {
    float units[16];
#pragma unroll
    for (int i = 0; i < 16; i++) units[i] = by.under(v[i]);
    const size_t at = (size_t)blockIdx.x * p.columns + column;
    u32 words[8] = {};
#if OUTPUT == 2
#pragma unroll
    for (int i = 0; i < 16; i++)
        words[i / 2] |= rounded_bits((int8_units(units[i]) - 12582912.0f) * by.scale) << (16 * (i % 2));
    ((uint4*)((u16*)p.codes + at))[0] = make_uint4(words[0], words[1], words[2], words[3]);
    ((uint4*)((u16*)p.codes + at))[1] = make_uint4(words[4], words[5], words[6], words[7]);
#else
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
#if OUTPUT == 1
        words[i / 4] |= e4m3_pair(units[i], units[i + 1]) << (8 * (i % 4));
#else
#pragma unroll
        for (int j = i; j < i + 2; j++) {
            const int from = PERMUTED ? 2 * (j / 4) + j % 4 / 2 + 8 * (j % 2) : j;
            words[j / 4] |= (__float_as_uint(int8_units(units[from])) & 255) << (8 * (j % 4));
        }
#endif
    }
    *(uint4*)(p.codes + at) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// The largest |x| so far, as bits, in the upper half of a word; what is below it decides nothing.
__device__ u32 largest_of(const Sixteen& v, u32 largest) {
#pragma unroll
    for (int i = 0; i < 8; i++) largest = max(largest, max(v.words[i] & 0x7FFF7FFF, v.words[i] << 16 & 0x7FFF0000));
    return largest;
}

__device__ void take_turns_with_neighbours() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) quantize_tokens(const __grid_constant__ Arguments p) {
    take_turns_with_neighbours();
    const u16* row = p.x + (size_t)blockIdx.x * p.x_stride;
    const int first = 16 * threadIdx.x, step = 16 * THREADS;
    const Sixteen held = read16(p, row, first);
    float scale;
    if (p.fixed) scale = *p.fixed;
    else {
        u32 largest = largest_of(held, 0);
        for (int column = first + step; column < p.K; column += step) largest = largest_of(read16(p, row, column), largest);
        largest = largest_of_block(largest >> 16);
        scale = largest ? __fdiv_rn(number(largest), LARGEST) : 1.0f;
    }
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
    const Divisor by(scale);
    if (first < p.columns) write16(p, first, held, by);
    for (int column = first + step; column < p.columns; column += step) write16(p, column, read16(p, row, column), by);
}
