#define DRIFT_TARGET
#define DRIFT_SET kBaseline
#define DRIFT_NAME "baseline"
#define DRIFT_UPDATE_CHUNK update_chunk
#define DRIFT_SUM_CHUNK sum_chunk
#include "kernels_isa.inc"
