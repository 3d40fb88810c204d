// One call from activations to results: lay the activations out, choose the loop by the number of rows, hand out strips.
//
// Every output is summed by one thread in an order that depends on nothing but shapes, so the number of threads changes no
// bit. Rows of a block: the smallest compiled size that holds them all; else blocks of the largest, or panels (see panel.h).
#pragma once
#include "panel.h"
#include "paths.h"
#if defined(AEROGEL_TILES)
#include "amx.h"
#endif
#include "pool.h"
#include "scratch.h"

namespace aerogel {
namespace UNIT {

// How many rows and strips one loop takes, by the number of vector registers. Only widths that people use, on machines with
// wide registers, have the loop for few rows; the others decode panels at every number of rows.
#if defined(AEROGEL_SANITIZE)
constexpr int kMostRows = 4, kPanelRows = 3, kPanelStrips = 2, kThinStrips = 1;
#elif defined(__AVX512F__)
constexpr int kMostRows = 16, kPanelRows = 12, kPanelStrips = 2, kThinStrips = 4;
#elif defined(__AVX2__)
constexpr int kMostRows = 4, kPanelRows = 6, kPanelStrips = 1, kThinStrips = 2;
#elif defined(__aarch64__)
constexpr int kMostRows = 4, kPanelRows = 4, kPanelStrips = 1, kThinStrips = 1;
#else
constexpr int kMostRows = 0, kPanelRows = 2, kPanelStrips = 1, kThinStrips = 1;
#endif
// Float32 products take twice the instructions and a panel's decoding is soon paid for.
template <class P>
constexpr int most_rows() {
    return P::kOperands == 4 && kMostRows > 4 ? 4 : kMostRows;
}
#if defined(AEROGEL_SANITIZE)
constexpr bool tuned(int bits) { return kMostRows > 0 && bits == 3; }  // one width, of two limbs, stands for all of them
#else
constexpr bool tuned(int bits) { return kMostRows > 0 && (bits <= 4 || bits == 8); }
#endif
// Which sizes of the loop for few rows are compiled for a form of codes: all, all but two rows, or none. Arithmetic that is not made for
// tables has it for those of bytes alone; two bits are never picked among tables. Where arithmetic is, floats of 5 and 6 bits
// and widths that have groups of other than whole tiles (16, 40, 72) get some; the latter also as integers in float32 on AVX2.
enum Sizes { kNoSizes, kSomeSizes, kAllSizes };
template <class P>
constexpr Sizes sizes_for(int bits, Form form, bool ragged) {
    const bool made_for_tables = P::kOperands == 2, integers = kNative == 8 && P::kOperands == 4 && form == kIntegers;
    if (ragged) return tuned(bits) && (bits == 3 || bits == 4) && (made_for_tables || integers) ? kSomeSizes : kNoSizes;
    if (form == kTables && !made_for_tables) return tuned(bits) && bits == 8 ? kAllSizes : kNoSizes;
    if ((form == kTables && bits <= 2) || (P::kOperands == 1 && bits == 1)) return kNoSizes;
    if (form == kOneTable && tuned(4) && (bits == 5 || bits == 6)) return kSomeSizes;
    return tuned(bits) ? kAllSizes : kNoSizes;
}
// What one row has a loop of pairs for (pairs.h): integers of few bits, floats of more.
constexpr bool paired(int bits, bool ragged) { return bits <= 4 ? tuned(bits) && (!ragged || bits >= 3) : kMostRows > 0 && bits != 7 && !ragged; }
constexpr int strips_for(int rows) {
    return kNative == 16 ? (rows <= 2 ? 4 : rows <= 8 ? 2 : 1) : kNative == 8 && rows == 1 ? 2 : 1;
}
constexpr int kMostSums = 16;           // rows times strips of a loop for few rows
constexpr int kTileRows = 16;           // of a block on tiles (amx.h)
constexpr int64_t kPieceCodes = 256 * 1024;  // bytes of codes that stay in the second-level cache while blocks of rows pass
constexpr int64_t kMostStrips = 8;      // of a piece of a thread
constexpr int64_t kFewTokens = 128;     // beyond which panels are better in any case
constexpr int64_t kPassRows = 528;      // whose totals stay in the second-level cache
constexpr int64_t kSmall = 48 * 1024;   // bytes of codes below which waking a second thread costs more than it saves

// Totals [row][stride] of one strip and block of rows: terms are summed, bias added, rounded and stored.
inline void finish(const Plan& plan, int64_t strip, int64_t block, const float* total, int64_t stride) {
    const Weight& weight = *plan.weight;
    const Call& call = *plan.call;
    const int64_t row0 = strip * kStrip, left = weight.rows - row0, first = block * plan.tokens_per_block;
    const int count = static_cast<int>(left < kStrip ? left : kStrip);
    float bias[kStrip] = {};
    if (call.bias) {
        for (int lane = 0; lane < count; ++lane) bias[lane] = read_float(call.bias, row0 + lane, call.bias_type);
    }
    for (int64_t token = 0; token < plan.tokens_per_block && first + token < call.tokens; ++token) {
        F16 sum = load<F16>(total + token * plan.terms * stride);
        for (int64_t term = 1; term < plan.terms; ++term) sum = sum + load<F16>(total + (token * plan.terms + term) * stride);
        float out[kStrip];
        store(out, multiply_add(sum, spread<F16>(plan.factor_of_all), load<F16>(bias)));
        store_floats(call.y, (first + token) * weight.rows + row0, call.x_type, out, count);
    }
}

// What is compiled for every width and form of codes: a loop for few rows, and the decoding of a panel. All that
// lies around them is compiled once for an arithmetic.
using Loop = void (*)(const Plan&, int64_t first, int64_t block, float* totals);
using Decode = void (*)(const Plan&, int64_t R, int64_t first_strip, int64_t first, int64_t count, uint8_t* operands, I16* begin);

// What threads take of `all`: pieces of `size`, and what would be the last one of each thread in pieces of `part`, so that all end
// together.
struct Pieces {
    int64_t all, size, whole, part, count;

