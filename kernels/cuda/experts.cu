// Who goes where in a layer of experts: three small kernels around the grouped matmuls (`wgmma.cu` with EXPERTS).
//
//   route_pairs    pairs of token and expert sorted by expert, and cut into runs of at most `run` tokens of one expert
//   spread_tokens  each token's row once for every expert that was chosen for it, in sorted order
//   add_experts    y_t = sum over the experts of t of weight * row, in the order in which they were chosen
//
// The sort counts: each warp takes a stretch of pairs, 32 at a time, and lanes with the same expert find each other with a vote
// on each bit of its number (match.any would take one step for every expert among them). A first walk counts experts by warp,
// prefix sums over experts and warps say where each (expert, warp) begins, a second walk hands out places. Pairs of one expert
// keep their order, so the same routing gives the same bits, always. One block does it all where pairs are few. Places are
// scattered stores, of which a multiprocessor makes one in a cycle or two: many pairs are shared among blocks, each of which
// also counts what the others have.
//
// An expert that does not exist is nobody: its pairs come last, belong to no run, and add nothing.

#include "pieces.cuh"

constexpr u32 ALL = 0xFFFFFFFFu;
constexpr int AHEAD = 4;  // steps whose pairs are fetched together

extern __shared__ int counts[];  // of experts and nobody: [warps]; in blocks before; starts (of all first counts); first runs

__device__ void begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct RouteArguments {
    const long long* expert;  // of each pair
    int *order, *place;       // the pair at each place; each pair's place, -1 where its expert is nobody
    int4* runs;               // {number of runs}, then for each {expert, first place, end, runs of this expert}
    int pairs, experts, run;
};

// The experts of a step's pairs: `experts` for nobody, one more beyond the last pair.
struct Step {
    int expert[AHEAD];
    __device__ Step(const RouteArguments& p, int first, int end) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int pair = first + 32 * i + threadIdx.x % 32;
            const long long e = pair < end ? p.expert[pair] : 0;
            expert[i] = pair >= end ? p.experts + 1 : e >= 0 && e < p.experts ? (int)e : p.experts;
        }
    }
};

// The lanes that have the same number as this one; `bits` hold all of them.
__device__ u32 lanes_with(int number, int bits) {
    u32 same = ALL;
    for (int b = 0; b < bits; b++) {
        const bool set = number >> b & 1;
        const u32 those = __ballot_sync(ALL, set);
        same &= set ? those : ~those;
    }
    return same;
}

// Exclusive prefix sum over a warp; `sum` becomes the total.
__device__ int before(int value, int& sum) {
    int until = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(ALL, until, step);
        if ((int)(threadIdx.x % 32) >= step) until += other;
    }
    sum = __shfl_sync(ALL, until, 31);
    return until - value;
}

// Calls take(expert, the lanes that have the same, pair) for the pairs first .. end, with every lane of the warp at once.
template <class Take> __device__ void walk(const RouteArguments& p, int first, int end, Take take) {
    const int bits = 32 - __clz(p.experts + 1);
    for (; first < end; first += 32 * AHEAD) {
        const Step step(p, first, end);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            take(step.expert[i], lanes_with(step.expert[i], bits), first + 32 * i + (int)threadIdx.x % 32);
            __syncwarp();
        }
    }
}

// A part of the pairs first .. end, in whole steps.
struct Part {
    int first, end;
    __device__ Part(int start, int stop, int number, int parts) {
        const int size = (stop - start + 32 * parts - 1) / (32 * parts) * 32;
        first = min(start + number * size, stop), end = min(first + size, stop);
    }
};

// From counts by warp to the place where each (warp, expert) begins, and the experts' runs.
__device__ void lay_out(const RouteArguments& p, int warps, int width) {
    int *earlier = counts + warps * width, *starts = earlier + width, *first_runs = starts + width;
    for (int e = threadIdx.x; e < width; e += blockDim.x) {
        int sum = earlier[e];
        for (int w = 0; w < warps; w++) {
            const int here = counts[w * width + e];
            counts[w * width + e] = sum, sum += here;
        }
        if (gridDim.x == 1) starts[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int pairs = 0, runs = 0;
        for (int first = 0; first < width; first += 32) {
            const int e = first + threadIdx.x, count = e < width ? starts[e] : 0;
            int more_pairs, more_runs;
            const int start = pairs + before(count, more_pairs);
            const int first_run = runs + before(e < p.experts ? (count + p.run - 1) / p.run : 0, more_runs);
            if (e < width) starts[e] = start, first_runs[e] = first_run;
            pairs += more_pairs, runs += more_runs;
        }
        if (threadIdx.x == 0 && blockIdx.x == 0) p.runs[0] = make_int4(runs, 0, 0, 0);
    }
    __syncthreads();
    if (blockIdx.x > 0) return;
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
        const int first = first_runs[e], count = first_runs[e + 1] - first;
        for (int i = 0; i < count; i++)
            p.runs[1 + first + i] = make_int4(e, starts[e] + i * p.run, min(starts[e] + (i + 1) * p.run, starts[e + 1]), count);
    }
}

