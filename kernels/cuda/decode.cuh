// From codes to the left factor of the matrix instruction, without a shuffle and without a conversion instruction.
//
// A 16-bit float whose exponent says 2^m, with m mantissa bits, counts in ones: put an integer into the mantissa's low bits
// and the float is 2^m + integer. So a field of a code is masked into place over the bits of a power of two (one
// and_or for two weights), and one packed addition takes the power away again. Where a field does not lie at bit 0 but at
// bit p, the power 2^(m-p) makes bit p count as one; where it is the upper limb of a code, with weight 2^w, the power
// 2^(m-p+w) makes it count as that. bfloat16 has 7 mantissa bits: a 4-bit field fits at bit 0 only, 2-bit fields at 0, 2
// and 4, single bits at 0..6, and what lies higher is shifted down first, once for all fields that come along. float16
// has 10 bits. All sums below are exact: whole numbers of at most 8 significant bits (see the proof in tests).
//
// Decoders give CENTRED integers u - 2^(b-1). Zero points enter in the epilogue of a group, through the sum of x:
//   sum_k (u - z) x = sum_k (u - c) x - (z - c) sum_k x,     c = 2^(b-1)
// which is exact for integer zero points, keeps float ones in float32, and costs one more matrix product (with a factor of
// ones) for all row tiles together. Integer zero points of four bits need none of that: what takes the power of two away takes the
// zero point with it (ZERO_IN_CODES).
//
// One to three bits are bound by instructions, not by bytes, and go a step further (FOLDED): the powers of two are left in the
// factor, and what they add to the product, a fixed pattern of powers times x, is computed once per fragment of x for all row
// tiles and added to each tile's sum. The price is cancellation in float32: powers of up to 2^7 against weights of a few
// units, about 1e-5 relative.
//
// Floats (FLOATS) lie in their words as a bfloat16 wants them (pack/tile_orders.py): turned and masked they are the number
// times a power of two, and one product brings them to size. Where a group's scale is a byte, that product is with
// the scale: 2 or 4 significant bits times at most 4, which is exact, and no sum needs scaling any more (SCALED).
//
// Defines used: BITS, FP16, TABLE (0 none, 1 one table, 2 one per row, 3 picked per group), TABLES (how many, 1 where each row has
// its own), FLOATS (bits of mantissa, 0 for no floats), ZERO, SCALE, GROUP.

#pragma once
#include "machine.cuh"
#include "floats.cuh"
#include "tables.cuh"
#include "entries.cuh"

INLINE u32 pair_of(float low, float high) { return to_pair(low, high); }
#include "planes.cuh"

// ---- Numbers known at compile time -----------------------------------------------------------------------------------
constexpr int MANTISSA = FP16 ? 10 : 7;
constexpr int EXPONENT_BIAS = FP16 ? 15 : 127;
constexpr int MOST_EXPONENT = FP16 ? 15 : 127;
constexpr int WORDS = 2 * BITS;  // 32-bit words of one tile in a lane
constexpr int TILE_BYTES = 256 * BITS;
constexpr bool SIGNS = BITS == 1 && FLOATS;  // the bit u is 2 u - 1
constexpr int CENTRE = SIGNS ? 1 : TABLE || FLOATS ? 0 : 1 << (BITS - 1);

constexpr u32 both(u32 half) { return half * 0x00010001u; }
constexpr u32 power_of_two(int e) { return (u32)(e + EXPONENT_BIAS) << MANTISSA; }
constexpr int log2_floor(u32 v) {  // of numbers up to 2^16; a sum, since a compiler folds it wherever v becomes known
  return (v > 1) + (v > 3) + (v > 7) + (v > 15) + (v > 31) + (v > 63) + (v > 127) + (v > 255) + (v > 511) + (v > 1023) +
         (v > 2047) + (v > 4095) + (v > 8191) + (v > 16383) + (v > 32767) + (v > 65535);
}
// The bits of -v for a whole number v that the type holds exactly.
constexpr u32 minus(u32 v) {
  return 0x8000u | power_of_two(log2_floor(v)) | (((v << 16) >> log2_floor(v)) & 0xFFFFu) >> (16 - MANTISSA);
}
constexpr u32 ONES = both(power_of_two(0));