    Pieces(int64_t of, int64_t size_of_piece, int threads, int64_t part_at_end) : all(of), size(size_of_piece), part(part_at_end) {
        if (threads == 1) part = size;
        whole = threads == 1 || all / size < threads ? all / size : all / size - threads;
        count = whole + ceil_div(all - whole * size, part);
    }
    int64_t start(int64_t piece) const {
        const int64_t at = piece < whole ? piece * size : whole * size + (piece - whole) * part;
        return at < all ? at : all;
    }
};

// All strips by a loop that takes R of them at a time. Where there are several blocks, a piece's codes stay in the second-level cache
// and are decoded anew for each.
inline void few(const Plan& plan, int64_t R, Loop loop) {
    const int64_t units = ceil_div(plan.strips, R), sums = plan.block_rows * kStrip;
    const int threads = plan.strips * plan.strip_bytes * plan.blocks < kSmall ? 1 : plan.call->threads;
    // Some pieces for each thread even out what else the machine does. What a loop asks for ahead lies in the next unit, so a piece
    // is as many as there may be.
    const int64_t most = plan.blocks == 1 ? units : kPieceCodes / (R * plan.strip_bytes);
    const int64_t even = threads == 1 ? units : units / (threads * 6), wanted = even < most ? even : most;
    const int64_t size = wanted > 1 ? wanted : 1;
    const Pieces pieces(units, size, threads, size > 4 ? size / 4 : 1);
    parallel(pieces.count, threads, [&](int64_t piece, int) {
        const int64_t start = pieces.start(piece), stop = pieces.start(piece + 1);
        for (int64_t block = 0; block < plan.blocks; ++block) {
            for (int64_t unit = start; unit < stop; ++unit) {
                alignas(64) float totals[kMostSums * kStrip];
                if (plan.adding) ask_for(*plan.adding, unit * R * kStrip, (unit + 1) * R * kStrip);
                loop(plan, unit * R, block, totals);
                for (int64_t r = 0; r < R && unit * R + r < plan.strips; ++r) finish(plan, unit * R + r, block, totals + r * sums, kStrip);
            }
        }
        if (plan.adding) add(*plan.adding, start * R * kStrip, stop * R * kStrip);
    });
}

// Blocks first .. first + count - 1 against strips start .. stop - 1; `operands` holds a panel.
template <class P, Range RANGE, int R, int M>
void panels(const Plan& plan, Decode decode, int64_t start, int64_t stop, int64_t first, int64_t count, uint8_t* operands, float* totals) {
    I16 begin[RANGE == kMoved ? kOctets * kBlockTiles * R : 1];
    const int64_t whole = plan.segment_tiles ? plan.segment_tiles : 1, step = kBlockTiles / whole * whole;
    const int64_t block_size = R * M * kStrip, strip_size = count * block_size;
    memset(totals, 0, sizeof(float) * static_cast<size_t>(ceil_div(stop - start, R) * strip_size));
#if defined(AEROGEL_TILES)
    if constexpr (P::kTiles) tiles_begin();
#endif
    for (int64_t tile = 0; tile < plan.tiles; tile += step) {
        const int64_t tiles = plan.tiles - tile < step ? plan.tiles - tile : step;
        for (int64_t strip = start; strip < stop; strip += R) {
            decode(plan, R, strip, tile, tiles, operands, begin);
            float* to = totals + (strip - start) / R * strip_size;
            for (int64_t block = 0; block < count; ++block, to += block_size) {
#if defined(AEROGEL_TILES)
                if constexpr (P::kTiles) {
                    tile_panel<P, R>(plan, operands, strip, tile, tiles, first + block, to);
                    continue;
                }
#endif
                const auto with = plan.ragged() ? panel<P, RANGE, R, M, true> : panel<P, RANGE, R, M, false>;
                with(plan, operands, begin, strip, tile, tiles, first + block, plan.bias, to);
            }
        }
    }
#if defined(AEROGEL_TILES)
    if constexpr (P::kTiles) tiles_end();
#endif
    // All strips of a block of rows together: their results lie side by side in a few pages of memory.
    for (int64_t block = 0; block < count; ++block) {
        for (int64_t strip = start; strip < stop; ++strip) {
            const int64_t unit = (strip - start) / R, r = (strip - start) % R;
            finish(plan, strip, first + block, totals + unit * strip_size + block * block_size + r * kStrip, R * kStrip);
        }
    }
}

// Strips of a piece of a loop for many rows: few pieces, because each reads all activations, but such that the thread with the most
// has little more than the others. Less than a sixteenth is not worth another piece.
inline int64_t strips_of_piece(int64_t strips, int threads, int64_t step) {
    int64_t best = step, least = strips * kMostThreads;
    for (int64_t size = ceil_div(kMostStrips, step) * step; size > 0; size -= step) {
        const int64_t longest = ceil_div(ceil_div(strips, size), threads) * size;
        if (longest + longest / 16 < least) best = size, least = longest;
    }
    return best;
}

template <class P, Range RANGE, int R, int M>
Status many(const Plan& plan, Decode decode) {
    constexpr int64_t kPanelBytes = kBlockTiles * 8 * P::kOperands * R * kVector;
    const int threads = plan.call->threads;
    const int64_t size = strips_of_piece(plan.strips, threads, R);
    const Pieces pieces(plan.strips, size, threads, ceil_div(size, 4 * R) * R);
    const int64_t most = kPassRows / M, passes = ceil_div(plan.blocks, most), per_pass = ceil_div(plan.blocks, passes);
    const size_t total_bytes = static_cast<size_t>(pieces.size * per_pass * M * kStrip) * sizeof(float);
    const size_t worker_bytes = (kPanelBytes + total_bytes + 4095) / 4096 * 4096;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kWorkerScratch, worker_bytes * static_cast<size_t>(threads)));
    if (!memory) return kOutOfMemory;
    parallel(pieces.count * passes, threads, [&](int64_t number, int worker) {
        uint8_t* mine = memory + worker_bytes * static_cast<size_t>(worker);
        const int64_t piece = number % pieces.count, first = number / pieces.count * per_pass;
        const int64_t count = plan.blocks - first < per_pass ? plan.blocks - first : per_pass;
        float* totals = reinterpret_cast<float*>(mine + kPanelBytes);
        panels<P, RANGE, R, M>(plan, decode, pieces.start(piece), pieces.start(piece + 1), first, count, mine, totals);
    });
    return kDone;
}

