// The inner loop for few rows of activations: codes are decoded in registers and meet every row. R strips are taken together, so
// that enough sums are under way to hide the latency of the dot product. A segment is summed in registers, then its scale applied
// in float32. Many rows have another loop (panel.h).
//
// Instructions for 128 weights of 4 bits and one row on AVX-512: 1 load, 7 shifts and permutations, 4 dot products.
#pragma once
#include "plan.h"

namespace aerogel {
namespace UNIT {

// Scale and offset of a strip in a group, and how a finished segment joins the total.
struct Factors {
    F16 scale, offset;
};

INLINE Factors factors_of(const Plan& plan, int64_t strip, int64_t group, float bias) {
    const Weight& weight = *plan.weight;
    const int64_t at = (strip * plan.columns.groups + group) * kStrip;
    Factors f;
    f.scale = weight.scale_type < kFloat8E4m3 ? load_floats(weight.scale, at, weight.scale_type)
                                              : load_small(static_cast<const uint8_t*>(weight.scale) + at, weight.scale_type);
    f.offset = spread<F16>(bias);
    if (weight.zero) f.offset = f.offset + load_bytes(static_cast<const int8_t*>(weight.zero) + at);
    return f;
}

// What the picks of a strip in a group add to the indices of its codes.
template <class P, int BITS, Form FORM>
INLINE U16 picks_of(const Plan& plan, int64_t strip, int64_t group) {
    if constexpr (FORM == kTables) {
        const uint8_t* pick = static_cast<const uint8_t*>(plan.weight->pick);
        if (pick) {
            const U16 byte = load_lanes(pick + (strip * plan.columns.groups + group) * kStrip);
            U16 added;
            repeat<kParts>([&](int p) ALWAYS { added.part[p] = byte.part[p] * P::template pick_step<BITS>(); });
            return added;
        }
    }
    return spread<U16>(0u);
}

template <class P>
INLINE F16 joined(const typename P::Accumulator& sum, const F16& total, const Factors& f, bool offset, float x_sum, float x_scale) {
    F16 value = P::value(sum);
    if (offset) value = value - f.offset * spread<F16>(x_sum);
    if constexpr (P::kOperands == 1) return multiply_add(value, f.scale * spread<F16>(x_scale), total);
    return multiply_add(value, f.scale, total);
}

// COUNT steps from step FIRST on of a tile of R strips against M rows. CHAINS sums take turns.
template <class P, int BITS, Form FORM, int R, int M, int CHAINS, int FIRST, int COUNT>
INLINE void accumulate(const typename P::Decoder& decoder, const uint8_t* const (&codes)[R], const U16 (&picks)[R], int64_t at,
                       const uint8_t* x, typename P::Accumulator (&total)[R][M][CHAINS]) {
    constexpr int kRow = 8 * P::kOperands * P::kWordBytes;
    constexpr Range kRange = P::template range<BITS>();
    typename P::Accumulator pairs[R][M][CHAINS];
    if constexpr (kRange == kNibbles) {
        repeat<R * M * CHAINS>([&](int i) ALWAYS { (&pairs[0][0][0])[i] = P::none(); });
    }
    auto& sum = kRange == kNibbles ? pairs : total;
    unroll<COUNT>([&](auto step) ALWAYS {
        constexpr int kStep = FIRST + step;
        repeat<R>([&](int r) ALWAYS {
            typename P::Operand w[P::kOperands];
            P::template weights<BITS, FORM, kStep>(decoder, codes[r] + at, picks[r], w);
            unroll<P::kOperands>([&](auto o) ALWAYS {
                constexpr int kNumber = kStep * P::kOperands + o, kChain = kNumber % CHAINS;
                const auto row = [&](auto m) ALWAYS {
                    sum[r][m][kChain] = P::template dot<kRange>(sum[r][m][kChain], w[o], x + m * kRow + kNumber * P::kWordBytes);
                };
                // Sums that half tiles share stay in registers only where their places are constants from the start.
                if constexpr (COUNT == 8) repeat<M>(row);
                if constexpr (COUNT < 8) unroll<M>(row);
            });
        });
    });
    if constexpr (kRange == kNibbles) {
        repeat<R * M * CHAINS>([&](int i) ALWAYS {
            (&total[0][0][0])[i] = P::joined((&total[0][0][0])[i], (&pairs[0][0][0])[i]);
        });
    }
}

// How far ahead of use codes are asked for, where their bytes and not the arithmetic are the bound.
constexpr int64_t kAhead = 1536;

// Totals [strip][row][16] of strips first .. first + R - 1 for one block of M rows. Strips beyond the last repeat it. HALF:
// segments are half tiles.
template <class P, int BITS, Form FORM, int R, int M, bool HALF>
void strips(const Plan& plan, int64_t first, int64_t block, float* to) {
    // More sums than these would not stay in registers.
    constexpr int kChains = HALF || P::kOnlyOneRow || R * M * kParts >= 8 || P::template range<BITS>() == kNibbles ? 1 : 2;
    constexpr float kBias = static_cast<float>(P::template bias<BITS, FORM>());
    const typename P::Decoder decoder = P::template decoder<BITS, FORM>(plan.decoder);
    const bool offset = kBias != 0.0f || plan.weight->zero != nullptr;
    int64_t strip[R];
    const uint8_t* codes[R];
    for (int r = 0; r < R; ++r) {
        strip[r] = first + r < plan.strips ? first + r : plan.strips - 1;
        codes[r] = static_cast<const uint8_t*>(plan.weight->codes) + strip[r] * plan.strip_bytes;
    }
    F16 total[R][M];
    repeat<R>([&](int r) ALWAYS { repeat<M>([&](int m) ALWAYS { total[r][m] = zero_f(); }); });
    // Counted rather than divided: a division costs as much as a tile. Half a tile beyond the last group has zeros to multiply.
    int64_t group = 0, left = plan.segments_per_group, run = 0;
    typename P::Accumulator sum[R][M][kChains];
    U16 picks[R];
    float x_sums[kStrip] = {};
    for (int64_t first_segment = 0; first_segment < plan.segments; first_segment += HALF ? 2 : 1) {
        unroll<HALF ? 2 : 1>([&](auto half) ALWAYS {
            const int64_t segment = first_segment + half, factor = plan.factor(block, segment);
            if (!HALF || run == 0) {
                if (left == 0 && group + 1 < plan.columns.groups) ++group, left = plan.segments_per_group;
                run = left > 0 && left < plan.longest_run ? left : plan.longest_run;
                repeat<R>([&](int r) ALWAYS {
                    picks[r] = picks_of<P, BITS, FORM>(plan, strip[r], group);
                    repeat<M>([&](int m) ALWAYS { repeat<kChains>([&](int c) ALWAYS { sum[r][m][c] = P::none(); }); });
                });
                if constexpr (HALF) memset(x_sums, 0, sizeof x_sums);
            }
            --left, --run;
            const int64_t tile = HALF ? segment / 2 : segment * plan.segment_tiles, end = HALF ? tile + 1 : tile + plan.segment_tiles;
            const int64_t stop = end < plan.tiles ? end : plan.tiles;
            for (int64_t t = tile; t < stop; ++t) {
                if constexpr (M <= 2 && half == 0) {
                    // Behind the end of a strip lies one of these; what is read next lies behind the last of them.
                    const int64_t ahead = t * tile_bytes<BITS>() + kAhead;
                    const int64_t next = ahead < plan.strip_bytes ? ahead : ahead + (R - 1) * plan.strip_bytes;
                    repeat<R>([&](int r) ALWAYS {
                        repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(codes[r] + next + line * kVector); });
                    });
                }
                accumulate<P, BITS, FORM, R, M, kChains, HALF ? 4 * half : 0, HALF ? 4 : 8>(
                    decoder, codes, picks, t * tile_bytes<BITS>(), plan.x_at(block, t), sum);
            }
            if constexpr (HALF) {
                if (offset) repeat<M>([&](int m) ALWAYS { x_sums[m] += plan.x_sum[factor + m]; });
                if (run > 0 && segment + 1 < plan.segments) return;
            }
            repeat<R>([&](int r) ALWAYS {
                const Factors f = factors_of(plan, strip[r], group, kBias);
                repeat<M>([&](int m) ALWAYS {
                    typename P::Accumulator all = sum[r][m][0];
                    if constexpr (kChains == 2) all = all + sum[r][m][1];
                    const float scale = P::kOperands == 1 ? plan.x_scale[factor + m] : 1.0f;
                    total[r][m] = joined<P>(all, total[r][m], f, offset, HALF ? x_sums[m] : plan.x_sum[factor + m], scale);
                });
            });
        });
    }
    repeat<R>([&](int r) ALWAYS { repeat<M>([&](int m) ALWAYS { store(to + (r * M + m) * kStrip, total[r][m]); }); });
}

