// The kernels of one instruction set. Each kernels_<isa>.cpp includes kernels_isa.inc.
#pragma once

#include "../dtypes.h"
#include "chunk.h"
#include "subtract.h"

namespace drift {

using UpdateKernel = void (*)(const Row&, uint64_t grad, const Coefficients&, int64_t begin, int64_t end);
using BiasKernel = UpdateKernel;
using SumKernel = Sums (*)(const Row&, uint64_t grad, int64_t begin, int64_t end);

using SubtractKernel = Products (*)(uint64_t expert, uint64_t base, uint64_t origin, uint64_t delta, int64_t count);
using WordsKernel = void (*)(const uint64_t* words, int64_t rows, int64_t width, uint64_t* row_sums, uint64_t* columns);

// The kernels for a combination of dtypes; null if it is not supported.
struct InstructionSet {
  const char* name;
  UpdateKernel (*update)(DTypes);
  SumKernel (*sum)(DTypes);
  BiasKernel (*bias)(DTypes);
  SubtractKernel (*subtract)(DType weight, DType delta);
  WordsKernel words;
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace drift
