// Tables of 16 numbers of 16 bits: how a lane looks its codes up. Of a word of eight codes byte i is register i of the fragment,
// the lower half's code in its low nibble (PAIRS in pack/tile_orders.py); registers 0 and 2 are row g, 1 and 3 are row g + 8.
//
// In shared memory: a byte is the number of a pair, and one load gives a register. Lanes of a warp want 32 of 256 pairs and must
// not meet in the banks. Of one table for all rows there is a copy for every lane (32 KB, no conflict). Of a table for each row
// there are 8 side by side, one for each of the eight rows that a load serves (8 KB): its four lanes have four banks for
// themselves, and a load takes three turns on average.
//
// In registers: a byte permutation looks up four codes among eight bytes, so 16 entries take two for their low and two for their
// high bytes, the codes' upper bits choose between them, and two put the bytes together. Twelve instructions for two registers
// where shared memory takes two for one. Loads and permutations do not hinder each other: with a table for each row, the
// few-token kernels take half of the rows this way and half the other.

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

// The registers of row g + 8 H: `first` of columns 2t and 2t + 1, `second` of the two that lie 8 further.
template <int H> static __device__ __forceinline__ void look_up_row(u32 word, const RowTable& own, u32& first, u32& second) {
  const u32 codes = __byte_perm(word & 0x77777777u, 0, H ? 0x4431 : 0x4420);
  const u32 upper = signs_of_bytes(word << 4, word, H ? 0xFBD9 : 0xEAC8);
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

// All pairs of `tables` tables, a copy for every lane: pair p of table t lies at (t * 256 + p) * 128, four bytes for each lane.
constexpr int PAIR_STEP = 32 * 4, PAIR_BYTES = 256 * PAIR_STEP;
static __device__ __forceinline__ void fetch_pairs(const u16* table, int tables, u8* room, int thread, int threads) {
  for (int i = thread; i < tables * PAIR_BYTES / 16; i += threads) {
    const u16* own = table + (i >> 11) * 16;
    const u32 pair = own[i >> 3 & 15] | (u32)own[i >> 7 & 15] << 16;
    ((uint4*)room)[i] = make_uint4(pair, pair, pair, pair);
  }
}

// All pairs of 8 tables side by side: pair p of table g lies at p * 32 + g * 4. Tables from number `end` on are zero.
constexpr int EIGHT_STEP = 8 * 4, EIGHT_BYTES = 256 * EIGHT_STEP;
static __device__ __forceinline__ void fetch_eight(const u16* table, int first, int end, u8* room, int unit) {
  const int g = unit & 7, low = unit >> 3 & 15;  // so that a warp writes to all banks
  u32 pairs[8] = {}, lower = 0;
  if (first + g < end) {
    const u16* own = table + (first + g) * 16;
    const uint4 head = ((const uint4*)own)[0], tail = ((const uint4*)own)[1];
    pairs[0] = head.x, pairs[1] = head.y, pairs[2] = head.z, pairs[3] = head.w;
    pairs[4] = tail.x, pairs[5] = tail.y, pairs[6] = tail.z, pairs[7] = tail.w;
    lower = own[low];
  }
#pragma unroll
  for (int high = 0; high < 16; high++)
    *(u32*)(room + (high * 16 + low) * EIGHT_STEP + g * 4) = __byte_perm(lower, pairs[high / 2], high & 1 ? 0x7610 : 0x5410);
}