// Widths of a code's limbs, the lowest first. Three bits are one, which lies in a way of its own.
constexpr int limb_count() { return BITS == 8 || BITS == 5 || BITS == 6 ? 2 : BITS == 7 ? 3 : 1; }
constexpr int limb_width(int l) {
  return l == 0 ? (BITS >= 4 ? 4 : BITS) : l == 1 ? (BITS == 8 ? 4 : BITS >= 6 ? 2 : 1) : 1;
}
constexpr int limb_weight(int l) { return l == 0 ? SIGNS : limb_weight(l - 1) + limb_width(l - 1); }
constexpr int limb_word(int l) { return l == 0 ? 0 : limb_word(l - 1) + 2 * limb_width(l - 1); }

constexpr int RUN = GROUP == 0 ? 128 : GROUP % 128 == 0 ? 128 : GROUP % 64 == 0 ? 64 : GROUP % 32 == 0 ? 32 : 16;
constexpr int RUNS = 128 / RUN;  // runs of columns with one scale in a tile
constexpr bool FOLDED = !TABLE && !PLANES && BITS <= 3 && RUN >= 64;
constexpr bool SCALED = FLOATS && (SCALE == 3 || (SCALE == 4 && !FP16));

// ---- Where a field lies ----------------------------------------------------------------------------------------------
// Fields of one limb follow each other in a half word. `least` keeps a heavy limb's power inside float16's range, and powers
// that stay in the factor no larger than bfloat16's. Signs count as two, and their powers are no larger for it.
template <int WIDTH, int WEIGHT> struct Field {
  static constexpr int least = (FOLDED ? MANTISSA - 7 : MANTISSA + WEIGHT > MOST_EXPONENT ? MANTISSA + WEIGHT - MOST_EXPONENT : 0) + SIGNS;
  static constexpr int reach = (MANTISSA - WIDTH - least) / WIDTH + 1;  // fields that one shift serves
  static constexpr int bit(int j) { return least + j % reach * WIDTH; }
  static constexpr int shift(int j) { return j / reach * reach * WIDTH - least; }
  static constexpr u32 power(int j) { return 1u << (MANTISSA - bit(j) + WEIGHT); }
  // 2^(m-p+w) + 2^w * field, in both halves.
  static INLINE u32 raised(u32 word, int j) {
    const u32 moved = shift(j) >= 0 ? word >> shift(j) : word << -shift(j);
    return and_or(moved, both(((1u << WIDTH) - 1) << bit(j)), both(power_of_two(MANTISSA - bit(j) + WEIGHT)));
  }
};

// Number of the field, in its half word, of register i at step s.
constexpr int field_number(int width, int s, int i) { return 4 * (s % (4 / width)) + i; }

// Three bits: of half a tile's 16 codes f = 4 (s % 4) + i five lie in each half word, the bits of the last are the bits 15. There
// they are signs: u = 3.5 + the sum of +-2^(j-1) over its bits j, which takes no shift.
struct Threes {
  static constexpr int least = MANTISSA - 7;
  static constexpr int code(int s, int i) { return 4 * (s % 4) + i; }
  // Where the field of code f comes to lie: as it is, or by one of two shifts that others need too.
  static constexpr int bit(int f) {
    const int q = f % 5;
    return FP16 ? (q == 2 || q == 4 ? 6 : 3) : (q & 1 || q == 4 ? 3 : 0);
  }
  static constexpr u32 power(int f) { return 1u << (MANTISSA - bit(f)); }
  static INLINE u32 moved(u32 word, int right) { return right >= 0 ? word >> right : word << -right; }
  static INLINE u32 raised(const u32* words, int s, int i) {
    const int f = code(s, i), to = bit(f);
    const u32* three = words + 3 * (s / 4);
    if (f < 15) return and_or(moved(three[f / 5], 3 * (f % 5) - to), both(7u << to), both(power_of_two(MANTISSA - to)));
    const u32 low = add_pairs(and_xor(three[0], 0x80008000u, both(0x8000u | power_of_two(-1))),
                              and_xor(three[1], 0x80008000u, both(0x8000u | power_of_two(0))));
    return add_pairs(and_xor(three[2], 0x80008000u, both(0x8000u | power_of_two(1))), low);
  }
};

template <int L> INLINE u32 raised_limb(const u32* words, int s, int i) {
  if constexpr (BITS == 3) return Threes::raised(words, s, i);
  constexpr int width = limb_width(L);
  return Field<width, limb_weight(L)>::raised(words[limb_word(L) + s * width / 4], field_number(width, s, i));
}
template <int L> constexpr u32 power_of_limb(int s, int i) {
  return Field<limb_width(L), limb_weight(L)>::power(field_number(limb_width(L), s, i));
}

// The bits of what makes a raised code of one limb centred.
constexpr u32 offset_of(int s, int i) {
  if (BITS == 3) return Threes::code(s, i) == 15 ? 0x8000u | power_of_two(-1) : minus(Threes::power(Threes::code(s, i)) + CENTRE);
  return minus(power_of_limb<0>(s, i) + CENTRE);
}