// The loop for as many rows as `choose_blocks` took.
template <class P, int BITS, Form FORM, int PIECES>
Loop loop_for(int rows) {
    constexpr Sizes kSizes = sizes_for<P>(BITS, FORM, PIECES > 1);
    if constexpr (P::kOnlyOneRow) {
        if constexpr (paired(BITS, PIECES > 1)) return strips<P, BITS, FORM, 1, 1, PIECES>;
    } else if constexpr (kSizes != kNoSizes) {
        if (rows == 1) return strips<P, BITS, FORM, strips_for(1), 1, PIECES>;
        if (rows == 4) return strips<P, BITS, FORM, strips_for(4), 4, PIECES>;
        if constexpr (most_rows<P>() == 16) {
            if (rows == 8) return strips<P, BITS, FORM, strips_for(8), 8, PIECES>;
            if (rows == 16) return strips<P, BITS, FORM, strips_for(16), 16, PIECES>;
        }
        if constexpr (kSizes == kAllSizes) {
            if (rows == 2) return strips<P, BITS, FORM, strips_for(2), 2, PIECES>;
        }
    }
    return nullptr;
}

// The one whose pieces end where segments do; halves of a tile, as groups of 16 have them, take fewer instructions than octets.
template <class P, int BITS, Form FORM>
Loop loop_of(const Plan& plan) {
    if (!plan.ragged()) return loop_for<P, BITS, FORM, 1>(plan.block_rows);
    if constexpr (BITS == 4) {
        if (plan.columns.group % (kTile / 2) == 0 && plan.segment_octets % 2 == 0) return loop_for<P, BITS, FORM, 2>(plan.block_rows);
    }
    return loop_for<P, BITS, FORM, kOctets>(plan.block_rows);
}