extern "C" __global__ void __launch_bounds__(1024) route_pairs(const __grid_constant__ RouteArguments p) {
    begin();
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = p.experts + 1;
    int *mine = counts + warp * width, *earlier = counts + warps * width, *starts = earlier + width;
    for (int i = threadIdx.x; i < (warps + 2) * width; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const Part block(0, p.pairs, blockIdx.x, gridDim.x), part(block.first, block.end, warp, warps), any(0, p.pairs, warp, warps);
    if (gridDim.x > 1)
        walk(p, any.first, any.end, [&](int e, u32 same, int pair) {
            if (e >= width || lane != __ffs(same) - 1) return;
            atomicAdd(starts + e, __popc(same));
            if (pair < block.first) atomicAdd(earlier + e, __popc(same));
        });
    walk(p, part.first, part.end, [&](int e, u32 same, int) {
        if (e < width && lane == __ffs(same) - 1) mine[e] += __popc(same);
    });
    __syncthreads();
    lay_out(p, warps, width);
    walk(p, part.first, part.end, [&](int e, u32 same, int pair) {
        const int place = e < width ? starts[e] + mine[e] + __popc(same & ((1u << lane) - 1)) : 0;
        __syncwarp();
        if (e >= width) return;
        if (lane == __ffs(same) - 1) mine[e] += __popc(same);
        p.order[place] = pair, p.place[pair] = e < p.experts ? place : -1;
    });
}

struct SpreadArguments {
    const uint4* x;  // [tokens][pieces of 16 bytes]
    uint4* y;        // [pairs][pieces]
    const int* order;
    int each, pieces;  // each: pairs of a token
};

// A block for every pair.
extern "C" __global__ void __launch_bounds__(256) spread_tokens(const __grid_constant__ SpreadArguments p) {
    begin();
    const uint4* from = p.x + (size_t)(p.order[blockIdx.x] / p.each) * p.pieces;
    uint4* to = p.y + (size_t)blockIdx.x * p.pieces;
    for (int i = threadIdx.x; i < p.pieces; i += 256) to[i] = from[i];
}

struct AddArguments {
    const u16* rows;     // [pairs][columns] in sorted order
    const void* weight;  // [tokens][each], of `weight_type`
    const int* place;
    u16* y;              // [tokens][columns]
    int each, columns, weight_type;  // 0 bfloat16, 1 float16, 2 float32
};

__device__ float weight_of(const AddArguments& p, int pair) {
    if (p.weight_type == 2) return ((const float*)p.weight)[pair];
    const u16 bits = ((const u16*)p.weight)[pair];
    return p.weight_type ? from_fp16(bits) : from_bf16(bits);
}

// A thread for eight columns of a token; rows of TOGETHER pairs are fetched at once.
extern "C" __global__ void __launch_bounds__(256) add_experts(const __grid_constant__ AddArguments p) {
    begin();
    constexpr int TOGETHER = 4;
    const int column = 8 * (blockIdx.x * 256 + threadIdx.x), token = blockIdx.y;
    if (column >= p.columns) return;
    const bool aligned = p.columns % 8 == 0;
    float sum[8] = {};
    for (int first = 0; first < p.each; first += TOGETHER) {
        Piece<8> rows[TOGETHER];
        float weights[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int pair = token * p.each + min(first + i, p.each - 1), place = p.place[pair];
            const bool there = first + i < p.each && place >= 0;
            weights[i] = there ? weight_of(p, pair) : 0.0f;
            rows[i] = there ? read_piece<8>(p.rows + (size_t)place * p.columns, column, p.columns, aligned) : Piece<8>{};
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] = fmaf(weights[i], rows[i][j], sum[j]);
    }
    Piece<8> y;
#pragma unroll
    for (int j = 0; j < 4; j++) y.words[j] = to_pair(sum[2 * j], sum[2 * j + 1]);
    write_piece(p.y + (size_t)token * p.columns, column, p.columns, aligned, y);
}
