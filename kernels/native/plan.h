// What one call works on, and the activations as the kernels read them.
//
// Columns are summed in segments that share one weight scale (and, with int8 activations, one activation scale):
//
//     y[m, n] = sum over segments s of  scale[n, group of s] * (dot(codes, x) - offset[n, group of s] * sum of x)
//
// A segment is the longest run of whole tiles that divides the group and is not longer than the arithmetic allows: sums
// of a bounded length keep float32 accurate. Groups that are not made of whole tiles (16, 48, ...) have segments of half a
// tile; with exact activations those of a group are summed on before its scale is applied (`run_from`). Activations are
// copied into [run of tiles][block of rows][tile][row][32 columns]: what meets a decoded panel lies together, and no two
// parts of it fight for a place in a cache. A row is one term of one token (see numerics.h); a block's missing rows are zeros.
#pragma once
#include "adding.h"
#include "int8.h"
#if defined(__AVX512BF16__)
#include "exact_bfloat.h"
#else
#include "exact_float.h"
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "pairs.h"
#endif

namespace aerogel {
namespace UNIT {

constexpr int64_t kBlockTiles = 8;  // of a decoded panel: 256 columns, which stay in the first-level cache

struct Plan {
    const Weight* weight;
    const Call* call;
    Columns columns;
    int64_t strips, tiles, segments, strip_bytes;
    int64_t segment_tiles;       // whole tiles of a segment; 0: segments are half tiles
    int64_t segments_per_group;
    int64_t longest_run;         // segments of half a tile that are summed at most before a scale is applied
    int64_t terms, tokens_per_block, blocks;
    int block_rows;
    Form form;       // what the loops take the codes for
    bool few;        // the loop for few rows runs it
    bool folded;     // decoded operands have their scales multiplied in, and segments know no groups
    bool moved;      // int8 activations have 128 added
    const Adding* adding;  // what is added to rows by those who made them, or null
    uint8_t* x;      // [run of kBlockTiles tiles][block][tile][row][row_bytes]
    float* x_sum;    // [block][segment][row]
    float* x_scale;  // [block][segment][row], int8 only
    int row_bytes;
    float factor_of_all;  // of the results, before the bias
    float bias;           // of the codes, see numerics.h
    alignas(64) uint8_t decoder[kDecoderBytes];  // see numerics.h

