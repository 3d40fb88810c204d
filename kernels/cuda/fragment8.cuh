// From packed codes to the A fragment of one k32 step of the integer tensor cores: four registers of four signed bytes.
//
// Register j holds row g + 8 * (j % 2), bytes 4t .. 4t+3 of 16 columns of the step, the second 16 where j >= 2. The layout of
// the codes was made for 16-bit numbers: of 16 columns a lane has 2t, 2t+8, 2t+1, 2t+9, and a word holds a row's four codes
// in the low halves of its four bytes, in this order. So a mask is a fragment, if only the activations stand in the same
// order: `quantize.cu` writes them so, and a sum does not mind the order of its terms.
//
// Per channel the byte is u - z itself, and its scale waits for the end. With groups a second step brings all groups of a row
// to one scale, so that the tensor cores can add along the whole of K in integers (two-step dequantisation: QQQ, MixLLM):
//
//     w8 = round((u - z) * s / r),  r = the largest |u - z| * |s| that the row's codes could stand for / 126
//        = floor((u * m + c) / 256),  m = 2 * round(128 * s / r),  c = 129 - z * m
//
// Two codes are multiplied at once, 16 bits apart. m is even and c is odd, so the sum is never a multiple of 256, and what the
// lower one borrows from the upper one (1/256 of a unit) never changes its upper byte. 126 and not 127, so that the rounding
// of m never carries a sum beyond 16 bits. Error: half a unit of r, 0.4 % of the row's range, where a 4-bit code is off by up
// to 7 %; the rounding of m adds |u - z| / 256 of a unit at most, 1/16 at 4 bits.

#pragma once
#include "wgmma_work.cuh"

struct Group {
    float to_m[2];   // 128 / r of the lane's two rows
    u32 m[2], c[2];  // c in both halves
};

FN u32 four_times(u32 byte) { return byte * 0x01010101u; }

// `row_scale` is r of the lane's first row; the second lies 8 further.
FN void read_rows_of(Group& group, const float* row_scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) group.to_m[h] = GROUPED ? 128.0f / row_scale[8 * h] : 0.0f;
}

FN void read_group(Group& group, const u8* scales, const u8* zeros, u32, int row, bool scaled) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int z = ZERO == INTEGER ? zeros[row + 8 * h] : CENTRE;
        if (!scaled) {
            group.c[h] = four_times(z);
            continue;
        }
        const int m = 2 * __float2int_rn(stored_number(scales, row + 8 * h) * group.to_m[h]);
        group.m[h] = m, group.c[h] = (129 - z * m) * 0x10001;
    }
}

// Code f of the half tile in both half words, for three bits.
FN u32 pair_of_codes(const Codes& codes, int f) {
    if (f < 15) return codes.three[f / 5] >> 3 * (f % 5) & 0x00070007u;
    return codes.three[0] >> 15 & 0x00010001u | codes.three[1] >> 14 & 0x00020002u | codes.three[2] >> 13 & 0x00040004u;
}

// The codes of row half `h` in 16 columns, step s of the half tile: one in the low bits of each byte.
FN u32 bytes_of(const Codes& codes, int s, int h) {
    u32 v = 0;
    if (THREES) return pair_of_codes(codes, 4 * s + h) | pair_of_codes(codes, 4 * s + h + 2) << 8;
    if (FOURS) v = codes.four[0][s] >> (4 * h) & 0x0F0F0F0Fu;
    if (FOURS == 2) v |= codes.four[FOURS - 1][s] << (4 - 4 * h) & 0xF0F0F0F0u;
    if (TWOS) {
        const u32 w = codes.two[s / 2] >> (8 * (s % 2) + 2 * h);
        v |= ((w & 0x00030003u) | (w & 0x00300030u) << 4) << (4 * FOURS);
    }
    if (ONES) {
        const u32 w = codes.one >> (4 * s + h);
        v |= ((w & 0x00010001u) | (w & 0x00040004u) << 6) << (4 * FOURS + 2 * TWOS);
    }
    return v;
}

// u - z for four bytes at once: with the top bit set no byte borrows from the next; taking it away again leaves the sign.
FN u32 centred(u32 u, u32 z) { return BITS == 8 ? u ^ 0x80808080u : ((u | 0x80808080u) - z) ^ 0x80808080u; }

// The A fragment of step s, 0 or 1, of the half tile.
FN void decode(u32 (&a)[4], const Codes& codes, int s, const Group& group, bool scaled) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int h = j % 2;
        const u32 u = bytes_of(codes, 2 * s + j / 2, h);
        if (!scaled) {
            a[j] = centred(u, group.c[h]);
            continue;
        }
        const u32 even = (u & 0x00FF00FFu) * group.m[h] + group.c[h], odd = (u >> 8 & 0x00FF00FFu) * group.m[h] + group.c[h];
        a[j] = __byte_perm(even, odd, 0x7351);
    }
}
