#if defined(__x86_64__)
#if defined(__clang__)
#define DRIFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define DRIFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#include "kernels_isa.inc"

const drift::InstructionSet drift::kAvx512{"avx512", select_update, select_sum, select_subtract, words};
#endif
