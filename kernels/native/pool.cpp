// See pool.h. One job at a time: workers enter through a gate while it is open, and a shared counter hands out the pieces.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace aerogel {
namespace {

// How long a worker watches for the next job before it sleeps.
constexpr auto kWatch = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    void run(int64_t pieces, int threads, Body body, void* context) {
        grow(threads - 1);
        body_ = body, context_ = context, pieces_ = pieces, helpers_ = threads - 1;
        next_.store(0, std::memory_order_relaxed);
        job_ += 1;
        gate_.store(job_ << kJobShift | kOpen);
        if (asleep_.load() > 0) {
            // Whoever counted itself asleep either sees the new number or already waits, once the lock was free.
            { std::lock_guard<std::mutex> guard(mutex_); }
            wake_.notify_all();
        }
        work(0);
        // All pieces are taken. Workers that never came (the machine is busy elsewhere) are not waited for.
        gate_.fetch_and(~kOpen);
        for (int round = 0; (gate_.load() & kInside) != 0; ++round) {
            relax();
            if (round > 2000) std::this_thread::yield();
        }
    }

    std::mutex in_use;

private:
    // Where the system gives no more threads, those that are there do the work: an exception must not cross the C boundary.
    void grow(int helpers) {
        for (; started_ < helpers; ++started_) {
            try {
                std::thread([this, number = started_] { serve(number); }).detach();
            } catch (const std::system_error&) {
                return;
            }
        }
    }

    void work(int worker) {
        for (int64_t piece; (piece = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) body_(context_, piece, worker);
    }

    // Waits until there is an open job this worker has not seen, and goes inside; the job's fields then stand still.
    uint64_t enter(uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + kWatch;
        for (int round = 1;; ++round) {
            uint64_t gate = gate_.load();
            while ((gate & kOpen) != 0 && gate >> kJobShift != seen) {
                if (gate_.compare_exchange_weak(gate, gate + 1)) return gate >> kJobShift;
            }
            relax();
            if (round % 64 == 0 && std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_.fetch_add(1);
                wake_.wait(lock, [&] { return (gate_.load() & kOpen) != 0 && gate_.load() >> kJobShift != seen; });
                asleep_.fetch_sub(1);
            }
        }
    }

    void serve(int number) {
        for (uint64_t seen = 0;;) {
            seen = enter(seen);
            if (number < helpers_) work(number + 1);
            gate_.fetch_sub(1);
        }
    }

    // The gate: the job's number, whether it may be entered, and how many workers are inside.
    static constexpr int kJobShift = 17;
    static constexpr uint64_t kOpen = 1u << 16, kInside = kOpen - 1;

    int started_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> gate_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> asleep_{0};
    uint64_t job_ = 0;
    int helpers_ = 0;
    Body body_ = nullptr;
    void* context_ = nullptr;
    int64_t pieces_ = 0;
};

// Never destroyed: its threads may outlive main. A child of fork has none of the threads, so it gets another pool.
Pool* pool = nullptr;
std::once_flag once;

std::atomic<Team> borrowed{nullptr};
thread_local bool own_pool = false;

Pool* shared() {
    std::call_once(once, [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] {
            pool = new Pool;
            borrowed.store(nullptr);
        });
    });
    return pool;
}

// One loop on borrowed threads: whoever comes takes pieces, and every piece is done when the team is.
struct Shared {
    Body body;
    void* context;
    int64_t pieces;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    static void work(void* self) {
        Shared& loop = *static_cast<Shared*>(self);
        const int worker = loop.workers.fetch_add(1, std::memory_order_relaxed);
        for (int64_t piece; (piece = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.pieces;) {
            loop.body(loop.context, piece, worker);
        }
    }
};

}  // namespace

void use_team(Team team) {
    shared();
    borrowed.store(team);
}

void use_own_pool(bool own) { own_pool = own; }

void parallel(int64_t pieces, int threads, Body body, void* context) {
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (const Team team = threads > 1 && !own_pool ? borrowed.load() : nullptr) {
        Shared loop{body, context, pieces};
        team(Shared::work, &loop, static_cast<unsigned>(threads), 0);
        return;
    }
    Pool* found = threads > 1 ? shared() : nullptr;
    std::unique_lock<std::mutex> turn;
    if (found) turn = std::unique_lock<std::mutex>(found->in_use, std::try_to_lock);
    if (!turn.owns_lock()) {
        for (int64_t piece = 0; piece < pieces; ++piece) body(context, piece, 0);
        return;
    }
    found->run(pieces, threads, body, context);
}

}  // namespace aerogel
