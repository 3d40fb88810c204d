// A pool of threads for loops whose pieces are independent.
//
// `parallel(pieces, threads, body)` runs body(piece, worker) once for every piece, on the calling thread and threads - 1
// others, torch's where we are told of them. Which thread runs a piece is left to chance, so a piece must not depend on it:
// then any number of threads gives the same bits. Workers wait actively for a short while, because the next matmul of a model follows within microseconds,
// and sleep after that, so that they never compete for long with the threads of another library. A caller that finds the
// pool in use (a second Python thread, or a worker itself) runs its loop alone. After a fork the child starts a new pool.
#pragma once
#include <cstdint>

namespace aerogel {

using Body = void (*)(void* context, int64_t piece, int worker);

void parallel(int64_t pieces, int threads, Body body, void* context);

template <class F>
void parallel(int64_t pieces, int threads, F&& f) {
    parallel(pieces, threads, [](void* context, int64_t piece, int worker) { (*static_cast<F*>(context))(piece, worker); }, &f);
}

constexpr int kMostThreads = 256;

// GOMP_parallel of the OpenMP library that torch runs on. With it, loops run on torch's own threads, so that two pools never
// wait actively for each other's cores; null goes back to ours. A child of fork goes back by itself.
using Team = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
void use_team(Team team);

// Whether loops of the calling thread run on our own pool although a team was given. Right where torch runs nothing in
// parallel in between: a team is waited for as a whole, so one thread whose core is busy elsewhere holds up every loop, and our
// pool goes on without it.
void use_own_pool(bool own);

}  // namespace aerogel