// ---- Decoders --------------------------------------------------------------------------------------------------------
// The A fragment of step s (0..7) of a tile: centred integers. `s` must be known after unrolling.
INLINE void decode_integers(const u32* words, int s, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) {
    if constexpr (limb_count() == 1) {
      a[i] = add_pairs(raised_limb<0>(words, s, i), both(offset_of(s, i)));
    } else if constexpr (limb_count() == 2) {
      const u32 high = add_pairs(raised_limb<1>(words, s, i),
                                 both(minus(power_of_limb<1>(s, i) + power_of_limb<0>(s, i) + CENTRE)));
      a[i] = add_pairs(raised_limb<0>(words, s, i), high);
    } else {
      const u32 high = add_pairs(raised_limb<limb_count() - 1>(words, s, i),
                                 both(minus(power_of_limb<limb_count() - 1>(s, i) + power_of_limb<1>(s, i) +
                                            power_of_limb<0>(s, i) + CENTRE)));
      a[i] = add_pairs(raised_limb<0>(words, s, i), add_pairs(raised_limb<1>(words, s, i), high));
    }
  }
}

// The same minus the zero points of rows g and g + 8, exact as well: `less` is minus their sum with the power of two, from `with_zero`.
constexpr bool ZERO_IN_CODES = ZERO == 1 && BITS == 4 && !TABLE && !FLOATS && !PLANES;
INLINE u32 with_zero(u32 zero, int half) {
  const int bit = Field<4, 0>::bit(half);  // of registers half and half + 2
  return zero * both(1u << bit) + both(0x8000u | power_of_two(MANTISSA - bit));
}
INLINE void decode_from_zero(const u32* words, int s, const u32* less, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) a[i] = add_pairs(raised_limb<0>(words, s, i), less[i & 1]);
}

// The A fragment of step s with its powers of two still in it, and minus what these and the centre come to.
INLINE void decode_folded(const u32* words, int s, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) a[i] = raised_limb<0>(words, s, i);
}
INLINE void folded_offsets(int s, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) a[i] = both(offset_of(s, i));
}

// The A fragment of step s of floats: `upper` multiplies row g, `lower` row g + 8, both a pair of 16-bit numbers that takes
// FLOAT_SHRINK back. As float16 the magnitude moves three bits up, which adding it seven times does.
constexpr int FLOAT_SHRINK = EXPONENT_BIAS - FLOAT_BIAS;  // a register before the product is the number times 2^-FLOAT_SHRINK
INLINE void decode_floats(const u32* words, int s, u32 upper, u32 lower, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) {
    const u32 word = words[BITS == 8 ? s + i / 2 * 8 : s], rest = BITS == 6 ? words[8 + s / 2] : BITS == 5 ? words[8 + s / 4] : 0;
    a[i] = placed_float(word, rest, s, i);
    if constexpr (FP16) a[i] += (a[i] & FLOAT_MAGNITUDES) * 7;
    a[i] = multiply_pairs(a[i], i & 1 ? lower : upper);
  }
}

// The A fragment of step s through a table of 16-bit numbers in shared memory: `upper` for row g, `lower` for row g + 8.
// Codes of four bits lie in pairs: byte i of a word is register i, or where rows have tables (TABLE 2), of the words of two steps the
// first is row g and the second row g + 8 (ROWS in pack/tile_orders.py). Codes of eight are bytes, their entries STEP bytes apart.
template <int STEP = 2> INLINE void decode_table(const u32* words, int s, u32 upper, u32 lower, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) {
    u32 pair[2];
    UNROLL for (int e = 0; e < 2; e++) {
      const u32 table = i & 1 ? lower : upper;
      if constexpr (BITS == 4) {
        const int bit = (TABLE == 2 ? s % 2 * 16 + i / 2 * 8 : 8 * i) + 4 * e;
        const u32 word = words[TABLE == 2 ? (s & ~1) + i % 2 : s], low = bit ? word >> (bit - 1) : word << 1;
        pair[e] = load_shared_u16(and_or(low, 0x1E, table));  // tables of 32 bytes begin at multiples of that
      } else {
        pair[e] = load_shared_u16(place_of_entry<STEP>(words[s], words[8 + s], i, e, table));
      }
    }
    a[i] = __byte_perm(pair[0], pair[1], 0x5410);
  }
}

