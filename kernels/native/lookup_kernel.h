// y = x W^T for weights that are tables: numbers are put together from byte lookups, four rows at a time.
//
// `Real`:  the float32 numbers of the table from four lookups, one per byte; products and sums in float32.
// `Fixed`: numbers and activations as integers of 15 bits, one scale per table, one per token and 128 columns (or a group of 48
//          or 80), products and sums of up to 32 columns exact, or of more where numbers are small. Activations err by at most
//          2^-15 of the largest of their 128, numbers by 2^-15 of the table's largest (0 where the table lies on a grid, like
//          floats of 4 bits): some hundred times less than the rounding of a bfloat16 weight.
//
// Instructions for 32 weights of 4 bits and one token on AVX2: Fixed 11, Real 19; integers in float32 take 21.
#pragma once
#include "lookup_plan.h"
#include "pool.h"

namespace aerogel {
namespace UNIT {

struct Real {
    using Sum = NativeF;
    using Element = float;
    static constexpr int kPlanes = 4, kLongest = 8;
    // Adds the products of one step: sixteen columns of four rows, or the first eight of them.
    template <int M>
    LOOKUP_STEP void step(const U16& codes, const U16 (&table)[kPlanes], const float* x, NativeF (&sum)[kParts][M], bool half) {
        repeat<kParts>([&](int part) ALWAYS {
            NativeU byte[kPlanes];
            repeat<kPlanes>([&](int plane) ALWAYS { byte[plane] = look_up(table[plane].part[part], codes.part[part]); });
            unroll<2>([&](auto high) ALWAYS {
                if (high && half) return;
                const NativeU lower = in_turn<1, high>(byte[0], byte[1]), upper = in_turn<1, high>(byte[2], byte[3]);
                unroll<2>([&](auto four) ALWAYS {
                    const NativeF w = reinterpret_cast<NativeF>(in_turn<2, four>(lower, upper));
                    repeat<M>([&](int m) ALWAYS {
                        sum[part][m] = w * reinterpret_cast<NativeF>(every_run(x + 16 * m + 8 * high + 4 * four)) + sum[part][m];
                    });
                });
            });
        });
    }
    static INLINE NativeF value(const NativeF& sum) { return sum; }
};

struct Fixed {
    using Sum = NativeI;
    using Element = int16_t;
    static constexpr int kPlanes = 2, kLongest = 2;  // 16383 * 16383 * 8 products of a lane fit in 32 bits
    // All parts meet what is read of a token: read for each, it would be kept in between, and there are no registers for that.
    template <int M>
    LOOKUP_STEP void step(const U16& codes, const U16 (&table)[kPlanes], const int16_t* x, NativeI (&sum)[kParts][M], bool half) {
        NativeU w[2][kParts];
        repeat<kParts>([&](int part) ALWAYS {
            const NativeU low = look_up(table[0].part[part], codes.part[part]), high = look_up(table[1].part[part], codes.part[part]);
            w[0][part] = in_turn<1, false>(low, high), w[1][part] = in_turn<1, true>(low, high);
        });
        repeat<2>([&](int eight) ALWAYS {
            if (eight && half) return;
            repeat<M>([&](int m) ALWAYS {
                const NativeU both = every_run(x + 16 * m + 8 * eight);
                repeat<kParts>([&](int part) ALWAYS {
                    NativeI added = dot_pairs(sum[part][m], w[eight][part], both);
                    in_this_order(added);
                    sum[part][m] = added;
                });
            });
        });
    }
    static INLINE NativeF value(const NativeI& sum) { return __builtin_convertvector(sum, NativeF); }
};

// Adds sums of steps to what a tile has, and that to the totals.
template <class P, int M>
INLINE void join(const typename P::Sum (&sum)[kParts][M], const F16& scale, F16 (&part_total)[M]) {
    repeat<kParts * M>([&](int i) ALWAYS {
        NativeF& joined = part_total[i % M].part[i / M];
        joined = P::value(sum[i / M][i % M]) * scale.part[i / M] + joined;
    });
}
template <class P, int M>
INLINE void join_tile(const LookupPlan& plan, const F16 (&part_total)[M], int64_t token, int64_t tile, F16 (&total)[M]) {
    const float* unit = plan.x_unit + token * plan.units + tile * M;
    repeat<M>([&](int m) ALWAYS {
        if constexpr (P::kPlanes == 4) {
            total[m] = total[m] + part_total[m];
        } else {
            total[m] = multiply_add(part_total[m], spread<F16>(unit[m]), total[m]);
        }
    });
}

// The indices of some tiles' codes, [step][64].
template <int BITS>
INLINE void write_indices(const uint8_t* codes, int64_t tiles, uint8_t* to) {
    for (; tiles > 0; --tiles, codes += tile_bytes<BITS>(), to += 8 * kVector) {
        repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(codes + line * kVector + 1536); });
        unroll<8>([&](auto step) ALWAYS { store(to + step * kVector, indices<BITS, step>(codes)); });
    }
}