    int64_t group_of(int64_t segment) const {
        if (segment_tiles) return segment / segments_per_group;
        return group_of_half(segment);
    }
    // How many half tiles from `segment` on are summed before the scale of their group is applied.
    int64_t run_from(int64_t segment) const {
        const int64_t left = segments_per_group - segment % segments_per_group;
        return left < longest_run ? left : longest_run;
    }
    // The group of columns 16 * half ..; behind the last there are zeros to multiply, so any will do.
    int64_t group_of_half(int64_t half) const {
        const int64_t group = columns.group && columns.groups > 1 ? half * 16 / columns.group : 0;
        return group < columns.groups ? group : columns.groups - 1;
    }
    const uint8_t* x_at(int64_t block, int64_t tile) const {
        const int64_t first = tile / kBlockTiles * kBlockTiles, count = tiles - first < kBlockTiles ? tiles - first : kBlockTiles;
        return x + (blocks == 1 ? tile : first * blocks + block * count + tile - first) * block_rows * row_bytes;
    }
    int64_t factor(int64_t block, int64_t segment) const { return (block * segments + segment) * block_rows; }
};

inline int64_t segment_tiles(const Columns& columns, int64_t longest) {
    if (columns.groups == 1) return longest / kTile;
    if (columns.group % kTile) return 0;
    int64_t tiles = longest / kTile;
    while ((columns.group / kTile) % tiles) --tiles;
    return tiles;
}

// The segments of a plan, which know no groups where scales are folded.
template <class P>
inline void set_segments(Plan& plan, bool folded) {
    plan.folded = folded;
    plan.segment_tiles = folded ? P::kLongestSegment / kTile : segment_tiles(plan.columns, P::kLongestSegment);
    plan.segments = plan.segment_tiles ? ceil_div(plan.tiles, plan.segment_tiles) : 2 * plan.tiles;
    plan.segments_per_group = plan.columns.groups == 1 || folded ? plan.segments
                              : plan.segment_tiles               ? plan.columns.group / kTile / plan.segment_tiles
                                                                 : plan.columns.group / 16;
}

template <class P>
inline Plan make_plan(const Weight& weight, const Call& call) {
    Plan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.columns = columns_of(weight);
    plan.strips = ceil_div(weight.rows, kStrip), plan.tiles = ceil_div(plan.columns.count, kTile);
    plan.strip_bytes = plan.tiles * kVector * weight.bits;
    plan.terms = !P::kTerms || call.x_type == kBfloat16 ? 1 : call.x_type == kFloat16 ? 2 : 3;
    set_segments<P>(plan, false);
    plan.longest_run = P::kOperands == 1 ? 1 : P::kLongestSegment / 16;
    plan.row_bytes = 8 * P::kOperands * P::kWordBytes;
    return plan;
}

// Sum of sixteen lanes, always in the same order.
INLINE float lane_sum(const F16& v) {
    float lanes[16];
    store(lanes, v);
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// Where 16 columns of a plan lie among those of the weight, and how many of them there are; fewer where a group is filled up.
struct Sixteen {
    int64_t first, count;
};
inline Sixteen sixteen_at(const Plan& plan, int64_t begin) {
    const int64_t columns = plan.weight->columns, group = plan.weight->group;
    int64_t first = begin, stop = columns;
    if (plan.columns.group != group) {
        const int64_t number = begin / plan.columns.group;
        first = number * group + begin % plan.columns.group;
        if ((number + 1) * group < columns) stop = (number + 1) * group;
    }
    const int64_t left = stop - first;
    return {first, left < 0 ? 0 : left < 16 ? left : 16};
}

// 32 columns of a token from column `begin` on as floats, zeros after the last.
INLINE void read_tile(const Plan& plan, int64_t token, int64_t begin, float* to) {
    const int64_t row = token * plan.weight->columns;
    if (plan.columns.group == plan.weight->group && begin + kTile <= plan.weight->columns) {
        store(to, load_floats(plan.call->x, row + begin, plan.call->x_type));
        store(to + 16, load_floats(plan.call->x, row + begin + 16, plan.call->x_type));
        return;
    }
    for (int64_t half = 0; half < kTile; half += 16) {
        const Sixteen at = sixteen_at(plan, begin + half);
        if (at.count == 16) {
            store(to + half, load_floats(plan.call->x, row + at.first, plan.call->x_type));
            continue;
        }
        for (int64_t k = 0; k < 16; ++k) {
            to[half + k] = k < at.count ? read_float(plan.call->x, row + at.first + k, plan.call->x_type) : 0.0f;
        }
    }
}

#if defined(__AVX512BF16__)
// The leading bfloat16 of 32 floats, in the order [4t, 4t+2, 4t+1, 4t+3] that the operands have; what is left stays.
INLINE void split_term(float* values, uint8_t* to, bool last) {
    alignas(64) static const uint16_t order[32] = {1,  5,  3,  7,  9,  13, 11, 15, 17, 21, 19, 23, 25, 29, 27, 31,
                                                   33, 37, 35, 39, 41, 45, 43, 47, 49, 53, 51, 55, 57, 61, 59, 63};
    __m512 value[2];
    __m512i high[2];
    for (int i = 0; i < 2; ++i) {
        value[i] = _mm512_loadu_ps(values + 16 * i);
        high[i] = _mm512_and_si512(_mm512_castps_si512(value[i]), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
        // A NaN must not lose the bits that make it one.
        high[i] = _mm512_mask_or_epi32(high[i], _mm512_cmp_ps_mask(value[i], value[i], _CMP_UNORD_Q), high[i],
                                       _mm512_set1_epi32(0x00400000));
        if (!last) {
            const __mmask16 finite = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(value[i], 0x99));
            _mm512_storeu_ps(values + 16 * i, _mm512_maskz_sub_ps(finite, value[i], _mm512_castsi512_ps(high[i])));
        }
    }
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(high[0], _mm512_load_si512(order), high[1]));
}
#endif

#if defined(__AVX512BF16__)
// 32 columns of a token that is bfloat16 already, zeros after the last; and the same where groups are filled up.
INLINE __m512i bfloats_at(const uint16_t* from, int64_t begin, int64_t columns) {
    const int64_t left = columns - begin;
    return _mm512_maskz_loadu_epi16(left >= kTile ? 0xffffffffu : left > 0 ? (1u << left) - 1u : 0u, from + begin);
}
inline __m512i bfloats_of_halves(const Plan& plan, const uint16_t* from, int64_t begin) {
    __m256i half[2];
    for (int i = 0; i < 2; ++i) {
        const Sixteen at = sixteen_at(plan, begin + 16 * i);
        half[i] = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << at.count) - 1u), from + at.first);
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

// `place_exact` of such a token: its numbers only change their order, and are summed in pairs.
inline void place_bfloats(const Plan& plan, int64_t token, int64_t first, int64_t count) {
    alignas(64) static const uint16_t order[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,  11, 12, 14, 13, 15,
                                                   16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
    const int64_t block = token / plan.tokens_per_block, row = token % plan.tokens_per_block, columns = plan.weight->columns;
    const uint16_t* from = static_cast<const uint16_t*>(plan.call->x) + token * columns;
    const __m512i places = _mm512_load_si512(order), ones = _mm512_set1_epi16(0x3f80);
    const bool filled = plan.columns.group != plan.weight->group;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t tile = first; tile < first + count; ++tile) {
        const __m512i values = filled ? bfloats_of_halves(plan, from, tile * kTile) : bfloats_at(from, tile * kTile, columns);
        uint8_t* to = const_cast<uint8_t*>(plan.x_at(block, tile)) + row * plan.row_bytes;
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, values));
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(values), reinterpret_cast<__m512bh>(ones));
    }
    float* to = plan.x_sum + plan.factor(block, plan.segment_tiles ? first / plan.segment_tiles : 2 * first) + row;
    if (plan.segment_tiles) {
        *to = _mm512_reduce_add_ps(sum);
    } else {
        to[0] = _mm512_mask_reduce_add_ps(0x00ff, sum);
        to[plan.block_rows] = _mm512_mask_reduce_add_ps(0xff00, sum);
    }
}
#endif

