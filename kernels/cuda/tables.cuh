// Tables of 16 numbers of 16 bits: how a lane looks its codes up. Of a word of eight codes byte i is register i of the fragment,
// the lower half's code in its low nibble (PAIRS in pack/tile_orders.py); registers 0 and 2 are row g, 1 and 3 are row g + 8.
//
// In shared memory: a byte is the number of a pair, and one load gives a register. Lanes of a warp want 32 of 256 pairs and must
// not meet in the banks. Of one table for all rows there is a copy for every lane (32 KB, no conflict). Of a table for each row
// there are 8 side by side, one for each of the eight rows that a load serves (8 KB): its four lanes have four banks for
// themselves, and a load takes three turns on average.
//
// In registers: a byte permutation looks up four codes among eight bytes, so 16 entries take two for their low and two for their
// high bytes, the codes' upper bits choose between them, and two put the bytes together. Eleven instructions for two registers
// where shared memory takes four. Loads and permutations do not hinder each other: with a table for each row, row g is looked up
// this way and row g + 8 the other.

#pragma once

struct RowTable {
  u32 low[4], high[4];  // bytes of the 16 entries
};

// The bits of `a` where `mask` has ones, else those of `b`.
static __device__ __forceinline__ u32 select_bits(u32 mask, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// Four of the eight bytes of a and b, by the nibbles of the selector, each as its sign: 0 or 255. (The compiler's __byte_perm
// leaves the bit out that says so.)
static __device__ __forceinline__ u32 signs_of_bytes(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The registers of row g: `first` of columns 2t and 2t + 1, `second` of the two that lie 8 further.
static __device__ __forceinline__ void look_up_row(u32 word, const RowTable& own, u32& first, u32& second) {
  const u32 codes = __byte_perm(word & 0x77777777u, 0, 0x4420);
  const u32 upper = signs_of_bytes(word << 4, word, 0xEAC8);
  const u32 low = select_bits(upper, __byte_perm(own.low[2], own.low[3], codes), __byte_perm(own.low[0], own.low[1], codes));
  const u32 high = select_bits(upper, __byte_perm(own.high[2], own.high[3], codes), __byte_perm(own.high[0], own.high[1], codes));
  first = __byte_perm(low, high, 0x5140), second = __byte_perm(low, high, 0x7362);
}

// The table of one row from memory, 16-byte aligned.
static __device__ __forceinline__ RowTable row_table(const u16* entries) {
  const uint4 first = ((const uint4*)entries)[0], last = ((const uint4*)entries)[1];
  const u32 pairs[8] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
  RowTable table;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    table.low[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
    table.high[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
  }
  return table;
}

// Where the pair of byte `i` of a word lies, pairs being STEP bytes apart from `first` on. As a sum of products of bytes it is
// one instruction, of the multipliers; taken out and multiplied the byte would be two, one of them in the way of the permutations.
template <int STEP> static __device__ __forceinline__ u32 place_of_pair(u32 word, int i, u32 first) {
  static_assert(STEP < 256, "a factor of a product of bytes");
  u32 place;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(place) : "r"(word), "r"((u32)STEP << 8 * i), "r"(first));
  return place;
}

// All pairs of `tables` tables, a copy for every lane: pair p of table t lies at (t * 256 + p) * 128, four bytes for each lane.
// By whole warps, whose lanes hold the numbers of up to two tables and tell each other: no load stands between the stores.
constexpr int PAIR_STEP = 32 * 4, PAIR_BYTES = 256 * PAIR_STEP;
static __device__ __forceinline__ void fetch_pairs(const u16* table, int tables, u8* room, int thread, int threads) {
  const u32 own = table[min(thread & 31, tables * 16 - 1)];
  for (int i = thread; i < tables * PAIR_BYTES / 16; i += threads) {
    const int first = i >> 11 << 4;  // number of the table
    const u32 low = __shfl_sync(0xFFFFFFFFu, own, first + (i >> 3 & 15)), high = __shfl_sync(0xFFFFFFFFu, own, first + (i >> 7 & 15));
    const u32 pair = low | high << 16;
    ((uint4*)room)[i] = make_uint4(pair, pair, pair, pair);
  }
}

// All pairs of 8 tables, which lie one after the other, side by side: pair p of table g at p * 32 + g * 4. In 128 units, each of
// them 16 pairs of one table.
constexpr int EIGHT_STEP = 8 * 4, EIGHT_BYTES = 256 * EIGHT_STEP, EIGHT_UNITS = 128;
static __device__ __forceinline__ void lay_out_eight(const u16* tables, u8* room, int unit) {
  const int g = unit % 8, low = unit / 8;  // so that a warp writes to all banks
  const u16* own = tables + g * 16;
  const uint4 head = ((const uint4*)own)[0], tail = ((const uint4*)own)[1];
  const u32 pairs[8] = {head.x, head.y, head.z, head.w, tail.x, tail.y, tail.z, tail.w}, lower = own[low];
#pragma unroll
  for (int high = 0; high < 16; high++)
    *(u32*)(room + (high * 16 + low) * EIGHT_STEP + g * 4) = __byte_perm(lower, pairs[high / 2], high & 1 ? 0x7610 : 0x5410);
}
