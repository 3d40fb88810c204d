// See scratch.h.
#include "scratch.h"

#include <cstdlib>

namespace aerogel {
namespace {

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
        const size_t size = (bytes + 4095) / 4096 * 4096;
        std::free(memory.at);
        memory.at = std::aligned_alloc(4096, size);
        memory.size = memory.at ? size : 0;
    }
    return memory.at;
}

}  // namespace aerogel
