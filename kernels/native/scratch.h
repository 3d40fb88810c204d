// Working memory that a calling thread keeps between calls: allocating megabytes for every matmul would cost page faults.
#pragma once
#include <cstddef>

namespace aerogel {

enum ScratchUse { kCallScratch = 0, kWorkerScratch = 1, kStepScratch = 2, kBesideScratch = 3, kQuietScratch = 4, kFilledScratch = 5 };
constexpr int kScratchUses = 6;

// At least `bytes` bytes at a multiple of 4096, valid until the same thread's next call for the same use; null without memory.
void* scratch(ScratchUse use, size_t bytes);

}  // namespace aerogel
