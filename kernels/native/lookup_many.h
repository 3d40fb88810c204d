// y = x W^T of many tokens for weights that are tables: numbers are decoded once into a panel and meet all tokens.
//
// A panel is sixteen rows by two tiles of floats with their scales multiplied in, 16 KB that stay in the first-level cache: vectors of
// four runs as byte lookups leave them, a row in each run, so nothing is turned; the four lanes of a row's sum are added at its end. A
// block of tokens meets the four strips of a panel one after the other, from the same cache. Products and sums in float32.
//
// Instructions for 32 weights on AVX2: 23 once, then 4 products for each token and half as many loads.
#pragma once
#include "lookup_kernel.h"

namespace aerogel {
namespace UNIT {

// Strips and tiles of a panel, tokens of a pass, whose totals stay in the second-level cache.
constexpr int kManyStrips = 4;
constexpr int64_t kManyTiles = 2, kManyPass = 528;
constexpr int64_t kManyFours = kLookupTile / 4;  // vectors of a strip and tile

// The numbers of sixteen columns of a strip: [four columns][row][column].
LOOKUP_STEP void lookup_numbers(const U16 (&table)[Real::kPlanes], const U16& code, const F16& scale, float* to) {
    repeat<kParts>([&](int part) ALWAYS {
        NativeU byte[Real::kPlanes];
        repeat<Real::kPlanes>([&](int plane) ALWAYS { byte[plane] = look_up(table[plane].part[part], code.part[part]); });
        unroll<2>([&](auto high) ALWAYS {
            const NativeU lower = in_turn<1, high>(byte[0], byte[1]), upper = in_turn<1, high>(byte[2], byte[3]);
            unroll<2>([&](auto half) ALWAYS {
                const NativeF w = reinterpret_cast<NativeF>(in_turn<2, half>(lower, upper)) * scale.part[part];
                memcpy(to + (2 * high + half) * 16 + part * kNative, &w, sizeof w);
            });
        });
    });
}

// The same of a tile, one step after the other.
template <int BITS>
void lookup_panel(const LookupPlan& plan, int64_t strip, int64_t tile, float* to) {
    const Lookup& weight = *plan.weight;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + (strip * plan.tiles + tile) * tile_bytes<BITS>();
    U16 table[Real::kPlanes];
    F16 scale;
    int64_t held = -1;
    unroll<8>([&](auto step) ALWAYS {
        const int64_t at = (strip * plan.groups + plan.group_at[tile * 8 + step]) * kLookupStrip;
        if (at != held) {
            if (held < 0 || weight.pick) tables_of<Real>(weight, strip, at, table);
            scale = scales_of_strip(weight, at), held = at;
        }
        lookup_numbers(table, quad<BITS, step>(codes), scale, to + step * 64);
    });
}

// Adds what `count` vectors of a panel give with a block of tokens to totals [token][16].
inline void lookup_add(const float* panel, const float* x, int64_t count, float* total) {
    F16 sum[kManyTokens];
    repeat<kManyTokens>([&](int m) ALWAYS { sum[m] = load<F16>(total + 16 * m); });
    for (int64_t four = 0; four < count; ++four, panel += 16, x += 4 * kManyTokens) {
        const F16 w = load<F16>(panel);
        repeat<kManyTokens>([&](int m) ALWAYS {
            const NativeF same = reinterpret_cast<NativeF>(every_run(x + 4 * m));
            repeat<kParts>([&](int part) ALWAYS { sum[m].part[part] = w.part[part] * same + sum[m].part[part]; });
        });
    }
    repeat<kManyTokens>([&](int m) ALWAYS { store(total + 16 * m, sum[m]); });
}

// Tokens as blocks meet panels, [block][four columns][token][4], zeros beyond the last column and token.
inline void lookup_place_many(const LookupPlan& plan, int64_t token) {
    const int64_t K = plan.weight->columns, fours = plan.tiles * kManyFours;
    float* to = reinterpret_cast<float*>(plan.x) + (token / kManyTokens * fours * kManyTokens + token % kManyTokens) * 4;
    for (int64_t four = 0; four < fours; ++four, to += 4 * kManyTokens) {
        for (int64_t k = 4 * four; k < 4 * four + 4; ++k) {
            to[k % 4] = k < K && token < plan.call->tokens ? read_float(plan.call->x, token * K + k, plan.call->x_type) : 0.0f;
        }
    }
}

// Four strips from `first` on, and blocks of tokens start .. stop - 1; `panel` and `totals` are the thread's own.
template <int BITS>
void lookup_unit(const LookupPlan& plan, int64_t first, int64_t start, int64_t stop, float* panel, float* totals) {
    const int64_t strips = plan.strips - first < kManyStrips ? plan.strips - first : kManyStrips, blocks = stop - start;
    constexpr int64_t kBlock = kManyTokens * 16;
    memset(totals, 0, sizeof(float) * static_cast<size_t>(strips * blocks * kBlock));
    for (int64_t tile = 0; tile < plan.tiles; tile += kManyTiles) {
        const int64_t tiles = plan.tiles - tile < kManyTiles ? plan.tiles - tile : kManyTiles, count = tiles * kManyFours;
        for (int64_t r = 0; r < strips; ++r) {
            for (int64_t t = 0; t < tiles; ++t) lookup_panel<BITS>(plan, first + r, tile + t, panel + (r * count + t * kManyFours) * 16);
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const float* x = reinterpret_cast<const float*>(plan.x) + ((start + block) * plan.tiles + tile) * kManyFours * kManyTokens * 4;
            for (int64_t r = 0; r < strips; ++r) lookup_add(panel + r * count * 16, x, count, totals + (r * blocks + block) * kBlock);
        }
    }
    for (int64_t r = 0; r < strips; ++r) {
        lookup_finish<Real>(plan, first + r, start * kManyTokens, blocks * kManyTokens, totals + r * blocks * kBlock);
    }
}

using LookupUnit = void (*)(const LookupPlan&, int64_t first, int64_t start, int64_t stop, float* panel, float* totals);

// All of a product of a plan whose groups are placed.
inline Status lookup_many(const LookupPlan& plan) {
    const LookupUnit units[] = {lookup_unit<2>, lookup_unit<3>, lookup_unit<4>};
    const int threads = plan.call->threads;
    const int64_t blocks = plan.padded / kManyTokens, passes = ceil_div(plan.padded, kManyPass);
    const int64_t per_pass = ceil_div(blocks, passes), number = ceil_div(plan.strips, kManyStrips);
    constexpr size_t kPanel = kManyStrips * kManyTiles * kManyFours * 16;
    const size_t each = (kPanel + static_cast<size_t>(kManyStrips * per_pass * kManyTokens * 16) + 1023) / 1024 * 1024;
    float* memory = static_cast<float*>(scratch(kWorkerScratch, sizeof(float) * each * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    parallel(blocks, threads, [&](int64_t block, int) {
        for (int64_t token = block * kManyTokens; token < (block + 1) * kManyTokens; ++token) lookup_place_many(plan, token);
    });
    parallel(number * passes, threads, [&](int64_t piece, int worker) {
        const int64_t start = piece / number * per_pass, stop = start + per_pass < blocks ? start + per_pass : blocks;
        float* mine = memory + each * static_cast<size_t>(worker);
        units[plan.weight->bits - 2](plan, piece % number * kManyStrips, start, stop, mine, mine + kPanel);
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
