// See entropy.h.
#include "entropy.h"

#include <cstring>
#include <memory>
#include <mutex>

#include "pool.h"

using namespace aerogel;

namespace {

constexpr int64_t kRunsAtOnce = 64;  // runs of a piece: 16 thousand symbols
constexpr uint64_t kWindow = (1u << kLongestCode) - 1;

int64_t runs_of(int64_t count) { return (count + kRun - 1) / kRun; }
int64_t pieces_of(int64_t count) { return (runs_of(count) + kRunsAtOnce - 1) / kRunsAtOnce; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int bounded(int32_t threads) { return threads < 1 ? 1 : threads > kMostThreads ? kMostThreads : threads; }

// Where each piece's bytes begin; the last entry is the sum of all lengths.
std::unique_ptr<int64_t[]> piece_starts(const uint16_t* lengths, int64_t count) {
    const int64_t runs = runs_of(count), pieces = pieces_of(count);
    std::unique_ptr<int64_t[]> starts(new int64_t[pieces + 1]);
    int64_t at = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        starts[piece] = at;
        for (int64_t run = piece * kRunsAtOnce; run < least(runs, (piece + 1) * kRunsAtOnce); ++run) at += lengths[run];
    }
    starts[pieces] = at;
    return starts;
}

// Calls body(run, first byte of the run) for every run, pieces side by side.
template <class F>
void each_run(const uint16_t* lengths, const int64_t* starts, int64_t count, int32_t threads, F&& body) {
    const int64_t runs = runs_of(count);
    parallel(pieces_of(count), bounded(threads), [&](int64_t piece, int) {
        int64_t at = starts[piece];
        for (int64_t run = piece * kRunsAtOnce; run < least(runs, (piece + 1) * kRunsAtOnce); ++run) {
            body(run, at);
            at += lengths[run];
        }
    });
}

// The bits from a place in the stream, lowest first; zeros behind the stream's end.
struct BitReader {
    const uint8_t* at;
    const uint8_t* end;
    uint64_t bits = 0;
    int held = 0;

    void refill() {
        if (end - at >= 8) {
            uint64_t word;
            memcpy(&word, at, 8);
            bits |= word << held;
            at += (63 - held) >> 3;
            held |= 56;
        } else {
            while (held <= 56 && at < end) bits |= static_cast<uint64_t>(*at++) << held, held += 8;
            if (at == end) held = 63;  // zeros from here on
        }
    }
    uint8_t take(const uint16_t* table) {
        const uint16_t entry = table[bits & kWindow];
        bits >>= entry >> 8;
        held -= entry >> 8;
        return static_cast<uint8_t>(entry);
    }
};

// Symbols of one run, handed on four at a time: 4 * 12 bits fit into what one refill brings.
template <class F>
void decode_run(const uint8_t* from, const uint8_t* end, const uint16_t* table, int64_t symbols, F&& emit) {
    BitReader reader{from, end};
    int64_t i = 0;
    for (; i + 4 <= symbols; i += 4) {
        reader.refill();
        for (int j = 0; j < 4; ++j) emit(i + j, reader.take(table));
    }
    reader.refill();
    for (; i < symbols; ++i) emit(i, reader.take(table));
}

bool lengths_fit(const uint16_t* lengths, const int64_t* starts, int64_t count, int64_t stream_bytes) {
    if (starts[pieces_of(count)] != stream_bytes) return false;
    for (int64_t run = 0; run < runs_of(count); ++run) {
        if (lengths[run] > kRun * kLongestCode / 8) return false;
    }
    return true;
}

}  // namespace

void aerogel_native_count_bytes(const uint8_t* symbols, int64_t count, int64_t* counts, int32_t threads) {
    std::mutex adding;
    parallel(pieces_of(count), bounded(threads), [&](int64_t piece, int) {
        // Four histograms, so that equal neighbours do not wait for each other's store.
        uint32_t found[4][256] = {};
        const int64_t first = piece * kRunsAtOnce * kRun, last = least(count, first + kRunsAtOnce * kRun);
        int64_t i = first;
        for (; i + 4 <= last; i += 4) {
            for (int j = 0; j < 4; ++j) ++found[j][symbols[i + j]];
        }
        for (; i < last; ++i) ++found[0][symbols[i]];
        const std::lock_guard<std::mutex> held(adding);
        for (int s = 0; s < 256; ++s) counts[s] += int64_t{found[0][s]} + found[1][s] + found[2][s] + found[3][s];
    });
}

