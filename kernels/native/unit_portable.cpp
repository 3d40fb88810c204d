// Portable C++: what every machine runs. The compiler vectorises four lanes at a time where it can; AArch64 looks bytes up.
#define UNIT portable
#include "attend.h"
#include "beside.h"
#include "gemm.h"
#include "hadamard.h"
#include "lookup_run.h"
#include "own_rows.h"
#include "paths.h"
#include "prompt.h"

namespace aerogel {

Status exact_portable(const Weight& weight, const Call& call) { return portable::run<portable::Exact>(weight, call); }
Status int8_portable(const Weight& weight, const Call& call) { return portable::run<portable::Int8>(weight, call); }
Status own_portable(const OwnTables& weight, const Call& call) { return portable::own_tables(weight, call); }
extern const Step step_portable;
const Step step_portable = {
    portable::attend, portable::attend_prompt, portable::norm, portable::gate, portable::hadamard, portable::add_beside, portable::prepare, portable::read_all,
    {portable::lookup<portable::Real>, portable::lookup<portable::Fixed>},
};

}  // namespace aerogel
