// The cuda backend's kernels on the host: every block of a grid, and every thread of a block, one after another.
#include "../csrc/cuda/bias.h"
#include "../csrc/cuda/coefficients.h"
#include "../csrc/cuda/plan.h"
#include "../csrc/cuda/sums.h"
#include "../csrc/cuda/update.h"
#include "../csrc/dtypes.h"
#include "../csrc/layout.h"

namespace drift {
namespace {

using UpdateBlock = void (*)(const Launch&, int64_t block);

using BiasBlock = void (*)(const Launch&, int64_t block);
using SumBlock = void (*)(const Launch&, int64_t block, Sums*);

template <class T>
using Unwrap = typename T::type;

DTypes parse(const char* const* names) {
  const auto name = [&](int i) { return names[i] == nullptr ? DTypeName() : DTypeName(names[i]); };
  return parse_dtypes({name(0), name(1), name(2), name(3)});
}

}  // namespace
}  // namespace drift

using namespace drift;

// The same as the modules' LAYOUT, as a Python expression.
extern "C" const char* layout() {
  static std::string text;
  text = "{";
  for_each_part(
      [](const std::string& key, const auto& names) {
        text += "'" + key + "': (";
        for (const std::string name : names) text += "'" + name + "',";
        text += "),";
      },
      [](const std::string& key, int64_t value) { text += "'" + key + "': " + std::to_string(value) + ","; });
  text += "}";
  return text.c_str();
}

// The number of launches on a device.
extern "C" {
int64_t launched = 0;
}

// Runs each launch from chunk `begin` on, so that the end of a huge tensor can be run alone.
extern "C" void update(const Plan* plan, const char* const* dtypes, const Coefficients* coefficients, int64_t begin) {
  const UpdateBlock body = select_update(parse(dtypes), [](auto p, auto g, auto s, auto d) -> UpdateBlock {
    return update_block<Unwrap<decltype(p)>, Unwrap<decltype(g)>, Unwrap<decltype(s)>, Unwrap<decltype(d)>>;
  });
  for_each_launch(*plan, coefficients, {}, [&](const Launch& launch, int64_t chunks) {
    ++launched;
    for (int64_t block = begin; block < chunks; ++block) body(launch, block);
  });
}

extern "C" void bias(const Plan* plan, const char* const* dtypes, const Coefficients* coefficients) {
  const BiasBlock body = select_bias(parse(dtypes), [](auto grad, auto delta) -> BiasBlock {
    return bias_block<Unwrap<decltype(grad)>, Unwrap<decltype(delta)>>;
  });
  for_each_launch(*plan, coefficients, {}, [&](const Launch& launch, int64_t chunks) {
    ++launched;
    for (int64_t block = 0; block < chunks; ++block) body(launch, block);
  });
}

extern "C" void grad_stats(const Plan* plan, const char* const* dtypes, Sums* partials, uint32_t* arrived, Sums* out) {
  const SumBlock body = select_sum(parse(dtypes), [](auto grad, auto delta) -> SumBlock {
    return sum_block<Unwrap<decltype(grad)>, Unwrap<decltype(delta)>>;
  });
  Sums shared[kThreads / kWarp];
  for_each_launch(*plan, nullptr, {partials, out, arrived}, [&](const Launch& launch, int64_t chunks) {
    ++launched;
    for (int64_t block = 0; block < chunks; ++block) body(launch, block, shared);
  });
}

extern "C" void fill_coefficients(const Filling* filling) {
  double shared[kFillThreads];
  ++launched;
  fill_block(*filling, reinterpret_cast<const Group*>(filling + 1), shared);
}
