// Bit planes: a weight of q planes is one of the 2^q sums offset +- a_0 +- a_1 .. of its group, whose numbers all its weights share
// (quantize/planes.py). So a group is a table of at most 16 numbers, made in registers from the few that are stored, and one
// product is enough for all planes.
//
// A byte permutation looks up four codes among eight bytes: of eight numbers the low bytes are one such table and the high bytes
// another, so four weights take two permutations, and two more put the bytes together. Eight numbers are three planes. The sums of
// four are eight numbers and the same with the other sign: code u < 8 is the number u, u >= 8 minus the number u - 8
// (plane_tables.py renames them). A word's signs lie where the high bytes of its lower four numbers want them, those of the upper
// four 4 bits below, so one instruction puts in four; an offset comes on top in an addition.
//
// A permutation wants its codes in nibbles, of which it reads four: PLANES says which four are looked up together.
//   ROWS     each row has numbers of its own, a_0 .. a_(q-1) and of up to three planes the offset as the fourth, 16 bits each:
//            nibble 4 i0 + 2 i1 + e, so that the lower half of a word is row g and its upper half row g + 8
//   BLOCKS   eight columns of all 16 rows share a table, which is stored ready made, low bytes before high ones: nibble
//            4 i1 + 2 i0 + e, so that the lower half is columns 0..7 of a step and the upper half 8..15
// (register i0 + 2 i1, half e). Of a lane's words word s holds the codes of step s; fewer than four planes leave room in the
// nibbles, which pack/nibbles.py fills with the codes of other steps.
//
// Tables are summed in float32 in the order of the definition and rounded once to the activations' type: the weights are those of a
// dense matrix. Only an offset of four planes is not in the table: it is added to the rounded sum, and rounds again, or where a kernel
// has the sums of x over a group, multiplied by them as zero points are.
//
// Defines used: BITS (1 to 4), SCALE, ZERO. `and_or`, `low_of`, `high_of`, `pair_of` and `add_pairs` come from whoever includes this.

#pragma once

#define PLANES_OF_ROWS 5  // values of SCALE
#define PLANES_OF_BLOCKS 6
constexpr bool PLANES = SCALE == PLANES_OF_ROWS || SCALE == PLANES_OF_BLOCKS;
constexpr int PLANE_SCALE_BYTES = SCALE == PLANES_OF_ROWS ? 8 : 2;  // for each of 16 rows

// The four lanes of a row want the same tables: a warp makes those of one tile of 16 x 128 together, in shared memory, where they
// lie as [run of columns][row]. In few_tokens.cuh, that is, and where a tile has several groups in wgmma.cu: with one, half of the
// lanes would have nothing to do, and waiting for each other costs more than it saves.
constexpr bool MADE = SCALE == PLANES_OF_ROWS;
constexpr int MADE_RUN = GROUP % 128 == 0 ? 128 : GROUP % 64 == 0 ? 64 : GROUP % 32 == 0 ? 32 : 16;  // columns of one group
constexpr int MADE_TABLES = 128 / MADE_RUN * 16, MADE_BYTES = MADE ? MADE_TABLES * 16 : 0;
constexpr bool MANY_MADE = MADE && MADE_TABLES > 16;

struct PlaneTable {
  u32 low[2], high[2];  // bytes of eight numbers
  u32 offset;           // a pair, of four planes
};

static __device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The table of a row from its four numbers.
static __device__ __forceinline__ PlaneTable plane_table(uint2 numbers) {
  const float a[4] = {low_of(numbers.x), high_of(numbers.x), low_of(numbers.y), high_of(numbers.y)};
  constexpr int SUMS = BITS == 1 ? 2 : BITS == 2 ? 4 : 8;
  float sum[8] = {BITS == 4 ? a[0] : a[3]};
#pragma unroll
  for (int plane = BITS == 4, count = 1; count < SUMS; plane++, count *= 2)
#pragma unroll
    for (int u = count - 1; u >= 0; u--) {
      const float before = sum[u];
      sum[2 * u] = before - a[plane], sum[2 * u + 1] = before + a[plane];
    }
  u32 pair[4] = {};
#pragma unroll
  for (int i = 0; i < SUMS / 2; i++) pair[i] = pair_of(sum[2 * i], sum[2 * i + 1]);
  PlaneTable table = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    table.low[i] = permute_bytes(pair[2 * i], pair[2 * i + 1], 0x6420);
    table.high[i] = permute_bytes(pair[2 * i], pair[2 * i + 1], 0x7531);
  }
  return table;
}

