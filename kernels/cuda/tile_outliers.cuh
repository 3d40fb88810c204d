// Sparse outliers beside a packed weight, for many tokens: they are put where they belong in a tile of 16 x 128 numbers, which
// is zero elsewhere, and added to the fragments that the codes decode to.
//
// A warp has such a tile in shared memory, in fragments: one vector load gives a lane what it adds in a step. Before a tile's
// first step the last tile's outliers are taken out and its own are put in, at most 32 * OUTLIERS of them from registers,
// which were asked for a tile ahead; where they lie was asked for two tiles ahead. What a tile has beyond is read there and then.
//
// OUTLIERS: how many a lane holds for a tile, 0 where there are none. Codes must be multiplied with their scales, not the sums.

#pragma once
#include "wgmma_work.cuh"

constexpr int OUTLIER_TILE = 16 * 128 * 2;

#if OUTLIERS
// Where a tile's outliers begin and end.
struct Span {
    int begin = 0, end = 0;
};

// Of one row tile along K, for one warp.
struct TileOutliers {
    u8* tile;
    const int* starts;  // of the row tile's first tile
    u32 placed[OUTLIERS], next[OUTLIERS];
    Span span, next_span, span_behind;

    FN void clear(u8* room, int lane) {
        tile = room;
        for (int i = lane; i < OUTLIER_TILE / 16; i += 32) ((uint4*)tile)[i] = make_uint4(0, 0, 0, 0);
        __syncwarp();
    }
    FN Span span_of(int k, int last) const {
        const int* at = starts + min(k, last - 1);
        return {__ldg(at), __ldg(at + 1)};
    }
    FN void fetch(const u32* outliers, int lane) {
        const int first = next_span.begin + lane;
#pragma unroll
        for (int i = 0; i < OUTLIERS; i++) next[i] = first + 32 * i < next_span.end ? __ldg(outliers + first + 32 * i) : 0;
    }
    // Begins a run of tiles k .. last.
    FN void begin(const int* start, const u32* outliers, int k, int last, int lane) {
        starts = start;
        next_span = span_of(k, last), span_behind = span_of(k + 1, last);
        fetch(outliers, lane);
    }
    template <bool PUT> FN void write(const u32* outliers, int lane) {
        const int first = span.begin + lane;
#pragma unroll
        for (int i = 0; i < OUTLIERS; i++)
            if (first + 32 * i < span.end) *(u16*)(tile + (placed[i] & 0xFFFF)) = PUT ? placed[i] >> 16 : 0;
        for (int e = first + 32 * OUTLIERS; e < span.end; e += 32) {
            const u32 outlier = __ldg(outliers + e);
            *(u16*)(tile + (outlier & 0xFFFF)) = PUT ? outlier >> 16 : 0;
        }
        __syncwarp();
    }
    // From the tile before to tile k.
    FN void advance(const u32* outliers, int k, int last, int lane) {
        __syncwarp();
        write<false>(outliers, lane);
        span = next_span, next_span = span_behind;
#pragma unroll
        for (int i = 0; i < OUTLIERS; i++) placed[i] = next[i];
        write<true>(outliers, lane);
        fetch(outliers, lane);
        span_behind = span_of(k + 2, last);
    }
    FN uint4 of_step(int step, int lane) const { return *(const uint4*)(tile + (step * 32 + lane) * 16); }
};
#endif
