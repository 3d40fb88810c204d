// Tables of 16 numbers of 16 bits: how a lane looks its codes up. Of a word of eight codes byte i is register i of the fragment,
// the lower half's code in its low nibble (PAIRS in pack/tile_orders.py); registers 0 and 2 are row g, 1 and 3 are row g + 8.
//
// In shared memory: a byte is the number of a pair, and one load gives a register. Lanes of a warp want 32 of 256 pairs and must
// not meet in the banks. Of one table for all rows there is a copy for every lane (32 KB, no conflict). Of a table for each row
// there are 8 side by side, one for each of the eight rows that a load serves (8 KB): its four lanes have four banks for
// themselves, and a load takes three turns on average; two where there are two copies. Or numbers lie there one by one.
//
// In registers: a byte permutation looks up four codes among eight bytes, so 16 entries take two for their low and two for their
// high bytes, the codes' upper bits choose between them, and two put the bytes together. Ten instructions for two registers, where
// what two steps have in common is counted by halves; shared memory takes four. Permutations and logic share a pipe that takes one in
// two cycles: with all four registers looked up this way a step takes nearly twice as long. Loads and permutations do not hinder each
// other: with a table for each row, row g is looked up this way and row g + 8 the other.

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

// Four of the eight bytes of a and b, by the nibbles of the selector; where a nibble's upper bit is set, of the byte its sign: 0 or
// 255. (The compiler's __byte_perm leaves that bit out, and takes an instruction for it.)
static __device__ __forceinline__ u32 choose_bytes(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The registers of a row in step `odd` of a pair of steps, of which `eight` are its codes (ROWS in pack/tile_orders.py): `first` of columns
// 2t and 2t + 1, `second` of the two that lie 8 further. What both steps take, the compiler finds.
static __device__ __forceinline__ void look_up_row(u32 eight, int odd, const RowTable& own, u32& first, u32& second) {
  const u32 places = select_bits(0x77777777u, eight, 0);  // once for both steps
  const u32 codes = odd ? places >> 16 : places, upper = choose_bytes(eight << 4, eight, odd ? 0xFBEA : 0xD9C8);
  const u32 low = select_bits(upper, choose_bytes(own.low[2], own.low[3], codes), choose_bytes(own.low[0], own.low[1], codes));
  const u32 high = select_bits(upper, choose_bytes(own.high[2], own.high[3], codes), choose_bytes(own.high[0], own.high[1], codes));
  first = __byte_perm(low, high, 0x5140), second = __byte_perm(low, high, 0x7362);
}

// The 16 numbers of one row, 16-byte aligned, and as bytes.
struct RowNumbers {
  u32 pairs[8];
};
static __device__ __forceinline__ RowNumbers row_numbers(const u16* entries) {
  const uint4 head = ((const uint4*)entries)[0], tail = ((const uint4*)entries)[1];
  return {{head.x, head.y, head.z, head.w, tail.x, tail.y, tail.z, tail.w}};
}
static __device__ __forceinline__ RowTable row_table(const RowNumbers& row) {
  RowTable table;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    table.low[i] = __byte_perm(row.pairs[2 * i], row.pairs[2 * i + 1], 0x6420);
    table.high[i] = __byte_perm(row.pairs[2 * i], row.pairs[2 * i + 1], 0x7531);
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
static __device__ __forceinline__ u32 number_of_lane(const u16* table, int tables, int thread) {
  return table[min(thread & 31, tables * 16 - 1)];
}
static __device__ __forceinline__ void lay_out_pairs(u32 own, int tables, u8* room, int thread, int threads) {
  const int all = tables * PAIR_BYTES / 16;
#pragma unroll
  for (int turn = 0; turn < (all + threads - 1) / threads; turn++) {
    const int i = thread + turn * threads, first = i >> 11 << 4;  // number of the table
    if (i >= all) return;
    const u32 low = __shfl_sync(0xFFFFFFFFu, own, first + (i >> 3 & 15)), high = __shfl_sync(0xFFFFFFFFu, own, first + (i >> 7 & 15));
    const u32 pair = low | high << 16;
    ((uint4*)room)[i] = make_uint4(pair, pair, pair, pair);
  }
}

// All pairs of 8 tables, which lie one after the other, side by side, each ROW_COPIES times: pair p of table g at p * EIGHT_STEP + g *
// 4 * ROW_COPIES. With two copies two lanes share two banks, and a load takes two turns instead of three. In 128 units, each of them 16
// pairs of one table, or where there are threads for it in 256 of 8: smaller ones read more, which took a single warp 2 us longer in 28.
//
// Or numbers one by one (ROW_COPIES 0), a copy for each of the four lanes that look a row up: number n of lane l at 128 n + 4 l, in the
// lower half of four bytes. No two lanes meet, and a quarter of the room is filled by a sixteenth of the stores, but a register takes two
// loads and what puts them together, eight instructions a step more: for where room is what counts.
#ifndef ROW_COPIES
#define ROW_COPIES 1
#endif
constexpr bool ONE_BY_ONE = ROW_COPIES == 0;
constexpr int NUMBER_STEP = 32 * 4, EIGHT_STEP = ONE_BY_ONE ? NUMBER_STEP : 8 * 4 * ROW_COPIES;
constexpr int EIGHT_BYTES = (ONE_BY_ONE ? 16 : 256) * EIGHT_STEP, EIGHT_UNITS = 128;

// The same four bytes COUNT times. By addresses in shared memory, of which one register and a constant do for all stores of a unit:
// through pointers two thirds of the instructions of laying out were their sums.
template <int COUNT> static __device__ __forceinline__ void store_copies(u32 place, u32 v) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "the widths of a store");
  if constexpr (COUNT == 4) asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(place), "r"(v) : "memory");
  else if constexpr (COUNT == 2) asm volatile("st.shared.v2.u32 [%0], {%1, %1};" ::"r"(place), "r"(v) : "memory");
  else asm volatile("st.shared.u32 [%0], %1;" ::"r"(place), "r"(v) : "memory");
}

