// Packed weights to a dense matrix, W[n, k] = (u - z) * s in float32, rounded once to the activations' type.
//
// For many tokens a dense product is bound by arithmetic, and the cheapest use of packed weights is to decode them once into
// a buffer and multiply that. The decoders are those of the few-token kernels. A warp takes one tile of 16 rows x 128
// columns: a lane holds pairs of neighbouring columns of two rows, so the tile is turned around in shared memory and written
// as rows of 16-byte pieces. Cost: the bytes read and written, b/8 + 2 per weight.
//
// Grid: one block of WARPS warps for WARPS k tiles of one row tile. Rows first_tile * 16 .. of W go to row 0 .. of `dense`.

#include "decode.cuh"

constexpr int WARPS = 8;
constexpr int ROW_BYTES = 256 + 16;  // of a tile in shared memory; 16 more against bank conflicts

struct Arguments {
  const u8* codes;   // [row tile][k tile][256 * BITS]
  const u8* scale;   // [row tile][group][16]
  const u8* zero;    // the same, or null
  const u16* table;  // [tables][2^BITS] in the activations' type, or null
  const u8* pick;    // [row tile][group][16], or null
  const float* factor;  // of all scales, or null
  u16* dense;        // [rows][K]
  const int* outlier_start;  // of tiles, and the outliers themselves (tile_outliers.cuh), or null
  const u32* outlier;
  int rows, K, first_tile, k_tiles, groups, tables;
};

// The weight pair of a register: centred codes (or table values) minus the centred zero point, times the scale.
INLINE u32 weight_pair(u32 codes, float zero, float scale) {
  const float low = (from_half((u16)codes) - zero) * scale, high = (from_half((u16)(codes >> 16)) - zero) * scale;
  return (u32)to_half(low) | (u32)to_half(high) << 16;
}

extern __shared__ __align__(128) u8 shared[];

extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize(const __grid_constant__ Arguments p) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int k_blocks = (p.k_tiles + WARPS - 1) / WARPS;
  const int local_tile = blockIdx.x / k_blocks, tile = blockIdx.x % k_blocks * WARPS + warp;
  const size_t row_tile = p.first_tile + local_tile;
  u8* turned = shared + warp * 16 * ROW_BYTES;
  u16* tables = (u16*)(shared + WARPS * 16 * ROW_BYTES);
  fetch_tables<16>(p.table, p.tables, tables, row_tile, threadIdx.x, WARPS * 32);
  if constexpr (TABLE) __syncthreads();
  if (tile >= p.k_tiles) return;

  const float factor = SCALE >= 3 && p.factor ? *p.factor : 1.0f;
  u32 words[WORDS];
  load_words_from_global(p.codes + (row_tile * p.k_tiles + tile) * TILE_BYTES, lane, words);
  UNROLL for (int run = 0; run < RUNS; run++) {
    const size_t place = (row_tile * p.groups + min(group_of(tile, run), p.groups - 1)) * 16;
    const u8* scales = p.scale + place * SCALE_BYTES;
    float scale[2] = {1, 1};
    PlaneTable planes[2];
    if constexpr (PLANES)
      read_planes(planes, scales, p.zero + place * ZERO_BYTES, g);
    else
      scale[0] = read_scale(scales, g) * factor, scale[1] = read_scale(scales, g + 8) * factor;
    float zero[2] = {0, 0};
    if constexpr (ZERO && !PLANES) {
      zero[0] = read_zero(p.zero + place * ZERO_BYTES, g) - CENTRE;
      zero[1] = read_zero(p.zero + place * ZERO_BYTES, g + 8) - CENTRE;
    }
    u32 upper = table_of(shared_address(tables), 0, g), lower = table_of(shared_address(tables), 0, g + 8);
    if constexpr (TABLE == 3) {
      const u8 picks[2] = {p.pick[place + g], p.pick[place + g + 8]};
      upper += picked(picks[0]) * (2 << BITS), lower += picked(picks[1]) * (2 << BITS);
      scale[0] = with_sign_of(scale[0], picks[0]), scale[1] = with_sign_of(scale[1], picks[1]);
    }
    UNROLL for (int step = 0; step < RUN / 16; step++) {
      const int s = run * (RUN / 16) + step;
      u32 a[4];
      if constexpr (PLANES)
        decode_planes(words, s, planes, a);
      else if constexpr (TABLE)
        decode_table(words, s, upper, lower, a);
      else if constexpr (FLOATS && !SIGNS)
        decode_floats(words, s, both(power_of_two(FLOAT_SHRINK)), both(power_of_two(FLOAT_SHRINK)), a);
      else
        decode_integers(words, s, a);
      UNROLL for (int i = 0; i < 4; i++)
        *(u32*)(turned + (g + 8 * (i & 1)) * ROW_BYTES + (16 * s + 8 * (i >> 1) + 2 * t) * 2) = weight_pair(a[i], zero[i & 1], scale[i & 1]);
    }
  }
  __syncwarp();
  if (p.outlier) {
    const int* start = p.outlier_start + row_tile / 4 * p.k_tiles + tile;
    const float unit = factor * (SCALED ? 1 << SCALED_SHRINK : 1);  // in which they stand among codes that other kernels have not scaled yet
    for (int i = start[0] + lane; i < start[1]; i += 32) {
      // value | sheet % 8 << 16 | (2048 (row tile % 4) + 512 step + 16 (4 row + t) + 4 register + 2 half) << 19; a tile has two sheets of four steps
      const u32 outlier = p.outlier[i], place = outlier >> 19, step = (place >> 9 & 3) + (outlier >> 16 & 1) * 4;
      if (place >> 11 != row_tile % 4) continue;
      const int row = (place >> 6 & 7) + 8 * (place >> 2 & 1), column = step * 16 + (place >> 3 & 1) * 8 + (place >> 3 & 6) + (place >> 1 & 1);
      u16* to = (u16*)(turned + row * ROW_BYTES + column * 2);
      *to = to_half(from_half(*to) + from_half((u16)outlier) * unit);
    }
    __syncwarp();
  }
  UNROLL for (int i = lane; i < 256; i += 32) {
    const int row = local_tile * 16 + (i >> 4), column = tile * 128 + (i & 15) * 8;
    const uint4 piece = *(const uint4*)(turned + (i >> 4) * ROW_BYTES + (i & 15) * 16);
    u16* to = p.dense + (size_t)row * p.K + column;
    if (row >= p.rows) continue;
    if (p.K % 8 == 0) {
      if (column < p.K) *(uint4*)to = piece;
    } else {
      const u32 part[4] = {piece.x, piece.y, piece.z, piece.w};
      UNROLL for (int j = 0; j < 8; j++) if (column + j < p.K) to[j] = (u16)(part[j / 2] >> 16 * (j % 2));
    }
  }
}
