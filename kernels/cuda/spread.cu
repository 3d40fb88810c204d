// Activations as a weight wants them whose columns were spread out: groups filled up to whole steps of the matrix instruction,
// and all of that several times over where bit planes lie side by side.
//
//     out[m, c] = x[m, source(c)], or 0 where c has none;     of COPIES times `stretch` columns, group after group:
//     source(c) = GROUP * g + j,   g = c % stretch / FILLED, j = c % stretch % FILLED, where j < GROUP
//
// A thread writes eight columns, 16 bytes: FILLED is a multiple of 16, so they lie in one group. Where groups and rows of x are
// whole 16 bytes too (ALIGNED), it reads them at once. The cost is that of a launch, which begins early and lets the matmul
// behind it begin early: that one asks for its weights meanwhile.
#include "machine.cuh"

constexpr int THREADS = 128;

struct Arguments {
  const u16* x;  // [M][K]
  u16* out;      // [M][columns], 16-byte aligned
  int K, stretch, end, columns;  // end: columns that have a source, COPIES * stretch; zeros from there on
};

extern "C" __global__ void __launch_bounds__(THREADS) spread(const __grid_constant__ Arguments p) {
  allow_next_kernel();
  const int column = (blockIdx.y * THREADS + threadIdx.x) * 8;
  if (column >= p.columns) return;
  const int within = column % p.stretch, member = within % FILLED, source = within / FILLED * GROUP + member;
  const int valid = column < p.end ? min(GROUP - member, p.K - source) : 0;
  const u16* from = p.x + (size_t)blockIdx.x * p.K + source;
  uint4 eight = make_uint4(0, 0, 0, 0);
  wait_for_previous_kernel();
  if (ALIGNED) {
    if (valid > 0) eight = *(const uint4*)from;
  } else {
    u32 words[4] = {};
    UNROLL for (int i = 0; i < 8; i++) if (i < valid) words[i / 2] |= (u32)from[i] << 16 * (i % 2);
    eight = make_uint4(words[0], words[1], words[2], words[3]);
  }
  *(uint4*)(p.out + (size_t)blockIdx.x * p.columns + column) = eight;
}
