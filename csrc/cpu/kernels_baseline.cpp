#define DRIFT_TARGET
#define DRIFT_SET kBaseline
#define DRIFT_NAME "baseline"
#include "kernels_isa.inc"
