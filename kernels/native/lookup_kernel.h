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
    // Adds the products of one step: sixteen columns of the rows of a part.
    template <int M>
    LOOKUP_STEP void step(const NativeU& codes, const NativeU (&table)[kPlanes], const float* const (&x)[M], NativeF (&sum)[M]) {
        const NativeU a = look_up(table[0], codes), b = look_up(table[1], codes);
        const NativeU c = look_up(table[2], codes), d = look_up(table[3], codes);
        unroll<2>([&](auto high) ALWAYS {
            const NativeU lower = in_turn<1, high>(a, b), upper = in_turn<1, high>(c, d);
            unroll<2>([&](auto half) ALWAYS {
                const NativeF w = reinterpret_cast<NativeF>(in_turn<2, half>(lower, upper));
                repeat<M>([&](int m) ALWAYS {
                    sum[m] = w * reinterpret_cast<NativeF>(every_run(x[m] + 8 * high + 4 * half)) + sum[m];
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
    template <int M>
    LOOKUP_STEP void step(const NativeU& codes, const NativeU (&table)[kPlanes], const int16_t* const (&x)[M], NativeI (&sum)[M]) {
        const NativeU low = look_up(table[0], codes), high = look_up(table[1], codes);
        unroll<2>([&](auto half) ALWAYS {
            const NativeU w = in_turn<1, half>(low, high);
            repeat<M>([&](int m) ALWAYS { sum[m] = dot_pairs(sum[m], w, every_run(x[m] + 8 * half)); });
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

// Scales of the four rows, each in the four lanes of its run.
INLINE F16 scales_of_strip(const Lookup& weight, int64_t at) {
    F16 v;
#if defined(__AVX2__)
    __m128 four;
    const char* from = static_cast<const char*>(weight.scale);
    if (weight.scale_type == kFloat32) {
        four = _mm_loadu_ps(reinterpret_cast<const float*>(from) + at);
    } else if (weight.scale_type == kFloat16) {
        four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 2 * at)));
    } else if (weight.scale_type == kBfloat16) {
        const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 2 * at));
        four = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
    } else {
        int32_t word;
        memcpy(&word, from + at, 4);
        const __m128i bytes = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(word));
        if (weight.scale_type == kFloat8E8m0) {
            four = _mm_castsi128_ps(_mm_max_epi32(_mm_slli_epi32(bytes, 23), _mm_set1_epi32(0x00400000)));
        } else if (weight.scale_type == kFloat8Ue5m3) {
            four = _mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(bytes, 20)), _mm_set1_ps(0x1p112f));
        } else {
            const __m128i sign = _mm_slli_epi32(_mm_and_si128(bytes, _mm_set1_epi32(0x80)), 24);
            const __m128i rest = _mm_slli_epi32(_mm_and_si128(bytes, _mm_set1_epi32(0x7f)), 20);
            four = _mm_mul_ps(_mm_castsi128_ps(_mm_or_si128(sign, rest)), _mm_set1_ps(0x1p120f));
        }
    }
#if defined(__AVX512F__)
    const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    v.part[0] = reinterpret_cast<NativeF>(_mm512_permutexvar_ps(order, _mm512_castps128_ps512(four)));
#else
    const __m256 both = _mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1);
    v.part[0] = reinterpret_cast<NativeF>(_mm256_permutevar_ps(both, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0)));
    v.part[1] = reinterpret_cast<NativeF>(_mm256_permutevar_ps(both, _mm256_set_epi32(3, 3, 3, 3, 2, 2, 2, 2)));
#endif
#else
    for (int row = 0; row < 4; ++row) {
        const float scale = read_scale(weight.scale, at + row, weight.scale_type);
        for (int lane = 4 * row; lane < 4 * row + 4; ++lane) v.part[lane / kNative][lane % kNative] = scale;
    }
#endif
    return v;
}

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

// Totals [token][16], four lanes per row, of one strip and M tokens. A scale holds for F steps.
template <class P, int BITS, int F, int M>
void lookup_strip(const LookupPlan& plan, int64_t strip, int64_t token, float* to) {
    constexpr int kRun = F < P::kLongest ? F : P::kLongest;
    const Lookup& weight = *plan.weight;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + strip * plan.tiles * tile_bytes<BITS>();
    U16 table[P::kPlanes];
    tables_of<P>(weight, strip, strip * plan.groups * kLookupStrip, table);
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
        unroll<8 / F>([&](auto fold) ALWAYS {
            const int64_t at = (strip * plan.groups + plan.group_at[tile * 8 + fold * F]) * kLookupStrip;
            const F16 scale = scales_of_strip(weight, at);
            if (weight.pick) tables_of<P>(weight, strip, at, table);
            repeat<kParts>([&](int part) ALWAYS {
                NativeU mine[P::kPlanes];
                repeat<P::kPlanes>([&](int plane) ALWAYS { mine[plane] = table[plane].part[part]; });
                unroll<F / kRun>([&](auto run) ALWAYS {
                    typename P::Sum sum[M] = {};
                    unroll<kRun>([&](auto each) ALWAYS {
                        constexpr int kStep = fold * F + run * kRun + each;
                        const typename P::Element* here[M];
                        repeat<M>([&](int m) ALWAYS { here[m] = x[m] + kStep * kLookupStep; });
                        P::template step<M>(quad<BITS, kStep>(codes).part[part], mine, here, sum);
                    });
                    repeat<M>([&](int m) ALWAYS {
                        part_total[m].part[part] = P::value(sum[m]) * scale.part[part] + part_total[m].part[part];
                    });
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
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + 4 * (units + steps)));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.x_unit = reinterpret_cast<float*>(memory + x_bytes);
    plan.group_at = reinterpret_cast<int32_t*>(plan.x_unit + units);
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