// Of table g the pairs of `lower`, number `low`, with `count` numbers from `first` on, which `pairs` holds. A warp of 8 tables and 4
// lower numbers writes to all banks.
static __device__ __forceinline__ void lay_out_unit(const u32* pairs, int first, int count, u32 lower, int low, int g, u32 room) {
  if constexpr (ONE_BY_ONE) {
    if (first == 0) store_copies<4>(room + (low * 8 + g) * 16, lower);
  } else {
    const u32 to = room + (first * 16 + low) * EIGHT_STEP + g * 4 * ROW_COPIES;
#pragma unroll
    for (int i = 0; i < count; i++)
      store_copies<ONE_BY_ONE ? 1 : ROW_COPIES>(to + i * 16 * EIGHT_STEP, __byte_perm(lower, pairs[i / 2], i & 1 ? 0x7610 : 0x5410));
  }
}
// One of PARTS times EIGHT_UNITS units: what it is laid out from, and laying it out. Apart, so that a thread can ask for the next one
// before it stores the last.
template <int PARTS> struct EightUnit {
  RowNumbers row;  // with two parts half of it
  u32 lower;

  __device__ __forceinline__ void read(const u16* tables, int unit) {
    const u16* own = tables + unit % 8 * 16;
    const uint4 first = ((const uint4*)own)[PARTS == 1 ? 0 : unit / EIGHT_UNITS];
    row.pairs[0] = first.x, row.pairs[1] = first.y, row.pairs[2] = first.z, row.pairs[3] = first.w;
    if constexpr (PARTS == 1) row = row_numbers(own);
    lower = own[unit / 8 % 16];
  }
  __device__ __forceinline__ void lay_out(u32 room, int unit) const {
    lay_out_unit(row.pairs, unit / EIGHT_UNITS * 8, 16 / PARTS, lower, unit / 8 % 16, unit % 8, room);
  }
};
// All of them by one warp, of which a lane has the numbers of row `lane` % 8.
static __device__ __forceinline__ void lay_out_eight(const RowNumbers& row, u32 room, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 two = lane & 16 ? row.pairs[2 * i + 1] : row.pairs[2 * i];
    lay_out_unit(row.pairs, 0, 16, lane & 8 ? two >> 16 : two & 0xFFFF, 4 * i + lane / 8, lane % 8, room);
  }
}

// Where a lane finds those of row `row`, and the registers of that row in step `odd` of a pair of steps, as `look_up_row` gives them.
static __device__ __forceinline__ u32 place_of_row(int row, int lane) {
  if constexpr (ONE_BY_ONE) return lane * 4;
  constexpr int copies = ONE_BY_ONE ? 1 : ROW_COPIES;
  return (row * copies + lane % copies) * 4;
}
static __device__ __forceinline__ u32 load_four_bytes(u32 place) {
  u32 found;
  asm("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(place));
  return found;
}
static __device__ __forceinline__ void look_up_eight(u32 eight, int odd, u32 room, u32& first, u32& second) {
  u32 found[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if constexpr (ONE_BY_ONE) {
      const u32 low = eight & 0x0F0F0F0Fu, high = eight & 0xF0F0F0F0u;  // 16 times the code
      const u32 upper = load_four_bytes(place_of_pair<NUMBER_STEP / 16>(high, 2 * odd + j, room));
      found[j] = upper * 65536 + load_four_bytes(place_of_pair<NUMBER_STEP>(low, 2 * odd + j, room));
    } else {
      found[j] = load_four_bytes(place_of_pair<EIGHT_STEP>(eight, 2 * odd + j, room));
    }
  }
  first = found[0], second = found[1];
}
