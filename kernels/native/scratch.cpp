// See scratch.h.
#include "scratch.h"

#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace aerogel {
namespace {

// A processor knows the addresses of some thousand pages. Activations of a prompt are more small pages than that, and are walked
// through again and again.
constexpr size_t kPage = 4096, kLargePage = size_t{2} << 20;

struct Memory {
    void* at = nullptr;
    size_t size = 0;
    ~Memory() { std::free(at); }
};
thread_local Memory kept[kScratchUses];

}  // namespace

void* scratch(ScratchUse use, size_t bytes) {
    Memory& memory = kept[use];
    if (memory.size < bytes) {
        const size_t page = bytes < kLargePage ? kPage : kLargePage, size = (bytes + page - 1) / page * page;
        std::free(memory.at);
        memory.at = std::aligned_alloc(page, size);
        memory.size = memory.at ? size : 0;
#if defined(__linux__)
        // Advice only: where the system has none to give, small pages remain.
        if (memory.at && page == kLargePage) madvise(memory.at, size, MADV_HUGEPAGE);
#endif
    }
    return memory.at;
}

}  // namespace aerogel
