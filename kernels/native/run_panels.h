// y = x W^T of many tokens for weights whose numbers come from byte lookups: they are decoded once into a panel and meet all tokens.
//
// A panel is sixteen rows by two tiles of floats, 16 KB that stay in the first-level cache: vectors of four runs as byte lookups leave
// them, a row in each run, so nothing is turned; the four lanes of a row's sum are added at its end. A block of tokens meets the four
// strips of a panel from the same cache, one after the other, or all together where there are registers for it: then they share what
// is read of the tokens. Products and sums in float32.
//
// Instructions for 32 weights on AVX2, once the panel is there: 4 products for each token and half as many loads.
#pragma once
#include "bytes.h"
#include "lookup.h"
#include "numbers.h"
#include "pool.h"
#include "scratch.h"

namespace aerogel {
namespace UNIT {

// Tokens from which on panels are worth their decoding, those of a block and of a last one that has few, and the strips that it meets
// together.
constexpr int64_t kPanelTokens = 9;
constexpr int kBlockTokens = kNative >= 8 ? 6 : 4, kFewTokensOfBlock = kBlockTokens - 2, kTogether = kNative == 16 ? 4 : 1;
// Strips and tiles of a panel; tokens of a pass, whose totals stay in the second-level cache.
constexpr int kRunStrips = 4;
constexpr int64_t kRunTiles = 2, kRunPass = 528;
constexpr int64_t kFours = kLookupTile / 4;  // vectors of a strip and tile: four columns of four rows
constexpr int64_t kSpareFours = 3;           // of a step whose first vector counts
constexpr int64_t kPanelFours = kRunTiles * kFours + kSpareFours;  // room for a strip

// A weight of that kind, what its panels hold, and what becomes of totals [token][16].
struct RunPanels {
    const Call* call;
    const void* plan;
    int64_t columns, strips, tiles;
    float* x;    // [block][four columns][token][4], as many bytes as `run_panels_bytes` says
    bool pairs;  // vectors hold every second column of eight, the even ones first; else four that follow each other
    const int32_t* four_at;  // the first columns of the vectors of a panel, where those that fill groups up are left out; or null
    int64_t fours;           // vectors of a strip
    // [four columns][row][column]; returns how many vectors there are, and may write kSpareFours more.
    int64_t (*panel)(const void* plan, int64_t strip, int64_t tile, int64_t tiles, float* to);
    void (*finish)(const void* plan, int64_t strip, int64_t first, int64_t tokens, const float* total);
};

inline size_t run_panels_bytes(int64_t tokens, int64_t tiles) {
    return static_cast<size_t>(ceil_div(tokens, kBlockTokens) * kBlockTokens * tiles * kLookupTile) * sizeof(float);
}

// Adds what `count` vectors of each of some strips give with the first TOKENS of a block to totals [strip][token][16], whose strips lie
// `stride` apart.
template <int TOKENS>
inline void add_panel(const float* panel, const float* x, int64_t count, float* total, int64_t stride) {
    F16 sum[kTogether][TOKENS];
    const auto sums_at = [&](int i) ALWAYS { return total + i / TOKENS * stride + i % TOKENS * 16; };
    repeat<kTogether * TOKENS>([&](int i) ALWAYS { sum[i / TOKENS][i % TOKENS] = load<F16>(sums_at(i)); });
    for (int64_t four = 0; four < count; ++four, panel += 16, x += 4 * kBlockTokens) {
        F16 w[kTogether];
        repeat<kTogether>([&](int r) ALWAYS { w[r] = load<F16>(panel + r * kPanelFours * 16); });
        repeat<TOKENS>([&](int m) ALWAYS {
            const NativeF same = reinterpret_cast<NativeF>(every_run(x + 4 * m));
            repeat<kTogether>([&](int r) ALWAYS {
                repeat<kParts>([&](int part) ALWAYS { sum[r][m].part[part] = w[r].part[part] * same + sum[r][m].part[part]; });
            });
        });
    }
    repeat<kTogether * TOKENS>([&](int i) ALWAYS { store(sums_at(i), sum[i / TOKENS][i % TOKENS]); });
}

// A token among those of its block, zeros beyond the last column and token.
inline void place_in_fours(const RunPanels& p, int64_t token) {
    float* to = p.x + (token / kBlockTokens * p.fours * kBlockTokens + token % kBlockTokens) * 4;
    for (int64_t four = 0; four < p.fours; ++four, to += 4 * kBlockTokens) {
        const int64_t begin = p.four_at ? p.four_at[four] : p.pairs ? four / 2 * 8 + four % 2 : 4 * four, step = p.pairs ? 2 : 1;
        for (int64_t lane = 0; lane < 4; ++lane) {
            const int64_t k = begin + step * lane;
            to[lane] = k < p.columns && token < p.call->tokens ? read_float(p.call->x, token * p.columns + k, p.call->x_type) : 0.0f;
        }
    }
}

// Four strips from `first` on, and blocks of tokens start .. stop - 1; `panel` and `totals` are the thread's own. Strips beyond the last
// repeat it.
inline void run_unit(const RunPanels& p, int64_t first, int64_t start, int64_t stop, float* panel, float* totals) {
    constexpr int64_t kBlock = kBlockTokens * 16;
    const int64_t blocks = stop - start, stride = blocks * kBlock, last = p.call->tokens - (stop - 1) * kBlockTokens;
    int64_t done = 0;  // vectors
    memset(totals, 0, sizeof(float) * static_cast<size_t>(kRunStrips * stride));
    for (int64_t tile = 0; tile < p.tiles; tile += kRunTiles) {
        const int64_t tiles = p.tiles - tile < kRunTiles ? p.tiles - tile : kRunTiles;
        int64_t count = 0;
        for (int64_t r = 0; r < kRunStrips; ++r) {
            const int64_t strip = first + r < p.strips ? first + r : p.strips - 1;
            count = p.panel(p.plan, strip, tile, tiles, panel + r * kPanelFours * 16);
        }
        for (int64_t block = 0; block < blocks; ++block) {
            const float* x = p.x + ((start + block) * p.fours + done) * kBlockTokens * 4;
            const auto add = block == blocks - 1 && last <= kFewTokensOfBlock ? add_panel<kFewTokensOfBlock> : add_panel<kBlockTokens>;
            for (int64_t r = 0; r < kRunStrips; r += kTogether) {
                add(panel + r * kPanelFours * 16, x, count, totals + r * stride + block * kBlock, stride);
            }
        }
        done += count;
    }
    for (int64_t r = 0; r < kRunStrips && first + r < p.strips; ++r) {
        p.finish(p.plan, first + r, start * kBlockTokens, blocks * kBlockTokens, totals + r * stride);
    }
}

inline Status run_panels(const RunPanels& p) {
    const int threads = p.call->threads;
    const int64_t blocks = ceil_div(p.call->tokens, kBlockTokens), passes = ceil_div(blocks * kBlockTokens, kRunPass);
    const int64_t per_pass = ceil_div(blocks, passes), number = ceil_div(p.strips, kRunStrips);
    constexpr size_t kPanel = kRunStrips * kPanelFours * 16;
    const size_t each = (kPanel + static_cast<size_t>(kRunStrips * per_pass * kBlockTokens * 16) + 1023) / 1024 * 1024;
    float* memory = static_cast<float*>(scratch(kWorkerScratch, sizeof(float) * each * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    parallel(blocks, threads, [&](int64_t block, int) {
        for (int64_t token = block * kBlockTokens; token < (block + 1) * kBlockTokens; ++token) place_in_fours(p, token);
    });
    parallel(number * passes, threads, [&](int64_t piece, int worker) {
        const int64_t start = piece / number * per_pass, stop = start + per_pass < blocks ? start + per_pass : blocks;
        float* mine = memory + each * static_cast<size_t>(worker);
        run_unit(p, piece % number * kRunStrips, start, stop, mine, mine + kPanel);
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
