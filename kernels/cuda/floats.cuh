// Small floats without a table: a 16-bit float whose sign is bit 15, whose exponent begins at bit 7 and whose upper mantissa bits are
// the code's is the number times a power of two, subnormals included. The layouts (pack/tile_orders.py) put a word's bits so that
// few shifts and masks bring both halves of a register there.
//
// Defines used: BITS (4, 5, 6 or 8; 1 where the sign is all, which is decoded elsewhere) and FLOATS, how many of them are mantissa; one is
// the sign. `and_or` comes from whoever includes this.

#pragma once

constexpr int FLOAT_LOW = 7 - FLOATS, FLOAT_TOP = FLOAT_LOW + 4;  // where the mantissa begins, and the fifth bit of a magnitude lies
constexpr int FLOAT_BIAS = FLOATS && BITS > 1 ? (1 << (BITS - 2 - FLOATS)) - 1 : 0;
constexpr u32 FLOAT_SIGNS = 0x80008000u, FLOAT_MAGNITUDES = (((1u << (BITS - 1)) - 1) << FLOAT_LOW) * 0x00010001u;

// Register i of step s, as bfloat16 times 2^(FLOAT_BIAS - 127). `word` holds its four lowest bits, or of eight bits all of them; `rest` the
// one or two others.
static __device__ __forceinline__ u32 placed_float(u32 word, u32 rest, int s, int i) {
  const u32 around = __funnelshift_r(word, word, 4);
  if (BITS == 4 && i == 3) return and_or(word >> 6, 0x01000100u, (word << 2) & 0x80C080C0u);
  if (BITS == 4) return (i == 1 ? word << 6 : i == 2 ? around : word) & (FLOAT_SIGNS | FLOAT_MAGNITUDES);
  if (BITS == 8 && i % 2 == 0) return word & (FLOAT_SIGNS | FLOAT_MAGNITUDES);
  if (BITS == 8 && FLOATS == 3) return and_or(around, 0x87808780u, (word << 4) & 0x00700070u);
  if (BITS == 8) return and_or(word << 11, FLOAT_SIGNS, and_or(word >> 3, 0x0E000E00u, (word << 5) & 0x01E001E0u));
  const int right = 4 * i - FLOAT_LOW, place = 4 * (s % 2) + i;
  const u32 low = (right >= 0 ? word >> right : word << -right) & ((0xFu << FLOAT_LOW) * 0x00010001u);
  if (BITS == 5) return and_or(rest << (15 - 4 * (s % 4) - i), FLOAT_SIGNS, low);
  constexpr u32 top = (1u << FLOAT_TOP) * 0x00010001u;
  if (place > FLOAT_TOP - 8) return and_or(rest << place, FLOAT_SIGNS | top, low);
  return and_or(rest << place, FLOAT_SIGNS, and_or(rest << (8 + place), top, low));
}