// Table `place` of those that a warp makes.
static __device__ __forceinline__ void make_plane_table(u8* room, int place, uint2 numbers) {
  const PlaneTable table = plane_table(numbers);
  ((uint4*)room)[place] = make_uint4(table.low[0], table.low[1], table.high[0], table.high[1]);
}

// What a lane needs for one group: the tables of rows g and g + 8, or of columns 0..7 and 8..15. `scales` and `zeros` begin with
// the group's 16 rows; READY: in the place of scales are tables that have been made. No `zeros`: offsets are added elsewhere.
template <bool READY = false>
static __device__ __forceinline__ void read_planes(PlaneTable (&tables)[2], const u8* scales, const u8* zeros, int g) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if constexpr (READY || SCALE == PLANES_OF_BLOCKS) {
      const uint4 v = ((const uint4*)scales)[SCALE == PLANES_OF_BLOCKS ? h : g + 8 * h];
      tables[h] = {{v.x, v.y}, {v.z, v.w}, 0};
    } else {
      tables[h] = plane_table(((const uint2*)scales)[g + 8 * h]);
    }
    if (SCALE == PLANES_OF_ROWS && ZERO != 0 && zeros) tables[h].offset = ((const u16*)zeros)[g + 8 * h] * 0x10001u;
  }
}

// The nibbles of step s. With three planes each third word of four has room for one bit of the fourth step's codes.
static __device__ __forceinline__ u32 plane_codes(const u32* words, int s) {
  if constexpr (BITS == 1) return words[s / 4] >> s % 4 & 0x11111111u;
  if constexpr (BITS == 2) return words[s / 2] >> s % 2 * 2 & 0x33333333u;
  if constexpr (BITS == 4) return words[s];
  const u32* three = words + s / 4 * 3;
  if (s % 4 < 3) return three[s % 4] & 0x77777777u;
  return and_or(three[0] >> 3, 0x11111111u, and_or(three[1] >> 2, 0x22222222u, three[2] >> 1 & 0x44444444u));
}

// Four weights of one table; `codes` in the lower half, `signs` at the top of each byte. OFFSET: with the offset of four planes.
template <bool OFFSET>
static __device__ __forceinline__ void look_up_planes(const PlaneTable& table, u32 codes, u32 signs, u32& first, u32& second) {
  const u32 low = permute_bytes(table.low[0], table.low[1], codes);
  u32 high = permute_bytes(table.high[0], table.high[1], codes);
  if constexpr (BITS == 4) high ^= signs & 0x80808080u;
  first = permute_bytes(low, high, 0x5140), second = permute_bytes(low, high, 0x7362);
  if constexpr (OFFSET && BITS == 4 && ZERO != 0) first = add_pairs(first, table.offset), second = add_pairs(second, table.offset);
}

// The A fragment of step s.
template <bool OFFSET = true>
static __device__ __forceinline__ void decode_planes(const u32* words, int s, const PlaneTable (&tables)[2], u32* a) {
  const u32 word = plane_codes(words, s), codes = BITS == 4 ? word & 0x77777777u : word;
  constexpr int STRIDE = SCALE == PLANES_OF_BLOCKS ? 1 : 2;
  look_up_planes<OFFSET>(tables[0], codes, word, a[0], a[STRIDE]);
  look_up_planes<OFFSET>(tables[1], codes >> 16, word << 4, a[3 - STRIDE], a[3]);
}