// Totals [token][16], four lanes per row, of one strip and M tokens. A scale holds for F steps.
template <class P, int BITS, int F, int M>
void lookup_strip(const LookupPlan& plan, int64_t strip, int64_t token, float* to) {
    constexpr int kRun = F < P::kLongest ? F : P::kLongest;
    const Lookup& weight = *plan.weight;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + strip * plan.tiles * tile_bytes<BITS>();
    const typename P::Element* x = plan.x_of<P>(token);
    U16 table[P::kPlanes];
    RowFactors factors(plan, strip);
    uint32_t held = weight.pick ? ~0u : 0;  // which tables these are
    tables_of<P>(weight, strip, strip * plan.groups * kLookupStrip, table);
    F16 total[M];
    repeat<M>([&](int m) ALWAYS { total[m] = zero_f(); });
    for (int64_t tile = 0; tile < plan.tiles; ++tile, codes += tile_bytes<BITS>(), x += M * kLookupTile) {
        repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(codes + line * kVector + 1536); });
        F16 part_total[M];
        repeat<M>([&](int m) ALWAYS { part_total[m] = zero_f(); });
        const int32_t* group_at = plan.group_at + tile * 8;
        if (group_at[7] >= factors.stop) factors.read(group_at[0], plan.groups);
        unroll<8 / F>([&](auto fold) ALWAYS {
            const int64_t group = group_at[fold * F];
            // Of two steps that are a group nearly always, reading two pairs is faster than a comparison.
            if (F == 2 && plan.pairs) {
                paired_tables<P>(plan.pairs, factors.tables_of(group), table);
            } else if (const uint32_t word = factors.word_of(group); word != held) {
                held = word;
                group_tables<P>(plan, factors, strip, group, table);
            }
            unroll<F / kRun>([&](auto run) ALWAYS {
                typename P::Sum sum[kParts][M];
                repeat<kParts * M>([&](int i) ALWAYS { sum[i / M][i % M] = typename P::Sum{}; });
                unroll<kRun>([&](auto each) ALWAYS {
                    constexpr int kStep = fold * F + run * kRun + each;
                    P::template step<M>(indices<BITS, kStep>(codes), table, x + kStep * M * kLookupStep, sum, false);
                });
                join<P, M>(sum, factors.scales_of(group), part_total);
            });
        });
        join_tile<P, M>(plan, part_total, token, tile, total);
    }
    repeat<M>([&](int m) ALWAYS { store(to + 16 * m, total[m]); });
}