// Places a run of tiles of one token, which is one segment, or one tile that is two, with its sums.
template <bool PAIRS>
inline void place_exact(const Plan& plan, int64_t token, int64_t first, int64_t count) {
    const int64_t block = token / plan.tokens_per_block, row = token % plan.tokens_per_block * plan.terms;
    F16 sums[3][2];
    for (auto& sum : sums) sum[0] = sum[1] = zero_f();
    for (int64_t tile = first; tile < first + count; ++tile) {
        float values[kTile];
        read_tile(plan, token, tile * kTile, values);
        for (int64_t term = 0; term < plan.terms; ++term) {
            uint8_t* to = const_cast<uint8_t*>(plan.x_at(block, tile)) + (row + term) * plan.row_bytes;
            float part[kTile];
            memcpy(part, values, sizeof part);
#if defined(__AVX512BF16__)
            split_term(values, to, term + 1 == plan.terms);
            if (term + 1 < plan.terms) {
                for (int k = 0; k < kTile; ++k) part[k] -= values[k];
            }
#else
            if constexpr (PAIRS) {
                for (int k = 0; k < kTile; k += 4) {
                    const float swapped[4] = {part[k], part[k + 2], part[k + 1], part[k + 3]};
                    memcpy(to + 4 * k, swapped, sizeof swapped);
                }
            } else {
                memcpy(to, part, sizeof part);
            }
#endif
            sums[term][0] = sums[term][0] + load<F16>(part);
            sums[term][1] = sums[term][1] + load<F16>(part + 16);
        }
    }
    const int64_t segment = plan.segment_tiles ? first / plan.segment_tiles : 2 * first;
    for (int64_t term = 0; term < plan.terms; ++term) {
        float* to = plan.x_sum + plan.factor(block, segment) + row + term;
        if (plan.segment_tiles) {
            *to = lane_sum(sums[term][0] + sums[term][1]);
        } else {
            to[0] = lane_sum(sums[term][0]);
            to[plan.block_rows] = lane_sum(sums[term][1]);
        }
    }
}