// Tables of 16 as `tables.cuh` has them: one or two for all rows as pairs, one for each row half in registers and half as pairs.
// Of 256 numbers one for all rows has a copy for every lane (entries.cuh).
constexpr bool PAIRED = BITS == 4 && (TABLE == 1 || (TABLE == 3 && TABLES <= 2)), BY_ROWS = BITS == 4 && TABLE == 2;
constexpr bool COPIED = BITS == 8 && TABLE == 1;
// Of a row tile: pairs of rows 8..15, bytes of the tables of rows 0..7, and tables as they come from memory, 32 bytes a row.
constexpr int AT_ROW_BYTES = EIGHT_BYTES, AT_ROWS = AT_ROW_BYTES + 8 * 32, ROW_TABLE_BYTES = AT_ROWS + 16 * 32;
INLINE void decode_pairs(u32 word, u32 upper, u32 lower, u32* a) {
  UNROLL for (int i = 0; i < 4; i++) a[i] = load_shared_u32(place_of_pair<PAIR_STEP>(word, i, i & 1 ? lower : upper));
}
INLINE void decode_by_rows(const u32* words, int s, const RowTable& upper, u32 lower, u32* a) {
  look_up_eight(words[s | 1], s & 1, lower, a[1], a[3]);
  look_up_row(words[s & ~1], s & 1, upper, a[0], a[2]);
}
INLINE RowTable load_row_table(u32 room) {
  RowTable table;
  load_shared_u32x4(table.low, room), load_shared_u32x4(table.high, room + 16);
  return table;
}
// Tables of `tiles` row tiles from number `first` on; rows from `end` on have zeros. First they come, when they do, then the same
// threads lay them out.
INLINE void ask_for_row_tables(const u16* table, int first, int tiles, int end, u32 room, int thread, int threads) {
  for (int i = thread; i < tiles * 32; i += threads) {
    const int row = first * 16 + i / 2;
    const u16* from = table + (row < end ? (size_t)row * 16 + i % 2 * 8 : 0);
    copy_async(room + i / 32 * ROW_TABLE_BYTES + AT_ROWS + i % 32 * 16, from, row < end ? 16 : 0);
  }
}
template <int TILES, int COUNT> INLINE void lay_out_row_tables(u8* room, int thread) {
  constexpr int PARTS = TILES * EIGHT_UNITS * 2 <= COUNT ? 2 : 1, UNITS = EIGHT_UNITS * PARTS;
  constexpr int TURNS = (TILES * UNITS + COUNT - 1) / COUNT;
  auto tile_of = [&](int turn) { return COUNT % UNITS == 0 ? thread / UNITS + turn * (COUNT / UNITS) : (thread + turn * COUNT) / UNITS; };
  auto unit_of = [&](int turn) { return COUNT % UNITS == 0 ? thread % UNITS : (thread + turn * COUNT) % UNITS; };
  EightUnit<PARTS> units[2];
  u32 numbers[2];  // of rows 0..7, whose bytes are taken apart
  auto read = [&](int turn) {
    if (turn >= TURNS || tile_of(turn) >= TILES) return;
    const u16* rows = (const u16*)(room + tile_of(turn) * ROW_TABLE_BYTES + AT_ROWS);
    units[turn & 1].read(rows + 8 * 16, unit_of(turn)), numbers[turn & 1] = rows[unit_of(turn) % EIGHT_UNITS];
  };
  read(0);
  UNROLL for (int turn = 0; turn < TURNS; turn++) {
    read(turn + 1);
    const int unit = unit_of(turn);
    u8* place = room + tile_of(turn) * ROW_TABLE_BYTES;
    if (tile_of(turn) < TILES) units[turn & 1].lay_out(shared_address(place), unit);
    if (tile_of(turn) >= TILES || unit >= EIGHT_UNITS) continue;
    u8* to = place + AT_ROW_BYTES + unit / 16 * 32 + unit % 16;
    to[0] = (u8)numbers[turn & 1], to[16] = (u8)(numbers[turn & 1] >> 8);
  }
}

// Tables into shared memory: all of them, or with one table per row those of ROWS rows. `table_of` is where a row's begins.
template <int ROWS>
INLINE void fetch_tables(const u16* table, int tables, u16* room, int first_tile, int thread, int threads) {
  if constexpr (TABLE) {
    const int entries = (TABLE == 2 ? ROWS : tables) << BITS;
    const int most = tables << BITS, start = TABLE == 2 ? (first_tile * 16) << BITS : 0;
    for (int i = thread; i < entries; i += threads) room[i] = start + i < most ? table[start + i] : (u16)0;
  }
}
INLINE u32 table_of(u32 room, int tile, int row) { return TABLE == 2 ? room + ((tile * 16 + row) * (2 << BITS)) : room; }

