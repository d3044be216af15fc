#if defined(__x86_64__)
#if defined(__clang__)
#define DRIFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define DRIFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both in the compiler's own immintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "sums_avx512.h"
#include "update_avx512.h"

#define DRIFT_SET kAvx512
#define DRIFT_NAME "avx512"
#define DRIFT_UPDATE_CHUNK avx512::update_chunk
#define DRIFT_SUM_CHUNK avx512::sum_chunk
#include "kernels_isa.inc"
#endif
