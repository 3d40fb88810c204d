// From packed codes to the A fragment of one k16 step: four registers of two 16-bit weights, w = (u - z) * s.
//
// A lane owns rows g = lane/4 and g+8 of its 16-row tile and, of every 16 columns, 2t, 2t+1, 2t+8, 2t+9 (t = lane%4).
// Register i holds row g + 8*(i%2), columns 2t + 8*(i/2) and the next one in its low and high half. The layout puts the
// eight codes so that register i's two codes lie 16 bits apart: one shift and one `(word & mask) | magic` bring both
// to the low mantissa bits of a number whose unit in the last place is 1 (128 in bfloat16, 1024 in float16). Then
//     u + magic  --subtract magic + z-->  u - z, exact   --multiply by s-->  one rounding, as a dense 16-bit weight has.
// Four instructions for two weights. Widths of 5 to 7 are stored as limbs of 4, 2 and 1 bits: each more limb
// costs a shift and an and-or. 8 bits overflow bfloat16's mantissa: their two limbs are joined by an exact
// multiply-add. Floating zero points go through float32: (u - z) * s is then rounded once, whatever z is. Codes that stand
// for the entries of a table of 16 or 256 numbers are looked up in shared memory, one 16-bit load each, or a pair at a time. Floats (FLOATS) lie
// in their words as pack/tile_orders.py says: masked they are the number times a power of two, which the scale takes back.
//
// Set from outside: BITS 1..8; GROUP columns that share a scale (0: all of them); FLOATS; ACTIVATION, SCALE, ZERO, TABLE below.

#pragma once
#include "hopper.cuh"
#include "tables.cuh"
#include "entries.cuh"

#ifndef INT8
#define INT8 0
#endif
#ifndef OUTLIERS
#define OUTLIERS 0
#endif

enum Number { BF16 = 0, FP16 = 1, FP32 = 2, E5M3 = 3, E8M0 = 4 };  // the last two for scales: kernels/gemm/block_scales.py; more: planes.cuh
enum Zero { SYMMETRIC = 0, INTEGER = 1, FLOATING = 2 };
enum Table { UNIFORM = 0, ONE_TABLE = 1, TABLE_PER_ROW = 2, TABLE_PER_GROUP = 3 };

constexpr int FOURS = BITS == 8 ? 2 : BITS >= 4 ? 1 : 0;  // limbs of four bits
constexpr int THREES = BITS == 3;  // whole codes of three bits
constexpr int TWOS = (BITS >> 1) & 1 & (BITS != 8) & !THREES;
constexpr int ONES = BITS & 1 & !THREES;
constexpr int TILE_BYTES = 256 * BITS;  // 16 rows x 128 columns
constexpr u32 MAGIC = ACTIVATION == BF16 ? 0x4300 : 0x6400;
constexpr bool WIDE = ACTIVATION == BF16 && BITS == 8;

constexpr u32 both(u32 half) { return half * 0x10001u; }