// How a run of tiles of a token is rounded: values times `inverse`; `scale` undoes it and is not a number where one of them
// is not finite.
struct Rounding {
    float inverse, scale;
};

inline Rounding rounding_of(const Plan& plan, int64_t token, int64_t first, int64_t count) {
    float values[kTile];
    F16 largest = zero_f(), poison = zero_f();
    for (int64_t i = 0; i < count; ++i) {
        read_tile(plan, token, (first + i) * kTile, values);
        for (int half = 0; half < 2; ++half) {
            const F16 part = load<F16>(values + 16 * half);
            largest = larger(magnitude(part), largest);
            poison = multiply_add(part, zero_f(), poison);  // stays 0, unless something is infinite or not a number
        }
    }
    const float peak = largest_of(largest);
    // Anything smaller would make the inverse overflow; it rounds to 0 with scale 1.
    const float unit = peak > 1e-30f ? peak / 127.0f : 1.0f;
    return {1.0f / unit, unit + total_of(poison)};
}

// The same, rounded to s * [-127, 127] with s = max|x| / 127 over the run, or over the token.
inline void place_int8(const Plan& plan, int64_t token, int64_t first, int64_t count, const Rounding& rounding) {
    const int64_t block = token / plan.tokens_per_block, row = token % plan.tokens_per_block;
    const float scale = rounding.scale;
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits, ties to even.
    const F16 inverse = spread<F16>(rounding.inverse), magic = spread<F16>(12582912.0f);
    const I16 moved = spread<I16>(plan.moved ? 0x80 : 0), base = spread<I16>(0x4b400000);
    float values[kTile];
    I16 sums[2] = {zero_i(), zero_i()};
    for (int64_t i = 0; i < count; ++i) {
        read_tile(plan, token, (first + i) * kTile, values);
        uint8_t* to = const_cast<uint8_t*>(plan.x_at(block, first + i)) + row * plan.row_bytes;
        for (int half = 0; half < 2; ++half) {
            const I16 rounded = bits_of(multiply_add(load<F16>(values + 16 * half), inverse, magic)) - base;
            store_bytes(to + 16 * half, rounded ^ moved);
            sums[half] = sums[half] + rounded;
        }
    }
    const float low = total_of(to_float(sums[0])), high = total_of(to_float(sums[1]));  // exact: integers below 2^24
    const int64_t segment = plan.segment_tiles ? first / plan.segment_tiles : 2 * first;
    float* sum_to = plan.x_sum + plan.factor(block, segment) + row;
    float* scale_to = plan.x_scale + plan.factor(block, segment) + row;
    scale_to[0] = scale;
    if (plan.segment_tiles) {
        sum_to[0] = low + high;
    } else {
        sum_to[0] = low;
        sum_to[plan.block_rows] = high;
        scale_to[plan.block_rows] = scale;
    }
}

template <class P>
inline void place_token(const Plan& plan, int64_t token) {
    const int64_t step = plan.segment_tiles ? plan.segment_tiles : 1;
    const bool whole = plan.call->numerics == kInt8Token;
    const Rounding of_token = whole ? rounding_of(plan, token, 0, plan.tiles) : Rounding{};
    for (int64_t first = 0; first < plan.tiles; first += step) {
        const int64_t count = plan.tiles - first < step ? plan.tiles - first : step;
        if constexpr (P::kOperands == 1) {
            place_int8(plan, token, first, count, whole ? of_token : rounding_of(plan, token, first, count));
        } else {
#if defined(__AVX512BF16__)
            if (plan.call->x_type == kBfloat16) {
                place_bfloats(plan, token, first, count);
                continue;
            }
#endif
            place_exact<P::kOnlyOneRow>(plan, token, first, count);
        }
    }
}

}  // namespace UNIT
}  // namespace aerogel
