// Activations rounded to 8 bits, one scale a token, in one kernel: y ~ code * scale, as `rounding.cuh` says. MADE is what y is:
//
//     0   x itself
//     1   a norm:  w x / sqrt(mean(x^2) + eps)      (RMSNorm: Zhang, Sennrich 2019); rounded to 16 bits before w where ROUND_FIRST
//     2   a gate:  act(x) u                         act by ACT: 0 silu, 1 gelu, 2 gelu by tanh; rounded before the product
//
// What a norm or a gate makes would be written in 16 bits and read again; here it only takes the values that it would have had
// in between, so that the codes are the same, and 3 bytes a number pass through memory instead of 7.
// A block takes a token, a thread CHUNKS pieces of 16 columns that it keeps in registers; what is longer (LONGER) is read and
// made again. RAGGED: K is no multiple of 16.
// KEPT 1 (of x itself): some columns are kept beside the codes (LLM.int8()). They do not count for the scale and their codes are
// 0, or the numbers themselves where numbers come out; for the product with what is kept they are also written side by side.
// On compute capability 9.0 the matmul behind it begins at once and fetches its weights meanwhile.
//
// Shape legend: M tokens, K columns of x; columns: of the codes, zeros from K on. Rows lie at multiples of 16 bytes.

#include "rounding.cuh"

#ifndef KEPT
#define KEPT 0
#endif

constexpr int WARPS = THREADS / 32;
constexpr int STEP = 16 * THREADS;
constexpr int SEATS = (CHUNKS > 2 ? 1024 : 1536) / THREADS;  // blocks of a multiprocessor

struct Arguments {
    const u16 *x, *u;    // [M][K]; u of a gate
    const void* weight;  // [K], of a norm: 16 bits as x, or with WEIGHT32 float32
    u8* codes;           // [M][columns]
    float* scale;        // [M]
    const float* fixed;  // the scale of every token, or null
    const u16* mask;     // [columns / 16], a bit for each kept column
    const int* index;    // [kept], the kept columns
    u16* chosen;         // [M][kept_columns] in x's type: these columns, then zeros; or null
    int K, x_stride, u_stride, columns, kept, kept_columns;
    float eps;
};

// 16 columns with zeros where they are kept.
INLINE Sixteen without_kept(const Arguments& p, int column, Sixteen v) {
    const u32 mask = KEPT && column < p.columns ? p.mask[column / 16] : 0;
UNROLL
    for (int i = 0; i < 8; i++) v.words[i] &= ~((mask >> 2 * i & 1) * 0xFFFFu | (mask >> (2 * i + 1) & 1) * 0xFFFF0000u);
    return v;
}
// A thread's first kept column, asked for with the others.
struct Kept {
    int index = 0;
    u16 number = 0;
};
// What the kept columns are, where it is wanted; when the codes of the token are written.
INLINE void write_kept(const Arguments& p, const u16* row, const Kept& first) {
    if (OUTPUT == 2) __syncthreads();
    for (int c = threadIdx.x; c < p.kept_columns; c += THREADS) {
        const u16 number = c == threadIdx.x ? first.number : c < p.kept ? row[p.index[c]] : 0;
        if (p.chosen) p.chosen[(size_t)blockIdx.x * p.kept_columns + c] = number;
        if (OUTPUT == 2 && c < p.kept) ((u16*)p.codes)[(size_t)blockIdx.x * p.columns + p.index[c]] = number;
    }
}

// What a norm reads lives on beside it; all else is read for the last time. Where its lines leave the L2 first, fewer written ones
// have to, and the codes stay there for the matmul: 17.4 -> 14.2 us at 4096 x 4096.
constexpr bool LAST = MADE != 1 && !LONGER;

INLINE Sixteen read16(const u16* row, int column, int K) {
    return RAGGED || column < K ? read_piece<16, LAST>(row, column, RAGGED ? K : column + 16, true) : Sixteen{};
}
// The columns of a thread that it does not keep.
#define REST(columns) (int column = 16 * threadIdx.x + CHUNKS * STEP; LONGER && column < columns; column += STEP)

// 16 numbers times 16 others, each product rounded.
INLINE Sixteen times(const Sixteen& a, const Sixteen& b) {
    Sixteen y;
UNROLL
    for (int i = 0; i < 8; i++) y.words[i] = multiply_pairs(a.words[i], b.words[i]);
    return y;
}