template <class P, int BITS, Form FORM>
Status multiply_form(Plan& plan) {
    constexpr Range kRange = P::template moves<BITS>() ? kMoved : P::template range<BITS>();
    P::template write_decoder<BITS, FORM>(*plan.weight, plan.decoder);
    plan.bias = static_cast<float>(P::template bias<BITS, FORM>());
    if constexpr (P::kTiles) {
        return many<P, kRange, 4, kTileRows>(plan, decode<P, BITS, FORM>);
    } else if constexpr (P::kOnlyOneRow) {
        if constexpr (paired(BITS, false)) few(plan, 1, loop_of<P, BITS, FORM>(plan));
    } else if (plan.few) {
        few(plan, strips_for(plan.block_rows), loop_of<P, BITS, FORM>(plan));
    } else if (plan.block_rows == 1) {
        return many<P, kRange, kThinStrips, 1>(plan, decode<P, BITS, FORM>);
    } else if (P::kFolds && plan.block_rows == kMostRows) {
        if constexpr (P::kFolds) return many<P, kRange, 1, kMostRows>(plan, decode<P, BITS, FORM>);
    } else {
        return many<P, kRange, kPanelStrips, kPanelRows>(plan, decode<P, BITS, FORM>);
    }
    return kDone;
}

template <class P, int BITS>
Status multiply(Plan& plan) {
    if constexpr (P::template runs<BITS, kIntegers>()) {
        if (plan.form == kIntegers) return multiply_form<P, BITS, kIntegers>(plan);
    }
    if constexpr (P::template runs<BITS, kOneTable>()) {
        if (plan.form == kOneTable) return multiply_form<P, BITS, kOneTable>(plan);
    }
    if constexpr (P::template runs<BITS, kTables>()) {
        if (plan.form == kTables) return multiply_form<P, BITS, kTables>(plan);
    }
    return kBadTable;
}

// Rows of all tokens in blocks of so many, which hold whole tokens.
inline int64_t rows_in_blocks(const Plan& plan, int64_t rows) { return ceil_div(plan.call->tokens, rows / plan.terms) * rows; }

// Whether many rows are multiplied where codes are decoded, block by block: bfloat16 products leave time for it. A panel takes an eighth
// more for a row, but its blocks are smaller, and of many long rows it finds more in the second-level cache.
template <class P>
bool decodes_anew(const Plan& plan) {
    if (P::kOperands != 2 || plan.call->tokens > kFewTokens) return false;
    return 8 * rows_in_blocks(plan, most_rows<P>()) <= 9 * rows_in_blocks(plan, kPanelRows);
}

// Rows of a block, and how many blocks, for all tokens of the call.
template <class P>
void choose_blocks(Plan& plan) {
    constexpr bool kMoves[] = {P::template moves<1>(), P::template moves<8>()};
    const int64_t rows = plan.call->tokens * plan.terms;
    plan.form = P::form(!plan.weight->table ? kIntegers : plan.weight->pick ? kTables : kOneTable);
    const Sizes sizes = sizes_for<P>(plan.weight->bits, plan.form, plan.ragged());
    const bool folds = P::folds(*plan.weight, rows);
    plan.few = !P::kTiles && sizes != kNoSizes && (rows <= most_rows<P>() || (!folds && decodes_anew<P>(plan)));
    plan.block_rows = P::kTiles ? kTileRows : rows == 1 ? 1 : kPanelRows;
    if (plan.few) {
        const int64_t wanted = rows < most_rows<P>() ? rows : most_rows<P>();
        for (plan.block_rows = 1; plan.block_rows < wanted;) plan.block_rows *= 2;
        if (plan.block_rows == 2 && sizes == kSomeSizes) plan.block_rows = 4;
    }
    if (!plan.few && folds) {
        // Without scales to apply, larger blocks that one strip meets are as good as those that two meet.
        set_segments<P>(plan, true);
        if (rows_in_blocks(plan, kMostRows) < rows_in_blocks(plan, kPanelRows)) plan.block_rows = kMostRows;
    }
    plan.moved = !plan.few && kMoves[plan.weight->bits == 8];
    // A block holds whole tokens.
    plan.tokens_per_block = plan.block_rows / plan.terms;
    plan.blocks = ceil_div(plan.call->tokens, plan.tokens_per_block);
}

