#if defined(__x86_64__)
#define DRIFT_TARGET __attribute__((target("avx2")))
#define DRIFT_SET kAvx2
#define DRIFT_NAME "avx2"
#define DRIFT_UPDATE_CHUNK update_chunk
#define DRIFT_SUM_CHUNK sum_chunk
#include "kernels_isa.inc"
#endif
