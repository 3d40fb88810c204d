// See rows.cpp.
#pragma once
#include "step_structs.h"

namespace aerogel {

// Writes the rows `wanted.ids` of a weight that has been checked. kNoSuchRow, and nothing written, for an id outside it.
Status decode_rows(const Weight& weight, const Rows& wanted);

}  // namespace aerogel
