#pragma once

#include "cuda_runtime.h"
#include "kernels/paged_decode_case.h"

namespace rotunda::kernels::testing {

/// Runs a kernel twice over one workspace (what a launch leaves behind must not disturb the next) and gives the second launch's outputs.
template <typename Kernel>
std::vector<float> run_emulated(PagedCase& test, int blocks) {
  const PagedDecode p = test.params({blocks, Kernel::kThreads / 32});
  const AlignedBytes shared(static_cast<size_t>(Kernel::kSharedBytes), 0xcd);
  for (int launch = 0; launch < 2; ++launch) {
    std::fill(test.out.begin(), test.out.end(), std::numeric_limits<float>::quiet_NaN());
    emulation::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(Kernel::kThreads), [&] { Kernel::run(p, shared.get()); });
  }
  return test.out;
}

}  // namespace rotunda::kernels::testing
