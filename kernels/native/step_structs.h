// Arguments of the small operations of a decode step (step.h). Tensors are contiguous unless a stride is given.
#pragma once
#include "layout.h"

namespace aerogel {

constexpr int64_t kMostHead = 512;   // size of a key or value
constexpr int64_t kMostShare = 64;   // queries that share a key

struct Attend {
    const void *q, *k, *v;         // [batch, queries, key_size], [batch, heads, key_size], [batch, heads, value_size]
    int64_t q_step, k_step, v_step;  // from one sequence to the next, in elements
    const void *cosine, *sine;     // [batch or 1, key_size] or null
    void *keys, *values;           // [batch, heads, slots, size]; the new ones are written at `slot`
    const int64_t* start;          // [batch]: the first slot of each sequence
    const int64_t* slot_at;        // where the new key and value go; read when the operation runs
    void* out;                     // [batch, queries, value_size]
    int64_t batch, queries, heads, slots, key_size, value_size, window;
    float scale;
    int32_t type, angles_per_sequence, threads;
};

struct Prompt {
    const void *q, *k, *v;                             // [batch, queries or heads, tokens, size], rows contiguous
    const void *cosine, *sine;                         // [batch or 1, tokens, key_size], or null: rotated already
    void *keys, *values;                               // [batch, heads, slots, size], or null: rotated keys and values to keep
    const int64_t* start;                              // [batch]: first token of each sequence, or null for 0
    void* out;                                         // [batch, tokens - wanted, queries, value_size]; zeros before `start`
    int64_t q_strides[3], k_strides[3], v_strides[3];  // of the first three axes, in elements
    int64_t batch, queries, heads, tokens, key_size, value_size, slots;
    int64_t wanted;                                    // the first token whose result is wanted
    float scale;
    int32_t type, angles_per_sequence, threads;
};

struct Norm {
    const void *a, *b, *weight;  // [rows, size], the same or null, [size]
    void *sum, *y;               // a + b where there is a b; the result
    int64_t rows, size;
    float epsilon;
    int32_t type, round_first, threads;
};

struct Gate {
    const void *g, *u;  // rows of `size` numbers
    void* y;            // [rows, size]
    int64_t rows, size, g_stride, u_stride;
    int32_t type, threads;
};

struct Hadamard {
    const void* x;        // [rows, size]
    const int8_t* signs;  // [size], each 1 or -1
    void* y;              // [rows, size]: x itself, or apart from it
    int64_t rows, size;
    int64_t block;  // numbers that are mixed: a power of two that divides `size`
    int32_t type, threads;
};

struct Rows {
    const int64_t* ids;  // [count]: rows of a weight
    void* to;            // [count, columns]
    int64_t count, to_bytes;
    int32_t type;
};

struct RowSums {
    const void* part;      // [tokens, count]
    const int64_t* index;  // [count]: which of the rows they join; each at most once
    void* y;               // [tokens, rows]
    int64_t tokens, rows, count;
    int32_t type;
};

// One operation of a program: a matmul (Weight, Lookup or OwnTables, and Call), rows of a weight (Weight and Rows) or one of the above.
enum Kind : int32_t { kGemm = 0, kAttend = 1, kNorm = 2, kGate = 3, kLookup = 4, kRows = 5, kPrompt = 6, kOwn = 7, kRowSums = 8, kHadamard = 9 };

struct Operation {
    int32_t kind, reserved;
    const void* arguments;
    const void* more;  // the Call or Rows beside a weight
};

// Inputs as the loops of beside.h read them, [block of W tokens][columns][W]: of all columns in x's type (floats where W is 1),
// for outliers; of the kept columns as floats, filled up with zeros to whole sixteens.
struct Inputs {
    const char* all;
    const float* kept;
};

// Everything ready to be added to rows: `rows` adds what rows first .. stop - 1 get.
struct Adding {
    Beside beside;
    Inputs inputs;
    void (*rows)(const Beside&, const Inputs&, int64_t first, int64_t stop);
    bool tiled;  // it reads outliers in tiles
};

}  // namespace aerogel
