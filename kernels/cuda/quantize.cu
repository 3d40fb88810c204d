// Activations rounded to 8 bits, one scale a token, in one kernel: x ~ code * scale.
//
//     int8   scale = max |x| / 127, code = round(x / scale), ties to even
//     e4m3   scale = max |x| / 448, code = the nearest e4m3 number to x / scale
//
// A block takes a token and reads it twice, the second time from the cache: 2 bytes in and 1 out per number, so for 4096
// tokens of 4096 a tenth of what the matmul behind it takes. A given scale (FIXED) saves the first reading.
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

// 16 columns from `column` on, zeros beyond K.
__device__ void read16(const Arguments& p, const u16* row, int column, u32 (&v)[16]) {
    if (column + 16 <= p.K) {
        const uint4 low = *(const uint4*)(row + column), high = *(const uint4*)(row + column + 8);
        const u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = words[i / 2] >> (16 * (i % 2)) & 0xFFFF;
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = column + i < p.K ? row[column + i] : 0;
    }
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

__device__ int int8_of(float units) { return max(-127, min(127, __float2int_rn(units))); }
__device__ u32 e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_tokens(const __grid_constant__ Arguments p) {
    const u16* row = p.x + (size_t)blockIdx.x * p.x_stride;
    float scale;
    if (p.fixed) scale = *p.fixed;
    else {
        u32 largest = 0;
        for (int column = 16 * threadIdx.x; column < p.K; column += 16 * THREADS) {
            u32 v[16];
            read16(p, row, column, v);
#pragma unroll
            for (int i = 0; i < 16; i++) largest = max(largest, v[i] & 0x7FFF);
        }
        largest = largest_of_block(largest);
        scale = largest ? __fdiv_rn(number(largest), LARGEST) : 1.0f;
    }
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
    for (int column = 16 * threadIdx.x; column < p.columns; column += 16 * THREADS) {
        u32 v[16];
        read16(p, row, column, v);
        float units[16];
#pragma unroll
        for (int i = 0; i < 16; i++) units[i] = __fdiv_rn(number(v[i]), scale);
        const size_t at = (size_t)blockIdx.x * p.columns + column;
        u32 words[8] = {};
#if OUTPUT == 2
#pragma unroll
        for (int i = 0; i < 16; i++) words[i / 2] |= rounded_bits((float)int8_of(units[i]) * scale) << (16 * (i % 2));
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
                words[j / 4] |= (u32)(int8_of(units[from]) & 255) << (8 * (j % 4));
            }
#endif
        }
        *(uint4*)(p.codes + at) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
    }
}
