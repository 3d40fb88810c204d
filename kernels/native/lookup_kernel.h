// y = x W^T for weights that are tables: numbers are put together from byte lookups, four rows at a time.
//
// `Real`:  the float32 numbers of the table from four lookups, one per byte; products and sums in float32.
// `Fixed`: numbers and activations as integers of 15 bits, one scale per table, one per token and 128 columns,
//          products and sums of up to 32 columns exact. Activations err by at most 2^-15 of the largest of their
//          128, numbers by 2^-15 of the table's largest (0 where the table lies on a grid, like floats of 4 bits): some
//          hundred times less than the rounding of a bfloat16 weight.
//
// Instructions for 32 weights of 4 bits and one token on AVX2: Fixed 11, Real 19; integers in float32 take 21.
#pragma once
#include "bytes.h"
#include "codes.h"
#include "lookup.h"
#include "run_panels.h"

namespace aerogel {
namespace UNIT {

struct LookupPlan {
    const Lookup* weight;
    const Call* call;
    int64_t strips, tiles, groups, padded;  // padded: tokens filled up to whole blocks
    uint8_t* x;        // [token][tiles * 128] of the policy's type
    float* x_unit;     // [token][tiles], Fixed only
    int32_t* group_at; // [tiles * 8]: the group of each step
    const uint8_t* pairs;  // the tables of two rows, for each two that may be picked (write_pairs), or null
};

constexpr int kLookupTokens = 4;  // that a loop takes together

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool kLookupLoops = true;  // a loop for each kind of group and for some tokens at a time
#else
constexpr bool kLookupLoops = false;
#endif

struct Real {
    using Sum = NativeF;
    using Element = float;
    static constexpr int kPlanes = 4, kLongest = 8;
    // Adds the products of one step: sixteen columns of four rows.
    template <int M>
    LOOKUP_STEP void step(const U16& codes, const U16 (&table)[kPlanes], const float* const (&x)[M], NativeF (&sum)[kParts][M]) {
        repeat<kParts>([&](int part) ALWAYS {
            NativeU byte[kPlanes];
            repeat<kPlanes>([&](int plane) ALWAYS { byte[plane] = look_up(table[plane].part[part], codes.part[part]); });
            unroll<2>([&](auto high) ALWAYS {
                const NativeU lower = in_turn<1, high>(byte[0], byte[1]), upper = in_turn<1, high>(byte[2], byte[3]);
                unroll<2>([&](auto half) ALWAYS {
                    const NativeF w = reinterpret_cast<NativeF>(in_turn<2, half>(lower, upper));
                    repeat<M>([&](int m) ALWAYS {
                        sum[part][m] = w * reinterpret_cast<NativeF>(every_run(x[m] + 8 * high + 4 * half)) + sum[part][m];
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
    LOOKUP_STEP void step(const U16& codes, const U16 (&table)[kPlanes], const int16_t* const (&x)[M], NativeI (&sum)[kParts][M]) {
        NativeU w[2][kParts];
        repeat<kParts>([&](int part) ALWAYS {
            const NativeU low = look_up(table[0].part[part], codes.part[part]), high = look_up(table[1].part[part], codes.part[part]);
            w[0][part] = in_turn<1, false>(low, high), w[1][part] = in_turn<1, true>(low, high);
        });
        repeat<2>([&](int half) ALWAYS {
            repeat<M>([&](int m) ALWAYS {
                const NativeU both = every_run(x[m] + 8 * half);
                repeat<kParts>([&](int part) ALWAYS {
                    NativeI added = dot_pairs(sum[part][m], w[half][part], both);
                    in_this_order(added);
                    sum[part][m] = added;
                });
            });
        });
    }
    static INLINE NativeF value(const NativeI& sum) { return __builtin_convertvector(sum, NativeF); }
};

INLINE float read_scale(const void* from, int64_t at, int32_t type) {
    if (type < kFloat8E4m3) return read_float(from, at, type);
    const uint32_t byte = static_cast<const uint8_t*>(from)[at];
    if (type == kFloat8E8m0) return bits_to_float(byte ? byte << 23 : 0x00400000u);
    // The exponent is moved by a multiplication, which takes subnormal numbers along.
    if (type == kFloat8Ue5m3) return bits_to_float(uint32_t{byte} << 20) * 0x1p112f;
    return bits_to_float((byte & 0x80u) << 24 | (byte & 0x7fu) << 20) * 0x1p120f;
}

// Four numbers, each in the four lanes of its run.
INLINE F16 in_runs(const float* four) {
    F16 v;
#if defined(__AVX512F__)
    const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    v.part[0] = reinterpret_cast<NativeF>(_mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(four))));
#elif defined(__AVX2__)
    const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
    v.part[0] = reinterpret_cast<NativeF>(_mm256_permutevar_ps(all, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0)));
    v.part[1] = reinterpret_cast<NativeF>(_mm256_permutevar_ps(all, _mm256_set_epi32(3, 3, 3, 3, 2, 2, 2, 2)));
#else
    for (int lane = 0; lane < 16; ++lane) v.part[lane / kNative][lane % kNative] = four[lane / 4];
#endif
    return v;
}

// Where tables are picked among a few, those of two rows lie together for each two of them, so that four rows' are read without shuffles.
constexpr int64_t kPairedTables = 4, kPairBytes = 2 * kEntries;  // of a plane

// [table of the first row][of the second][plane][row][16].
template <class P>
inline void write_pairs(const Lookup& weight, uint8_t* to) {
    const uint8_t* from = static_cast<const uint8_t*>(P::kPlanes == 4 ? weight.number : weight.fixed);
    for (int64_t pair = 0; pair < weight.tables * weight.tables; ++pair) {
        for (int64_t plane = 0; plane < P::kPlanes; ++plane, to += kPairBytes) {
            memcpy(to, from + (pair / weight.tables * P::kPlanes + plane) * kEntries, kEntries);
            memcpy(to + kEntries, from + (pair % weight.tables * P::kPlanes + plane) * kEntries, kEntries);
        }
    }
}

// The scales of a strip as floats for a run of groups, [group][4], and a word that changes where rows have other tables than in the group
// before: two pairs of tables, a half each, or the group's number where rows pick among more. Read group by group, what a scale is would
// be decided each time.
struct RowFactors {
    static constexpr int64_t kRun = 64;
    const Lookup& weight;
    bool paired;
    int64_t begin, all;       // of the strip's among all scales, and how many there are
    int64_t first, stop = 0;  // groups that have been read
    float scale[(kRun + 3) * kLookupStrip];
    alignas(64) uint16_t tables[kRun * 2];

    RowFactors(const LookupPlan& plan, int64_t strip)
        : weight(*plan.weight), paired(plan.pairs != nullptr), begin(strip * plan.groups * kLookupStrip),
          all(plan.strips * plan.groups * kLookupStrip) {
        if (!weight.pick) memset(tables, 0, sizeof tables);
    }
    INLINE F16 scales_of(int64_t group) const { return in_runs(scale + (group - first) * kLookupStrip); }
    INLINE const uint16_t* tables_of(int64_t group) const { return tables + (group - first) * 2; }
    INLINE uint32_t word_of(int64_t group) const {
        uint32_t word;
        memcpy(&word, tables_of(group), sizeof word);
        return word;
    }

    template <class Load>
    INLINE void convert(Load&& load) {
        const int64_t count = (stop - first) * kLookupStrip, at = begin + first * kLookupStrip;
        int64_t i = 0;
        // Sixteen at once also where fewer are wanted, as long as there are others behind them.
        for (; i < count && at + i + 16 <= all; i += 16) store(scale + i, load(at + i));
        for (; i < count; ++i) scale[i] = read_scale(weight.scale, at + i, weight.scale_type);
    }
    // The lines behind those of the groups that were read, which are next: of this strip, or of the one that follows.
    INLINE void ask_for(const uint8_t* bytes, int64_t size) const {
        const int64_t count = (stop - first) * kLookupStrip * size, at = (begin + stop * kLookupStrip) * size;
        for (int64_t line = 0; line < count; line += kVector) __builtin_prefetch(bytes + at + line);
    }
    // Groups from .. until - 1, at most kRun.
    __attribute__((noinline)) void read(int64_t from, int64_t until) {
        first = from, stop = until - from < kRun ? until : from + kRun;
        const uint8_t* pick = static_cast<const uint8_t*>(weight.pick);
        ask_for(static_cast<const uint8_t*>(weight.scale), weight.scale_type < kFloat8E4m3 ? size_of(weight.scale_type) : 1);
        if (pick) ask_for(pick, 1);
        for (int64_t i = 0, at = begin + first * kLookupStrip; pick && i < (stop - first) * 2; ++i, at += 2) {
            tables[i] = static_cast<uint16_t>(pick[at] * weight.tables + pick[at + 1]);
        }
        for (int64_t group = first; pick && !paired && group < stop; ++group) {
            const uint32_t word = static_cast<uint32_t>(group);
            memcpy(tables + (group - first) * 2, &word, sizeof word);
        }
        const uint8_t* bytes = static_cast<const uint8_t*>(weight.scale);
        switch (weight.scale_type) {
            case kFloat32: return convert([&](int64_t at) ALWAYS { return load_floats(bytes, at, kFloat32); });
            case kFloat16: return convert([&](int64_t at) ALWAYS { return load_floats(bytes, at, kFloat16); });
            case kBfloat16: return convert([&](int64_t at) ALWAYS { return load_floats(bytes, at, kBfloat16); });
            case kFloat8E4m3: return convert([&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8E4m3); });
            case kFloat8E8m0: return convert([&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8E8m0); });
            default: return convert([&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8Ue5m3); });
        }
    }
};

// The planes of the tables that the four rows of a strip have in a group.
template <class P>
INLINE void tables_of(const Lookup& weight, int64_t strip, int64_t at, U16 (&table)[P::kPlanes]) {
    constexpr int64_t kBytes = P::kPlanes * kEntries;
    const uint8_t* from = static_cast<const uint8_t*>(P::kPlanes == 4 ? weight.number : weight.fixed);
    const uint8_t* pick = static_cast<const uint8_t*>(weight.pick);
    const uint8_t* base[4];
    for (int row = 0; row < 4; ++row) {
        const int64_t number = pick ? pick[at + row] : weight.tables == 1 ? 0 : strip * kLookupStrip + row;
        base[row] = from + number * kBytes;
    }
    repeat<P::kPlanes>([&](int plane) ALWAYS {
        const uint8_t* const run[4] = {base[0] + plane * kEntries, base[1] + plane * kEntries, base[2] + plane * kEntries,
                                       base[3] + plane * kEntries};
        table[plane] = four_runs(run);
    });
}

// The same of rows that pick among a few tables.
template <class P>
INLINE void paired_tables(const uint8_t* pairs, const uint16_t* pair, U16 (&table)[P::kPlanes]) {
    const uint8_t *first = pairs + pair[0] * (P::kPlanes * kPairBytes), *second = pairs + pair[1] * (P::kPlanes * kPairBytes);
    repeat<P::kPlanes>([&](int plane) ALWAYS { table[plane] = two_halves(first + plane * kPairBytes, second + plane * kPairBytes); });
}

// Totals [token][16], four lanes per row, of one strip and M tokens. A scale holds for F steps.
template <class P, int BITS, int F, int M>
void lookup_strip(const LookupPlan& plan, int64_t strip, int64_t token, float* to) {
    constexpr int kRun = F < P::kLongest ? F : P::kLongest;
    const Lookup& weight = *plan.weight;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + strip * plan.tiles * tile_bytes<BITS>();
    U16 table[P::kPlanes];
    const int64_t begin = strip * plan.groups * kLookupStrip;
    RowFactors factors(plan, strip);
    uint32_t held = weight.pick ? ~0u : 0;  // which tables these are
    tables_of<P>(weight, strip, begin, table);
    F16 total[M];
    repeat<M>([&](int m) ALWAYS { total[m] = zero_f(); });
    for (int64_t tile = 0; tile < plan.tiles; ++tile, codes += tile_bytes<BITS>()) {
        repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(codes + line * kVector + 1536); });
        const typename P::Element* x[M];
        repeat<M>([&](int m) ALWAYS {
            x[m] = reinterpret_cast<const typename P::Element*>(plan.x) + ((token + m) * plan.tiles + tile) * kLookupTile;
        });
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
                if (plan.pairs) paired_tables<P>(plan.pairs, factors.tables_of(group), table);
                if (!plan.pairs) tables_of<P>(weight, strip, begin + group * kLookupStrip, table);
            }
            unroll<F / kRun>([&](auto run) ALWAYS {
                typename P::Sum sum[kParts][M];
                repeat<kParts * M>([&](int i) ALWAYS { sum[i / M][i % M] = typename P::Sum{}; });
                unroll<kRun>([&](auto each) ALWAYS {
                    constexpr int kStep = fold * F + run * kRun + each;
                    const typename P::Element* here[M];
                    repeat<M>([&](int m) ALWAYS { here[m] = x[m] + kStep * kLookupStep; });
                    P::template step<M>(indices<BITS, kStep>(codes), table, here, sum);
                });
                const F16 scale = factors.scales_of(group);
                repeat<kParts * M>([&](int i) ALWAYS {
                    NativeF& joined = part_total[i % M].part[i / M];
                    joined = P::value(sum[i / M][i % M]) * scale.part[i / M] + joined;
                });
            });
        });
        repeat<M>([&](int m) ALWAYS {
            if constexpr (P::kPlanes == 4) {
                total[m] = total[m] + part_total[m];
            } else {
                total[m] = multiply_add(part_total[m], spread<F16>(plan.x_unit[(token + m) * plan.tiles + tile]), total[m]);
            }
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

// All strips by a loop that takes `together` tokens at a time.
template <class P>
void lookup_all(const LookupPlan& plan, int64_t together, LookupLoop loop) {
    const int64_t bytes = plan.strips * plan.tiles * kVector * plan.weight->bits;
    const int threads = bytes < 48 * 1024 ? 1 : plan.call->threads;
    const int64_t grain = threads == 1 ? plan.strips : plan.strips / (threads * 6) > 1 ? plan.strips / (threads * 6) : 1;
    parallel(ceil_div(plan.strips, grain), threads, [&](int64_t piece, int) {
        const int64_t stop = (piece + 1) * grain < plan.strips ? (piece + 1) * grain : plan.strips;
        for (int64_t strip = piece * grain; strip < stop; ++strip) {
            alignas(64) float total[kLookupTokens * 16];
            for (int64_t token = 0; token < plan.padded; token += together) {
                loop(plan, strip, token, total);
                lookup_finish<P>(plan, strip, token, together, total);
            }
        }
    });
}

// One token as the policy reads it, zeros beyond the last column.
template <class P>
void lookup_place(const LookupPlan& plan, int64_t token) {
    const int64_t K = plan.weight->columns;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        const int64_t begin = tile * kLookupTile, count = K - begin < kLookupTile ? K - begin : kLookupTile;
        float value[kLookupTile] = {};
        for (int64_t k = 0; k < count; ++k) value[k] = read_float(plan.call->x, token * K + begin + k, plan.call->x_type);
        typename P::Element* to = reinterpret_cast<typename P::Element*>(plan.x) + (token * plan.tiles + tile) * kLookupTile;
        if constexpr (P::kPlanes == 4) {
            memcpy(to, value, sizeof value);
        } else {
            float peak = 0.0f, poison = 0.0f;
            for (float each : value) {
                const float size = __builtin_fabsf(each);
                peak = size > peak ? size : peak;
                poison += each * 0.0f;  // stays 0, unless something is infinite or not a number
            }
            const float unit = peak > 1e-30f ? peak / 16383.0f : 1.0f, inverse = 1.0f / unit;
            for (int k = 0; k < kLookupTile; ++k) {
                // Adding 1.5 * 2^23 leaves the rounded integer in the low bits, ties to even.
                to[k] = static_cast<int16_t>(static_cast<int32_t>(float_to_bits(value[k] * inverse + 12582912.0f)) - 0x4b400000);
            }
            plan.x_unit[token * plan.tiles + tile] = unit + poison;
        }
    }
}

template <class P, int BITS, int F>
void lookup_tokens(const LookupPlan& plan) {
    if constexpr (kLookupLoops) {
        if (plan.padded > 1) return lookup_all<P>(plan, kLookupTokens, lookup_strip<P, BITS, F, kLookupTokens>);
    }
    lookup_all<P>(plan, 1, lookup_strip<P, BITS, F, 1>);
}
template <class P, int BITS>
void lookup_groups(const LookupPlan& plan, int64_t group) {
    if constexpr (kLookupLoops) {
        if (group % 128 == 0) return lookup_tokens<P, BITS, 8>(plan);
        if (group % 32 == 0) return lookup_tokens<P, BITS, 2>(plan);
    }
    lookup_tokens<P, BITS, 1>(plan);
}

inline Status lookup_many(const LookupPlan& plan);

template <class P>
Status lookup(const Lookup& weight, const Call& call) {
    LookupPlan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.strips = ceil_div(weight.rows, kLookupStrip), plan.tiles = ceil_div(weight.columns, kLookupTile);
    plan.groups = weight.group ? ceil_div(weight.columns, weight.group) : 1;
    plan.padded = call.tokens == 1 ? 1 : ceil_div(call.tokens, kLookupTokens) * kLookupTokens;
    // Integers of 16 bits are multiplied in pairs on wide registers, which is as fast as panels until activations leave the cache.
    const bool many = call.tokens >= (kNative == 16 && P::kPlanes == 2 ? 128 : kPanelTokens);
    const size_t few_bytes = static_cast<size_t>(plan.padded * plan.tiles * kLookupTile) * sizeof(typename P::Element);
    const size_t x_bytes = many ? run_panels_bytes(call.tokens, plan.tiles) : few_bytes;
    const size_t units = static_cast<size_t>(plan.padded * plan.tiles), steps = static_cast<size_t>(plan.tiles * 8);
    const bool paired = weight.pick && weight.tables <= kPairedTables;
    constexpr size_t kPairs = kPairedTables * kPairedTables * P::kPlanes * kPairBytes;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + 4 * (units + steps) + kPairs));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.x_unit = reinterpret_cast<float*>(memory + x_bytes);
    plan.group_at = reinterpret_cast<int32_t*>(plan.x_unit + units);
    if (paired) {
        uint8_t* pairs = reinterpret_cast<uint8_t*>(plan.group_at + steps);
        write_pairs<P>(weight, pairs), plan.pairs = pairs;
    }
    const int64_t group = weight.group && plan.groups > 1 ? weight.group : 0;
    for (int64_t step = 0; step < plan.tiles * 8; ++step) {
        const int64_t found = group ? step * kLookupStep / group : 0;
        plan.group_at[step] = static_cast<int32_t>(found < plan.groups ? found : plan.groups - 1);
    }
    if (many) return lookup_many(plan);
    if (plan.padded != call.tokens) memset(memory, 0, x_bytes + 4 * units);
    for (int64_t token = 0; token < call.tokens; ++token) lookup_place<P>(plan, token);
    switch (weight.bits) {
        case 2: lookup_groups<P, 2>(plan, group); return kDone;
        case 3: lookup_groups<P, 3>(plan, group); return kDone;
        case 4: lookup_groups<P, 4>(plan, group); return kDone;
        default: return kBadWidth;
    }
}

}  // namespace UNIT
}  // namespace aerogel