// The same where a scale holds for an odd number F of steps, which begin anywhere in a tile. Eight groups are F tiles, so their indices are
// taken out of the codes first: then nothing differs from group to group but what branches would have to foresee.
template <class P, int BITS, int F, int M>
void lookup_odd(const LookupPlan& plan, int64_t strip, int64_t token, float* to) {
    const Lookup& weight = *plan.weight;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + strip * plan.tiles * tile_bytes<BITS>();
    const typename P::Element* x = plan.x_of<P>(token);
    const float* unit = plan.x_unit + token * plan.units;
    alignas(64) uint8_t index[8 * F * kVector];
    U16 table[P::kPlanes];
    tables_of<P>(weight, strip, strip * plan.groups * kLookupStrip, table);
    RowFactors factors(plan, strip);
    F16 total[M];
    repeat<M>([&](int m) ALWAYS { total[m] = zero_f(); });
    for (int64_t group = 0, left = plan.tiles; group < plan.groups; ++group, unit += M, x += F * M * kLookupStep) {
        if (group % 8 == 0) {
            if (left < F) memset(index, 0, sizeof index);  // the last group may go on behind the last tile
            write_indices<BITS>(codes, left < F ? left : F, index);
            codes += F * tile_bytes<BITS>(), left -= F;
        }
        if (group >= factors.stop) factors.read(group, plan.groups);
        if (weight.pick) group_tables<P>(plan, factors, strip, group, table);
        const uint8_t* at = index + group % 8 * F * kVector;
        typename P::Sum sum[kParts][M];
        repeat<kParts * M>([&](int i) ALWAYS { sum[i / M][i % M] = typename P::Sum{}; });
        unroll<F>([&](auto step) ALWAYS {
            P::template step<M>(load<U16>(at + step * kVector), table, x + step * M * kLookupStep, sum, step == F - 1 && plan.half);
            if (step < F - 1 && !(plan.ends >> step & 1)) return;
            const F16 scale = factors.scales_of(group);
            repeat<M>([&](int m) ALWAYS {
                const F16 both = P::kPlanes == 4 ? scale : scale * spread<F16>(unit[m]);
                repeat<kParts>([&](int part) ALWAYS {
                    total[m].part[part] = P::value(sum[part][m]) * both.part[part] + total[m].part[part];
                    sum[part][m] = typename P::Sum{};
                });
            });
        });
    }
    repeat<M>([&](int m) ALWAYS { store(to + 16 * m, total[m]); });
}

// Rounds and stores the results of one strip.
template <class P>
inline void lookup_finish(const LookupPlan& plan, int64_t strip, int64_t first, int64_t tokens, const float* total) {
    const Lookup& weight = *plan.weight;
    const Call& call = *plan.call;
    const int64_t row0 = strip * kLookupStrip, left = weight.rows - row0;
    const int count = static_cast<int>(left < kLookupStrip ? left : kLookupStrip);
    const float* unit = static_cast<const float*>(weight.unit);
    const bool by_row = weight.tables > 1 && !weight.pick;
    for (int64_t token = first; token < first + tokens && token < call.tokens; ++token, total += 16) {
        float out[16] = {};  // as many as a store reads
        for (int row = 0; row < count; ++row) {
            const float* lane = total + 4 * row;
            const float own = P::kPlanes == 4 ? 1.0f : unit[by_row ? row0 + row : 0];
            out[row] = ((lane[0] + lane[2]) + (lane[1] + lane[3])) * (own * weight.factor);
            if (call.bias) out[row] += read_float(call.bias, row0 + row, call.bias_type);
        }
        store_floats(call.y, token * weight.rows + row0, call.x_type, out, count);
    }
}

// What is compiled for every width, size of groups and number of tokens; all that lies around it is compiled once for a policy.
using LookupLoop = void (*)(const LookupPlan&, int64_t strip, int64_t token, float* totals);

// All strips by a loop.
template <class P>
void lookup_all(const LookupPlan& plan, LookupLoop loop) {
    const int64_t bytes = plan.strips * plan.tiles * kVector * plan.weight->bits;
    const int threads = bytes < 48 * 1024 ? 1 : plan.call->threads;
    const int64_t grain = threads == 1 ? plan.strips : plan.strips / (threads * 6) > 1 ? plan.strips / (threads * 6) : 1;
    parallel(ceil_div(plan.strips, grain), threads, [&](int64_t piece, int) {
        const int64_t stop = (piece + 1) * grain < plan.strips ? (piece + 1) * grain : plan.strips;
        for (int64_t strip = piece * grain; strip < stop; ++strip) {
            alignas(64) float total[kLookupTokens * 16];
            for (int64_t token = 0; token < plan.padded; token += plan.together) {
                loop(plan, strip, token, total);
                lookup_finish<P>(plan, strip, token, plan.together, total);
            }
        }
    });
}

}  // namespace UNIT
}  // namespace aerogel