// A table that a group picks: its number, and in bit 7 that its numbers are taken with the other sign, which the scale does. What
// lies beside row tiles that do not exist may be anything: no number leads out of the tables.
INLINE int picked(u8 pick) { return PAIRED ? pick & (TABLES - 1) : min(pick & 0x7F, TABLES - 1); }
INLINE float with_sign_of(float scale, u8 pick) { return __uint_as_float(__float_as_uint(scale) ^ (u32)(pick & 0x80) << 24); }

// ---- A lane's words of a tile ----------------------------------------------------------------------------------------
// 4-bit limbs in two pieces of 16 bytes a lane, 2-bit limbs in one, 1-bit limbs in one of 8 bytes; 3 bits in one of each.
template <typename LoadWide, typename LoadNarrow>
INLINE void load_words(const u8* tile, int lane, u32* words, LoadWide wide, LoadNarrow narrow) {
  constexpr int wides = WORDS / 4;
  UNROLL for (int piece = 0; piece < wides; piece++) {
    const uint4 v = wide((const uint4*)(tile + 512 * piece) + lane);
    words[4 * piece] = v.x, words[4 * piece + 1] = v.y, words[4 * piece + 2] = v.z, words[4 * piece + 3] = v.w;
  }
  if constexpr (WORDS % 4 != 0) {
    const uint2 v = narrow((const uint2*)(tile + 512 * wides) + lane);
    words[4 * wides] = v.x, words[4 * wides + 1] = v.y;
  }
}
INLINE void load_words_from_global(const u8* tile, int lane, u32* words) {
  load_words(tile, lane, words, [](const uint4* p) { return load_once(p); }, [](const uint2* p) { return load_once(p); });
}
INLINE void load_words_from_shared(const u8* tile, int lane, u32* words) {
  load_words(tile, lane, words, [](const uint4* p) { return *p; }, [](const uint2* p) { return *p; });
}

// ---- Scales and zero points ------------------------------------------------------------------------------------------
// Of a run of groups of one row tile: [group][16 rows] scales, then zero points, then table numbers.
// SCALE: 0 bfloat16, 1 float16, 2 float32, 3 e5m3 without subnormals, 4 e8m0, which are bytes; more: bit planes.
constexpr int SCALE_BYTES = PLANES ? PLANE_SCALE_BYTES : SCALE >= 3 ? 1 : SCALE == 2 ? 4 : 2;
constexpr int ZERO_BYTES = ZERO == 0 ? 0 : ZERO == 1 ? 1 : PLANES ? 2 : SCALE_BYTES;  // ZERO: 0 none, 1 uint8, 2 as the scales
constexpr int PICK_BYTES = TABLE == 3 ? 1 : 0;
constexpr int E5M3_BIAS = 10;
INLINE float read_scale(const u8* p, int i) {
  if constexpr (SCALE == 4) return __uint_as_float((u32)p[i] << 23);  // the least, 2^-127, becomes 0
  // The bits of 2^-127 * the number, brought to size by a product: so a byte of 0 is 0.
  if constexpr (SCALE == 3) return __uint_as_float((u32)p[i] << 20) * __uint_as_float((254 - E5M3_BIAS) << 23);
  if constexpr (SCALE == 2) return ((const float*)p)[i];
  return SCALE == 1 ? from_fp16(((const u16*)p)[i]) : from_bf16(((const u16*)p)[i]);
}
// A scale as a pair for `decode_floats`: times 2^(FLOAT_SHRINK - SCALED_SHRINK), the most that the type holds.
constexpr int SCALED_SHRINK = 8;
INLINE u32 scale_pair(const u8* p, int i) {
  constexpr int digits = SCALE == 3 ? 3 : 0, own_bias = SCALE == 3 ? E5M3_BIAS : 127;
  constexpr int bias = FLOAT_SHRINK - SCALED_SHRINK + EXPONENT_BIAS - own_bias;
  return p[i] * both(1u << (MANTISSA - digits)) + both((u32)bias << MANTISSA);
}
INLINE float read_zero(const u8* p, int i) {
  if constexpr (ZERO == 1) return (float)p[i];
  return read_scale(p, i);
}
// The group of the first column of a run; one group when scales are per channel.
INLINE int group_of(int tile, int run) {
  if constexpr (GROUP == 0) return 0;
  constexpr int size = GROUP ? GROUP : 1;
  if constexpr (128 % size == 0) return tile * (128 / size) + run * RUN / size;
  return (u32)(tile * 128 + run * RUN) / size;
}