int32_t aerogel_native_entropy_lengths(const uint8_t* symbols, int64_t count, const EntropyCode* code, uint16_t* lengths,
                                       int32_t threads) {
    volatile bool uncoded = false;
    parallel(pieces_of(count), bounded(threads), [&](int64_t piece, int) {
        for (int64_t run = piece * kRunsAtOnce; run < least(runs_of(count), (piece + 1) * kRunsAtOnce); ++run) {
            const int64_t last = least(count, (run + 1) * kRun);
            uint32_t bits = 0;
            bool absent = false;
            for (int64_t i = run * kRun; i < last; ++i) bits += code->bits[symbols[i]], absent |= code->bits[symbols[i]] == 0;
            if (absent) uncoded = true;
            lengths[run] = static_cast<uint16_t>((bits + 7) / 8);
        }
    });
    return uncoded ? kBadShape : kDone;
}

int32_t aerogel_native_entropy_encode(const uint8_t* symbols, int64_t count, const EntropyCode* code, const uint16_t* lengths,
                                      uint8_t* stream, int64_t stream_bytes, int32_t threads) {
    const auto starts = piece_starts(lengths, count);
    if (!lengths_fit(lengths, starts.get(), count, stream_bytes)) return kTruncatedCodes;
    uint32_t entries[256];  // bits << 16 | word: one look-up a symbol
    for (int s = 0; s < 256; ++s) entries[s] = uint32_t{code->bits[s]} << 16 | code->words[s];
    each_run(lengths, starts.get(), count, threads, [&](int64_t run, int64_t begin) {
        uint8_t *at = stream + begin, *const end = at + lengths[run];
        uint64_t bits = 0;
        int held = 0;
        for (int64_t i = run * kRun; i < least(count, (run + 1) * kRun); ++i) {
            const uint32_t entry = entries[symbols[i]];
            bits |= static_cast<uint64_t>(entry & kWindow) << held;
            held += static_cast<int>(entry >> 16);
            if (held >= 32 && end - at >= 4) {
                memcpy(at, &bits, 4);
                at += 4, bits >>= 32, held -= 32;
            }
        }
        for (; at < end; bits >>= 8) *at++ = static_cast<uint8_t>(bits);
    });
    return kDone;
}

int32_t aerogel_native_entropy_decode(const uint8_t* stream, int64_t stream_bytes, const uint16_t* lengths,
                                      const uint16_t* table, int64_t count, uint8_t* symbols, int32_t threads) {
    const auto starts = piece_starts(lengths, count);
    if (!lengths_fit(lengths, starts.get(), count, stream_bytes)) return kTruncatedCodes;
    each_run(lengths, starts.get(), count, threads, [&](int64_t run, int64_t begin) {
        uint8_t* const to = symbols + run * kRun;
        decode_run(stream + begin, stream + stream_bytes, table, least(kRun, count - run * kRun),
                   [&](int64_t i, uint8_t symbol) { to[i] = symbol; });
    });
    return kDone;
}

int32_t aerogel_native_entropy_decode_bfloat16(const uint8_t* stream, int64_t stream_bytes, const uint16_t* lengths,
                                               const uint16_t* table, const uint8_t* rest, int64_t count, uint16_t* numbers,
                                               int32_t threads) {
    const auto starts = piece_starts(lengths, count);
    if (!lengths_fit(lengths, starts.get(), count, stream_bytes)) return kTruncatedCodes;
    each_run(lengths, starts.get(), count, threads, [&](int64_t run, int64_t begin) {
        uint16_t* const to = numbers + run * kRun;
        const uint8_t* const beside = rest + run * kRun;
        decode_run(stream + begin, stream + stream_bytes, table, least(kRun, count - run * kRun), [&](int64_t i, uint8_t exponent) {
            to[i] = static_cast<uint16_t>((beside[i] & 0x80) << 8 | exponent << 7 | (beside[i] & 0x7F));
        });
    });
    return kDone;
}

void aerogel_native_split_bfloat16(const uint16_t* numbers, int64_t count, uint8_t* exponents, uint8_t* rest,
                                   int32_t threads) {
    parallel(pieces_of(count), bounded(threads), [&](int64_t piece, int) {
        const int64_t first = piece * kRunsAtOnce * kRun, last = least(count, first + kRunsAtOnce * kRun);
        for (int64_t i = first; i < last; ++i) {
            exponents[i] = static_cast<uint8_t>(numbers[i] >> 7);
            rest[i] = static_cast<uint8_t>(numbers[i] >> 8 & 0x80) | static_cast<uint8_t>(numbers[i] & 0x7F);
        }
    });
}
