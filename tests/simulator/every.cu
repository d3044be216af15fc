// The project's kernels, all of them.
#include "../../csrc/cuda/kernels.cu"
