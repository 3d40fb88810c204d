// y = x D H in runs of RUN inputs: random signs, then a fast Walsh-Hadamard transform, in one launch before a product.
//
// A thread has eight inputs that lie side by side: three binary digits of an index are additions in its registers, the next five are
// exchanges between lanes, all above them (runs of more than 256) pass through shared memory. A run lies within a row and within a
// block of threads. Sums in float32, one rounding at the end. Cost: 4 bytes an input through memory, and a launch.
//
// RUN: a power of two of 8 to 8192. THREADS: of a block, RUN / 8 at least. FP16: type of x.
#include "machine.cuh"

constexpr int WARP_RUN = RUN < 256 ? RUN : 256;

struct Arguments {
  const uint4* x;      // [M][K / 8]
  const uint2* signs;  // [K / 8], bytes of 1 and -1
  uint4* y;            // as x
  int pieces;          // K / 8
  float unit;          // RUN^(-1/2)
};

// Sums where the digit is 0, differences where it is 1, of eight numbers of two threads.
INLINE float joined(float mine, float other, bool upper) { return upper ? other - mine : mine + other; }

INLINE void turn_registers(float* v) {
  UNROLL for (int far = 1; far < 8; far *= 2) {
    UNROLL for (int i = 0; i < 8; i++) {
      if (i & far) continue;
      const float low = v[i], high = v[i + far];
      v[i] = low + high, v[i + far] = low - high;
    }
  }
}

INLINE void turn_lanes(float* v) {
  UNROLL for (int far = 1; far < WARP_RUN / 8; far *= 2) {
    const bool upper = threadIdx.x & far;
    UNROLL for (int i = 0; i < 8; i++) v[i] = joined(v[i], __shfl_xor_sync(~0u, v[i], far), upper);
  }
}

#if RUN > 256
INLINE void turn_warps(float* v) {
  __shared__ float held[8][THREADS];  // neighbours in different banks
  for (int far = 32; far < RUN / 8; far *= 2) {
    UNROLL for (int i = 0; i < 8; i++) held[i][threadIdx.x] = v[i];
    __syncthreads();
    UNROLL for (int i = 0; i < 8; i++) v[i] = joined(v[i], held[i][threadIdx.x ^ far], threadIdx.x & far);
    __syncthreads();
  }
}
#endif

INLINE float sign_of(u32 bytes, int i) { return (float)(signed char)(bytes >> 8 * i); }

extern "C" __global__ void __launch_bounds__(THREADS) turn(const __grid_constant__ Arguments p) {
  const int piece = blockIdx.y * THREADS + threadIdx.x;
  const bool mine = piece < p.pieces;  // whole runs: who exchanges has all or nothing
  const size_t at = (size_t)blockIdx.x * p.pieces + piece;
  const uint2 signs = mine ? p.signs[piece] : uint2{};
  allow_next_kernel();
  wait_for_previous_kernel();
  const uint4 x = mine ? p.x[at] : uint4{};
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  float v[8];
  UNROLL for (int i = 0; i < 4; i++) {
    const u32 bytes = i < 2 ? signs.x : signs.y;
    v[2 * i] = low_of(words[i]) * sign_of(bytes, 2 * i % 4), v[2 * i + 1] = high_of(words[i]) * sign_of(bytes, 2 * i % 4 + 1);
  }
  turn_registers(v);
  turn_lanes(v);
#if RUN > 256
  turn_warps(v);
#endif
  u32 y[4];
  UNROLL for (int i = 0; i < 4; i++) y[i] = to_pair(v[2 * i] * p.unit, v[2 * i + 1] * p.unit);
  if (mine) p.y[at] = make_uint4(y[0], y[1], y[2], y[3]);
}