FN u32 and_or(u32 v, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
    return d;
}
FN u32 and_xor(u32 v, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
    return d;
}
FN u32 pair_sub(u32 a, u32 b) {
    u32 d;
    if constexpr (ACTIVATION == BF16) asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
FN u32 pair_mul(u32 a, u32 b) {
    u32 d;
    if constexpr (ACTIVATION == BF16) asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
FN u32 pair_fma(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (ACTIVATION == BF16) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// Two float32 rounded to the activations' type.
FN u32 pair_of(float low, float high) {
    u32 d;
    if constexpr (ACTIVATION == BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
FN float float_of_half(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
FN float low_of(u32 pair) { return ACTIVATION == BF16 ? __uint_as_float(pair << 16) : float_of_half((u16)pair); }
FN float high_of(u32 pair) {
    return ACTIVATION == BF16 ? __uint_as_float(pair & 0xFFFF0000u) : float_of_half((u16)(pair >> 16));
}

FN u32 add_pairs(u32 a, u32 b) { return pair_fma(a, both(ACTIVATION == BF16 ? 0x3F80 : 0x3C00), b); }

#include "floats.cuh"
#include "planes.cuh"

// ---- scales and zero points ----------------------------------------------------------------------------------------------

constexpr int SCALE_SIZE = PLANES ? PLANE_SCALE_BYTES : SCALE >= E5M3 ? 1 : SCALE == FP32 ? 4 : 2;
constexpr int SCALE_BYTES = 16 * SCALE_SIZE;  // the scales of 16 rows for one group
// Beside them lie zero points, or the numbers of the tables.
constexpr int ZERO_BYTES = TABLE == TABLE_PER_GROUP ? 16 : ZERO == SYMMETRIC ? 0 : ZERO == INTEGER ? 16 : PLANES ? 32 : SCALE_BYTES;
constexpr int ENTRY_BYTES = 2;
// Tables of 16 as `tables.cuh` has them: one or two for all rows as pairs, one for each row half in registers and half as pairs.
constexpr bool PAIRED = BITS == 4 && (TABLE == ONE_TABLE || (TABLE == TABLE_PER_GROUP && TABLES <= 2));
constexpr bool BY_ROWS = BITS == 4 && TABLE == TABLE_PER_ROW;
// One of 256 has a copy for every lane (entries.cuh).
constexpr bool COPIED = BITS == 8 && TABLE == ONE_TABLE;
constexpr int TABLE_SIZE = PAIRED ? PAIR_BYTES : COPIED ? ENTRIES_BYTES : BY_ROWS ? EIGHT_BYTES / 16 : ENTRY_BYTES << BITS;
// Codes of one bit that are signs: 2 u - 1.
constexpr bool SIGNS = BITS == 1 && FLOATS;

// A float's register is the number times 2^-FLOAT_SHRINK; a scale of a byte takes that back but for 2^-SCALED_SHRINK, exactly.
constexpr bool SCALED_FLOATS = FLOATS && (SCALE == E5M3 || (SCALE == E8M0 && ACTIVATION == BF16));
constexpr int MANTISSA = ACTIVATION == BF16 ? 7 : 10, EXPONENT_BIAS = ACTIVATION == BF16 ? 127 : 15;
constexpr int E5M3_BIAS = 10, FLOAT_SHRINK = EXPONENT_BIAS - FLOAT_BIAS, SCALED_SHRINK = 8;
FN u32 scale_pair(const u8* scales, int row) {
    constexpr int digits = SCALE == E5M3 ? 3 : 0, own_bias = SCALE == E5M3 ? E5M3_BIAS : 127;
    constexpr int bias = FLOAT_SHRINK - SCALED_SHRINK + EXPONENT_BIAS - own_bias;
    return scales[row] * both(1u << (MANTISSA - digits)) + both((u32)bias << MANTISSA);
}

// Entry `index` of numbers stored in the scales' type.
FN float stored_number(const u8* numbers, int index) {
    if constexpr (SCALE == E8M0) return __uint_as_float((u32)numbers[index] << 23);
    if constexpr (SCALE == E5M3) return __uint_as_float((u32)numbers[index] << 20) * __uint_as_float((254 - E5M3_BIAS) << 23);
    if constexpr (SCALE == FP32) return ((const float*)numbers)[index];
    const u16 raw = ((const u16*)numbers)[index];
    return SCALE == BF16 ? __uint_as_float((u32)raw << 16) : float_of_half(raw);
}

// What one group does to the lane's two rows: as pairs for 16-bit arithmetic, as float32 where zeros are floating.
struct GroupOf2Rows {
    u32 scale[2], zero[2];
    float scale_f[2], offset_f[2];
    u32 table[2];  // places in shared memory, for pairs as addresses; the caller sets those that no group changes
    RowTable own;  // of row g
    PlaneTable planes[2];
};
constexpr u32 CENTRE = 1u << (BITS - 1);

FN u32 zero_pair(u32 z) { return WIDE ? pair_of((float)z, (float)z) : both(MAGIC + z); }

// `scales` and `zeros` point at the 16 rows' numbers of one group; `tables` is the first table's place.
FN void read_group(GroupOf2Rows& group, const u8* scales, const u8* zeros, u32 tables, int row, bool scaled) {
    if constexpr (PLANES) return read_planes<MANY_MADE>(group.planes, scales, zeros, row);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row + 8 * h;
        if (TABLE == TABLE_PER_GROUP) group.table[h] = tables + (zeros[r] & 0x7F) * TABLE_SIZE;
        if (ZERO == INTEGER) group.zero[h] = zero_pair(zeros[r]);
        if (ZERO == SYMMETRIC) group.zero[h] = zero_pair(CENTRE);
        if (ZERO != FLOATING && scaled) {
            if constexpr (SCALED_FLOATS) group.scale[h] = scale_pair(scales, r);
            else if constexpr (SCALE == ACTIVATION) group.scale[h] = both(((const u16*)scales)[r]);
            else group.scale[h] = pair_of(stored_number(scales, r), stored_number(scales, r));
            if (TABLE == TABLE_PER_GROUP) group.scale[h] ^= (zeros[r] & 0x80) * 0x01000100u;  // numbers with the other sign
        }
        if (ZERO == FLOATING) {
            group.scale_f[h] = scaled ? stored_number(scales, r) : 1.0f;
            group.offset_f[h] = -stored_number(zeros, r) * group.scale_f[h];
        }
    }
}

// ---- codes ---------------------------------------------------------------------------------------------------------------

// A lane's codes of half a tile, 64 columns, four k16 steps.
struct Codes {
    u32 four[FOURS ? FOURS : 1][4], three[3], two[2], one;
};

FN void read_codes(Codes& codes, const u8* tile, int half, int lane) {
#pragma unroll
    for (int limb = 0; limb < FOURS; limb++) {
        const uint4 v = *(const uint4*)(tile + 1024 * limb + 512 * half + 16 * lane);
        codes.four[limb][0] = v.x, codes.four[limb][1] = v.y, codes.four[limb][2] = v.z, codes.four[limb][3] = v.w;
    }
    if (THREES) {
        const uint4 v = *(const uint4*)(tile + 16 * lane);
        const uint2 last = half ? *(const uint2*)(tile + 512 + 8 * lane) : make_uint2(v.y, v.z);
        codes.three[0] = half ? v.w : v.x, codes.three[1] = last.x, codes.three[2] = last.y;
    }
    if (TWOS) {
        const uint2 v = *(const uint2*)(tile + 1024 * FOURS + 16 * lane + 8 * half);
        codes.two[0] = v.x, codes.two[1] = v.y;
    }
    if (ONES) codes.one = *(const u32*)(tile + 1024 * FOURS + 512 * TWOS + 8 * lane + 4 * half);
}

// The words of codes that are not cut into limbs.
FN const u32* words_of(const Codes& codes) { return FOURS ? codes.four[0] : THREES ? codes.three : TWOS ? codes.two : &codes.one; }

// The `width`-bit fields at bit `from` of both halves of `word`, brought to bit `to` and put into `bits`.
FN u32 field(u32 word, int from, int to, int width, u32 bits) {
    const u32 moved = from >= to ? word >> (from - to) : word << (to - from);
    return and_or(moved, both(((1u << width) - 1) << to), bits);
}

// magic + u for the two codes of register i at step s of the half tile (u's low limb only where WIDE).
FN u32 magic_codes(const Codes& codes, int s, int i) {
    u32 v = both(MAGIC);
    if (FOURS) v = field(codes.four[0][s], 4 * i, 0, 4, v);
    if (FOURS == 2 && !WIDE) v = field(codes.four[FOURS - 1][s], 4 * i, 4, 4, v);
    if (THREES) {
        const int f = 4 * s + i;
        if (f < 15) return field(codes.three[f / 5], 3 * (f % 5), 0, 3, v);
        return field(codes.three[2], 15, 2, 1, field(codes.three[1], 15, 1, 1, field(codes.three[0], 15, 0, 1, v)));
    }
    if (TWOS) v = field(codes.two[s / 2], 8 * (s % 2) + 2 * i, 4 * FOURS, 2, v);
    if (ONES) v = field(codes.one, 4 * s + i, 4 * FOURS + 2 * TWOS, 1, v);
    return v;
}

// u - z for both codes, exact: |u - z| <= 255 needs eight bits, which both 16-bit types have.
FN u32 integers(const Codes& codes, int s, int i, u32 zero) {
    const u32 low = pair_sub(magic_codes(codes, s, i), zero);
    if constexpr (!WIDE) return low;
    // low = 128 + l - z; the upper limb h adds 16 * (h - 8), which takes the 128 away again.
    const u32 high = pair_sub(field(codes.four[FOURS - 1][s], 4 * i, 0, 4, both(MAGIC)), both(0x4308));
    return pair_fma(high, both(0x4180), low);
}

// Register i of step s of floats, times 2^-FLOAT_SHRINK.
FN u32 float_of_codes(const Codes& codes, int s, int i) {
    const u32 word = codes.four[BITS == 8 ? i / 2 * (FOURS - 1) : 0][s];
    const u32 v = placed_float(word, BITS == 6 ? codes.two[s / 2] : BITS == 5 ? codes.one : 0, s, i);
    return ACTIVATION == FP16 ? v + (v & FLOAT_MAGNITUDES) * 7 : v;  // three bits up
}

FN u32 load_pair(u32 place) {
    u32 pair;
    asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(place));
    return pair;
}
FN u32 load_entry(u32 place) {
    u16 number;
    asm("ld.shared.u16 %0, [%1];" : "=h"(number) : "r"(place));
    return number;
}
// The two table entries of register i at step s.
FN u32 looked_up(const Codes& codes, int s, int i, u32 table) {
    if constexpr (PAIRED) return load_pair(place_of_pair<PAIR_STEP>(codes.four[0][s], i, table));
    u32 entry[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const u32 low = codes.four[0][s], high = codes.four[FOURS ? FOURS - 1 : 0][s];
        if constexpr (COPIED) {
            entry[e] = load_entry(place_of_entry<ENTRY_STEP>(low, high, i, e, table));
        } else if constexpr (BITS == 8) {
            entry[e] = *(const u16*)(memory + place_of_entry<ENTRY_BYTES>(low, high, i, e, table));
        } else {
            const int bit = 8 * i + 4 * e;  // four bits lie in pairs: pack/tile_orders.py
            entry[e] = *(const u16*)(memory + table + ((bit ? low >> (bit - 1) : low << 1) & 0x1E));
        }
    }
    return __byte_perm(entry[0], entry[1], 0x5410);
}
FN void look_up(u32 (&a)[4], const Codes& codes, int s, const GroupOf2Rows& group) {
    if constexpr (BY_ROWS) {
        const u32* words = codes.four[0];
        look_up_eight(words[s | 1], s & 1, group.table[1], a[1], a[3]);
        look_up_row(words[s & ~1], s & 1, group.own, a[0], a[2]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = looked_up(codes, s, i, group.table[i % 2]);
    }
}

#if !INT8
typedef GroupOf2Rows Group;

// v * scale, plus what stands beside the codes (`tile_outliers.cuh`): one rounding, which takes no more instructions.
FN u32 scaled_pair(u32 v, u32 scale, u32 beside) { return OUTLIERS ? pair_fma(v, scale, beside) : pair_mul(v, scale); }

// The A fragment of step s; `scaled` false leaves the multiplication by s to whoever stores the result.
FN void decode(u32 (&a)[4], const Codes& codes, int s, const GroupOf2Rows& group, bool scaled, const uint4& added = uint4()) {
    const u32 beside[4] = {added.x, added.y, added.z, added.w};
    if constexpr (TABLE != UNIFORM) look_up(a, codes, s, group);
    if constexpr (PLANES) decode_planes(words_of(codes), s, group.planes, a);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (PLANES) {
            if (OUTLIERS) a[i] = add_pairs(a[i], beside[i]);
        } else if constexpr (SIGNS) {
            const int bit = 4 * s + i;
            const u32 minus = (scaled ? group.scale[i % 2] : both(EXPONENT_BIAS << MANTISSA)) ^ 0x80008000u;
            a[i] = and_xor(codes.one << (15 - bit), 0x80008000u, minus);
            if (OUTLIERS) a[i] = add_pairs(a[i], beside[i]);
        } else if constexpr (FLOATS) {
            const u32 placed = float_of_codes(codes, s, i);
            const u32 number = SCALED_FLOATS ? placed : pair_mul(placed, both((FLOAT_SHRINK + EXPONENT_BIAS) << MANTISSA));
            a[i] = scaled ? scaled_pair(number, group.scale[i % 2], beside[i]) : number;
        } else if constexpr (TABLE != UNIFORM) {
            if (scaled) a[i] = scaled_pair(a[i], group.scale[i % 2], beside[i]);
        } else if constexpr (ZERO == FLOATING) {
            const u32 u = integers(codes, s, i, zero_pair(0));
            const float scale = group.scale_f[i % 2], offset = group.offset_f[i % 2];
            const float low = fmaf(low_of(u), scale, offset), high = fmaf(high_of(u), scale, offset);
            a[i] = OUTLIERS ? pair_of(low + low_of(beside[i]), high + high_of(beside[i])) : pair_of(low, high);
        } else {
            const u32 whole = integers(codes, s, i, group.zero[i % 2]);
            a[i] = scaled ? scaled_pair(whole, group.scale[i % 2], beside[i]) : whole;
        }
    }
}
#endif
