// See rows.cpp.
#pragma once
#include "step_structs.h"

namespace aerogel {

// Writes the rows `wanted.ids` of a weight that has been checked. kNoSuchRow, and nothing written, for an id outside it.
Status decode_rows(const Weight& weight, const Rows& wanted);

// y[:, index] += part, every sum rounded to y's type. The indices have been checked.
void add_row_sums(const RowSums& sums);

}  // namespace aerogel