// Zeros for the rows that blocks have beyond the tokens: in every block, or in the last.
inline void clear_missing(const Plan& plan) {
    const bool every = plan.tokens_per_block * plan.terms != plan.block_rows;
    if (!every && plan.call->tokens % plan.tokens_per_block == 0) return;
    const int64_t first = every ? 0 : plan.blocks - 1, tile_bytes = plan.block_rows * plan.row_bytes;
    for (int64_t tile = 0; tile < plan.tiles; tile += kBlockTiles) {
        const int64_t tiles = plan.tiles - tile < kBlockTiles ? plan.tiles - tile : kBlockTiles;
        for (int64_t block = first; block < plan.blocks; ++block) {
            memset(const_cast<uint8_t*>(plan.x_at(block, tile)), 0, static_cast<size_t>(tiles * tile_bytes));
        }
    }
    const int64_t begin = plan.factor(first, 0), count = plan.factor(plan.blocks, 0) - begin;
    memset(plan.x_sum + begin, 0, static_cast<size_t>(count) * sizeof(float));
    memset(plan.x_scale + begin, 0, static_cast<size_t>(count) * sizeof(float));
}

// `added`: whether what stands beside the weight was added by those who made the rows.
template <class P>
Status run_product(const Weight& weight, const Call& call, bool& added) {
    Plan plan = make_plan<P>(weight, call);
    choose_blocks<P>(plan);
    const size_t x_bytes = static_cast<size_t>(plan.blocks * plan.tiles * plan.block_rows * plan.row_bytes);
    const size_t factor_bytes = (static_cast<size_t>(plan.blocks * plan.segments * plan.block_rows) * sizeof(float) + 63) / 64 * 64;
    const size_t octets = static_cast<size_t>(plan.octets());
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, x_bytes + 2 * factor_bytes + (2 * octets + 1) * sizeof(int32_t)));
    if (!memory) return kOutOfMemory;
    plan.x = memory, plan.x_sum = reinterpret_cast<float*>(memory + x_bytes);
    plan.x_scale = reinterpret_cast<float*>(memory + x_bytes + factor_bytes);
    plan.group_at = reinterpret_cast<int32_t*>(memory + x_bytes + 2 * factor_bytes), plan.segment_at = plan.group_at + octets;
    place_octets(plan);
    clear_missing(plan);
    if (plan.ragged()) memset(plan.x_sum, 0, factor_bytes);  // sums are added up there
    plan.factor_of_all = weight.table ? weight.factor : 1.0f;
    const int threads = call.tokens * weight.columns < (1 << 16) ? 1 : call.threads;
    const int64_t grain = threads == 1 ? call.tokens : ceil_div(call.tokens, 4 * threads);
    parallel(ceil_div(call.tokens, grain), threads, [&](int64_t piece, int) {
        const int64_t stop = (piece + 1) * grain < call.tokens ? (piece + 1) * grain : call.tokens;
        for (int64_t token = piece * grain; token < stop; ++token) place_token<P>(plan, token);
    });
    Adding adding;
    added = call.beside && plan.few && plan.blocks == 1;
    if (added) {
        const Status status = path_entry(call.path).step.prepare(*call.beside, threads, adding);
        if (status != kDone) return status;
        plan.adding = &adding;
    }
    switch (weight.bits) {
        case 1: return multiply<P, 1>(plan);
        case 2: return multiply<P, 2>(plan);
        case 3: return multiply<P, 3>(plan);
        case 4: return multiply<P, 4>(plan);
        case 5: return multiply<P, 5>(plan);
        case 6: return multiply<P, 6>(plan);
        case 7: return multiply<P, 7>(plan);
        case 8: return multiply<P, 8>(plan);
        default: return kBadWidth;
    }
}

template <class P>
Status run(const Weight& weight, const Call& call) {
    Call seen = call;
    if (call.beside && call.beside->kept && call.numerics != kExact) seen.x = quiet(*call.beside);
    if (!seen.x) return kOutOfMemory;
    bool added = false;
    const Status status = run_product<P>(weight, seen, added);
    return status != kDone || !call.beside || added ? status : path_entry(call.path).step.beside(*call.beside);
}

}  // namespace UNIT
}  // namespace aerogel