// `strips` for one strip whose groups may end with every half tile and M rows as many as registers: totals and the numbers of half
// a tile stay in registers, and the sums of a few rows at a time join their totals before the next rows begin.
template <class P, int BITS, Form FORM, int M>
void halves(const Plan& plan, int64_t strip, int64_t block, float* to) {
    constexpr int kRow = 8 * P::kOperands * P::kWordBytes, kNumbers = 4 * P::kOperands, kTogether = 4;
    constexpr float kBias = static_cast<float>(P::template bias<BITS, FORM>());
    const typename P::Decoder decoder = P::template decoder<BITS, FORM>(plan.decoder);
    const bool offset = kBias != 0.0f || plan.weight->zero != nullptr;
    const uint8_t* codes = static_cast<const uint8_t*>(plan.weight->codes) + strip * plan.strip_bytes;
    F16 total[M];
    unroll<M>([&](auto m) ALWAYS { total[m] = zero_f(); });
    int64_t group = 0, left = plan.segments_per_group;
    for (int64_t tile = 0; tile < plan.tiles; ++tile, codes += tile_bytes<BITS>()) {
        const uint8_t* x = plan.x_at(block, tile);
        unroll<2>([&](auto half) ALWAYS {
            if (left == 0 && group + 1 < plan.columns.groups) ++group, left = plan.segments_per_group;
            --left;
            const Factors f = factors_of(plan, strip, group, kBias);
            const U16 picks = picks_of<P, BITS, FORM>(plan, strip, group);
            typename P::Operand w[kNumbers];
            unroll<4>([&](auto step) ALWAYS {
                typename P::Operand some[P::kOperands];
                P::template weights<BITS, FORM, 4 * half + step>(decoder, codes, picks, some);
                unroll<P::kOperands>([&](auto o) ALWAYS { w[step * P::kOperands + o] = some[o]; });
            });
            const float* x_sum = plan.x_sum + plan.factor(block, 2 * tile + half);
            unroll<M / kTogether>([&](auto some) ALWAYS {
                typename P::Accumulator sum[kTogether];
                unroll<kTogether>([&](auto m) ALWAYS { sum[m] = P::none(); });
                unroll<kNumbers>([&](auto number) ALWAYS {
                    unroll<kTogether>([&](auto m) ALWAYS {
                        const uint8_t* at = x + (some * kTogether + m) * kRow + (half * kNumbers + number) * P::kWordBytes;
                        sum[m] = P::template dot<P::template range<BITS>()>(sum[m], w[number], at);
                    });
                });
                unroll<kTogether>([&](auto m) ALWAYS {
                    constexpr int kAt = some * kTogether + m;
                    total[kAt] = joined<P>(sum[m], total[kAt], f, offset, x_sum[kAt], 1.0f);
                });
            });
        });
    }
    unroll<M>([&](auto m) ALWAYS { store(to + 16 * m, total[m]); });
}

}  // namespace UNIT
}  // namespace aerogel
