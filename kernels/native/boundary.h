// What every function of the C boundary checks alike before it reads, and what it adds behind a product.
#pragma once
#include "layout.h"
#include "pool.h"

namespace aerogel {

inline bool known_type(int32_t type) { return type == kFloat32 || type == kFloat16 || type == kBfloat16; }
inline int64_t type_size(int32_t type) { return type == kFloat32 ? 4 : 2; }
inline bool misaligned(const void* at, int64_t to) { return reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(to) != 0; }
inline bool unreadable(const void* at, int64_t to) { return !at || misaligned(at, to); }
inline int32_t bounded_threads(int32_t threads) { return threads < 1 ? 1 : threads > kMostThreads ? kMostThreads : threads; }

// Whether what is added to a product may be read.
Status check_added(const Beside& beside);

// What is added to one call's product with a weight [rows, columns], with the call's own activations and results.
Beside beside_of(const Call& call, int64_t rows, int64_t columns);

// What a call wants added to such a product, `call.beside`: whether it may be read, and adding it to y, by `path`. For products that do
// not add it on their way.
Status check_beside(const Call& call, int64_t rows, int64_t columns);
Status add_beside(const Call& call, int64_t rows, int64_t columns, int32_t path);

}  // namespace aerogel
