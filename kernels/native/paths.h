// The instruction-set paths and what each runs. A path that was not compiled in has null functions.
#pragma once
#include "layout.h"
#include "own.h"
#include "step_structs.h"

namespace aerogel {

enum Path : int32_t { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAvx512Bf16 = 4, kAmx = 5, kNeon = 6, kPaths = 7 };

using Run = Status (*)(const Weight&, const Call&);

struct LookupRuns {
    Status (*real)(const FilledLookup&, const Call&);
    Status (*fixed)(const FilledLookup&, const Call&);
};

struct Step {
    Status (*attend)(const Attend&);
    Status (*prompt)(const Prompt&);
    Status (*norm)(const Norm&);
    Status (*gate)(const Gate&);
    Status (*hadamard)(const Hadamard&);
    Status (*beside)(const Beside&);
    Status (*prepare)(const Beside&, int threads, Adding& to);  // the same for a matmul whose own threads add
    uint64_t (*read)(const void* memory, int64_t bytes);  // reads multiples of 256 bytes, returns something of all of them
    LookupRuns lookup;
};

struct PathEntry {
    Run exact, int8;
    bool able;  // this machine has the instructions
    Step step;
    Status (*own)(const OwnTables&, const Call&);
};

const PathEntry& path_entry(int32_t path);
// The fastest path this machine can run; the portable one always can.
int32_t best_path(int32_t numerics);
// Only paths whose bit is set count for that from here on, in the whole process: how tests run as on a lesser machine.
void choose_among(uint32_t paths);

}  // namespace aerogel
