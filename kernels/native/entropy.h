// Entropy coding of bytes on the CPU; what is computed and stored: kernels/entropy/ref.py.
//
// Every run of 256 symbols begins at a byte of its own, so runs are coded and decoded side by side on all threads. Nothing
// is read or written beyond the sizes given: a damaged stream gives wrong symbols, or the status below, and no more.
#pragma once
#include "api.h"

namespace aerogel {

constexpr int64_t kRun = 256;     // symbols of a run
constexpr int kLongestCode = 12;  // bits

struct EntropyCode {
    uint8_t bits[256];    // of each symbol, 0 where it never occurs
    uint16_t words[256];  // its bits, the first in the lowest place
};

}  // namespace aerogel

extern "C" {

// counts[256] += how often each byte occurs.
PUBLIC void aerogel_native_count_bytes(const uint8_t* symbols, int64_t count, int64_t* counts, int32_t threads);

// Bytes of each run under a code, to lengths[ceil(count / 256)]. A Status: a symbol without a code is kBadShape.
PUBLIC int32_t aerogel_native_entropy_lengths(const uint8_t* symbols, int64_t count, const aerogel::EntropyCode* code,
                                              uint16_t* lengths, int32_t threads);

// The runs, one after the other, to stream[stream_bytes], which must be the sum of `lengths`.
PUBLIC int32_t aerogel_native_entropy_encode(const uint8_t* symbols, int64_t count, const aerogel::EntropyCode* code,
                                             const uint16_t* lengths, uint8_t* stream, int64_t stream_bytes, int32_t threads);

// The bytes back. table[4096]: symbol + 256 * length for each next 12 bits.
PUBLIC int32_t aerogel_native_entropy_decode(const uint8_t* stream, int64_t stream_bytes, const uint16_t* lengths,
                                             const uint16_t* table, int64_t count, uint8_t* symbols, int32_t threads);

// The same, each symbol joined with a byte of `rest` to a bfloat16: rest holds the sign in its top bit and the mantissa.
PUBLIC int32_t aerogel_native_entropy_decode_bfloat16(const uint8_t* stream, int64_t stream_bytes, const uint16_t* lengths,
                                                      const uint16_t* table, const uint8_t* rest, int64_t count,
                                                      uint16_t* numbers, int32_t threads);

// Splits bfloat16 numbers into exponents and the rest.
PUBLIC void aerogel_native_split_bfloat16(const uint16_t* numbers, int64_t count, uint8_t* exponents, uint8_t* rest,
                                          int32_t threads);
}
