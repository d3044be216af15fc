#if defined(__x86_64__)
#define DRIFT_TARGET __attribute__((target("avx2")))
#include "kernels_isa.inc"

const drift::InstructionSet drift::kAvx2{"avx2", select_update, select_sum, select_subtract, words};
#endif