#if MADE == 0
struct Making {
    INLINE Making(const Arguments&, const Sixteen (&)[CHUNKS], const u16*) {}
    INLINE Sixteen operator()(int, const Sixteen& x) const { return x; }
};
#elif MADE == 1
INLINE float sum_of_block(float mine) {
    __shared__ float found[WARPS];
UNROLL
    for (int step = 16; step; step /= 2) mine += __shfl_xor_sync(0xFFFFFFFFu, mine, step);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = 0;
UNROLL
    for (int i = 0; i < WARPS; i++) mine += found[i];
    return mine;
}
INLINE float squares(const Sixteen& x, float sum) {
UNROLL
    for (int i = 0; i < 16; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

struct Making {
    const Arguments& p;
    float root;  // 1 / sqrt(mean(x^2) + eps)

    INLINE Making(const Arguments& p, const Sixteen (&held)[CHUNKS], const u16* row) : p(p) {
        float sum = 0;
UNROLL
        for (int c = 0; c < CHUNKS; c++) sum = squares(held[c], sum);
        for REST(p.K) sum = squares(read16(row, column, p.K), sum);
        root = rsqrtf(sum_of_block(sum) / (float)p.K + p.eps);
    }
    INLINE Sixteen operator()(int column, const Sixteen& x) const {
        Sixteen y;
#if WEIGHT32
        const float* weight = (const float*)p.weight + column;
UNROLL
        for (int i = 0; i < 16; i += 2) {
            const float w0 = column + i < p.K ? weight[i] : 0.0f, w1 = column + i + 1 < p.K ? weight[i + 1] : 0.0f;
            const u32 units = to_pair(x[i] * root, x[i + 1] * root);
            if (ROUND_FIRST) y.words[i / 2] = to_pair(from_half((u16)units) * w0, from_half((u16)(units >> 16)) * w1);
            else y.words[i / 2] = to_pair(x[i] * root * w0, x[i + 1] * root * w1);
        }
        return y;
#else
        const Sixteen weight = read16((const u16*)p.weight, column, p.K);
UNROLL
        for (int i = 0; i < 16; i += 2)
            y.words[i / 2] = ROUND_FIRST ? to_pair(x[i] * root, x[i + 1] * root)
                                         : to_pair(x[i] * root * weight[i], x[i + 1] * root * weight[i + 1]);
        return ROUND_FIRST ? times(y, weight) : y;
#endif
    }
};
#else
INLINE float active(float x) {
    if (ACT == 0) return __fdividef(x, 1.0f + __expf(-x));
    if (ACT == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    return __fdividef(x, 1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

struct Making {
    const u16* ups;
    int K;
    INLINE Making(const Arguments& p, const Sixteen (&)[CHUNKS], const u16*) : ups(p.u + (size_t)blockIdx.x * p.u_stride), K(p.K) {}
    INLINE Sixteen operator()(int column, const Sixteen& x) const {
        const Sixteen u = read16(ups, column, K);
        Sixteen y;
UNROLL
        for (int i = 0; i < 16; i += 2) y.words[i / 2] = to_pair(active(x[i]), active(x[i + 1]));
        return times(y, u);
    }
};
#endif

INLINE Sixteen made(const Arguments& p, int column, const Making& make, const Sixteen& x) {
    const Sixteen y = make(column, x);
    return KEPT ? without_kept(p, column, y) : y;
}

extern "C" __global__ void __launch_bounds__(THREADS, SEATS < 16 ? SEATS : 16) quantize_tokens(const __grid_constant__ Arguments p) {
    allow_next_kernel();
    Kept kept;
    const bool keeps = KEPT && threadIdx.x < p.kept;
    if (keeps) kept.index = p.index[threadIdx.x];
    wait_for_previous_kernel();
    const u16* row = p.x + (size_t)blockIdx.x * p.x_stride;
    if (keeps) kept.number = row[kept.index];
    const int first = 16 * threadIdx.x;
    Sixteen held[CHUNKS];
UNROLL
    for (int c = 0; c < CHUNKS; c++) held[c] = read16(row, first + c * STEP, p.K);
    const Making make(p, held, row);
    u32 largest = 0;
UNROLL
    for (int c = 0; c < CHUNKS; c++)
        held[c] = made(p, first + c * STEP, make, held[c]), largest = largest_of(held[c], largest);
    for REST(p.K) largest = largest_of(made(p, column, make, read16(row, column, p.K)), largest);
    const float own = scale_of(largest_of_block<WARPS>(largest));
    const float scale = p.fixed && own - own == 0 ? *p.fixed : own;  // a stored scale hides no infinity and no NaN
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;

    const Divisor by(scale, !p.fixed);
    const size_t at = (size_t)blockIdx.x * p.columns;
UNROLL
    for (int c = 0; c < CHUNKS; c++)
        if (first + c * STEP < p.columns) write16(p.codes, at + first + c * STEP, held[c], by);
    for REST(p.columns)
        write16(p.codes, at + column, made(p, column, make, read16(row, column, p.K)), by);
    if constexpr (KEPT) write_kept(p, row, kept);
}
