// The C boundary: what Python calls. Every pointer comes with its size and is checked before anything is read.
#pragma once
#include "layout.h"
#include "lookup.h"
#include "own.h"
#include "step_structs.h"

#define PUBLIC __attribute__((visibility("default")))

extern "C" {

// Raised whenever a struct, a code or the layout changes, so that an old library is not called with new arguments.
PUBLIC int32_t aerogel_native_version();

// Bit p is set when path p was compiled in (`built`) and when this machine can run it (`able`). Paths: see paths.cpp.
PUBLIC uint32_t aerogel_native_built();
PUBLIC uint32_t aerogel_native_able();

// The path that `path = -1` stands for, with these numerics.
PUBLIC int32_t aerogel_native_best(int32_t numerics);

// Only paths whose bit is set are chosen from here on, in the whole process, as on a machine that has no others. What is asked for by
// its number runs all the same.
PUBLIC void aerogel_native_choose_among(uint32_t paths);

// y = x W^T + bias. Returns a Status.
PUBLIC int32_t aerogel_native_gemm(const aerogel::Weight* weight, const aerogel::Call* call);

// One weight's view of the same, for callers that keep structs: returns a Status without reading the weight.
PUBLIC int32_t aerogel_native_check(const aerogel::Weight* weight);

// The same for weights that are tables, see lookup.h; `check` also looks at every pick, which `lookup` relies on.
PUBLIC int32_t aerogel_native_lookup(const aerogel::Lookup* weight, const aerogel::Call* call);
PUBLIC int32_t aerogel_native_lookup_check(const aerogel::Lookup* weight);

// The same for weights whose rows have tables of their own, see own.h: activations in bfloat16.
PUBLIC int32_t aerogel_native_own(const aerogel::OwnTables* weight, const aerogel::Call* call);
PUBLIC int32_t aerogel_native_own_check(const aerogel::OwnTables* weight);

// Rows of a weight, decoded: an embedding. Returns a Status, kNoSuchRow for an id that is no row.
PUBLIC int32_t aerogel_native_rows(const aerogel::Weight* weight, const aerogel::Rows* wanted);

// y[:, index] += part: what rows of more bits add to a product. Returns a Status, kNoSuchRow for an index that is no row.
PUBLIC int32_t aerogel_native_row_sums(const aerogel::RowSums* arguments);

// Small operations of a decode step on the best path of this machine; arguments: step_structs.h. Return a Status.
PUBLIC int32_t aerogel_native_attend(const aerogel::Attend* arguments);
PUBLIC int32_t aerogel_native_prompt(const aerogel::Prompt* arguments);
PUBLIC int32_t aerogel_native_norm(const aerogel::Norm* arguments);
PUBLIC int32_t aerogel_native_gate(const aerogel::Gate* arguments);
PUBLIC int32_t aerogel_native_hadamard(const aerogel::Hadamard* arguments);

// Adds what stands beside a weight (beside.h) to any product; columns are within bounds by the caller's word. Returns a Status.
PUBLIC int32_t aerogel_native_beside(const aerogel::Beside* arguments);

// The outliers of a weight (start, column, value, outliers, rows, columns) in tiles, written to `to` where `bytes` are enough. How many
// that takes; where `bytes` do not hold the first part, a number that does, so a caller asks until it has enough. Below 0: -Status.
PUBLIC int64_t aerogel_native_outlier_tiles(const aerogel::Beside* beside, void* to, int64_t bytes);

// Runs operations one after the other: a whole decode step without returning to Python. Returns the first Status that is
// not 0, and the number of operations done in `done`.
PUBLIC int32_t aerogel_native_program(const aerogel::Operation* operations, int64_t count, int64_t* done);

// See pool.h; for the calling thread.
PUBLIC void aerogel_native_own_pool(int32_t own);

// See pool.h: `team` is the address of GOMP_parallel, or null.
PUBLIC void aerogel_native_use_team(void* team);

// Bytes per second of plain reading with so many threads, handed out as a matmul's rows are: one pass over what `bytes` bytes at
// `memory` have of whole 128 KiB, with the widest loads of this machine's best path.
PUBLIC double aerogel_native_read(const void* memory, int64_t bytes, int32_t threads);
}
