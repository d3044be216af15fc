#define DRIFT_TARGET
#include "kernels_isa.inc"

const drift::InstructionSet drift::kBaseline{"baseline", select_update, select_sum, select_subtract, words};
