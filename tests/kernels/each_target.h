#pragma once

// Runs a test body once for every instruction set that the kernels are compiled for and this machine has.

// The order matters: the list of targets must be cut before Highway sees it. A test of kernels with a list of their own includes that first.
#ifndef HWY_DISABLED_TARGETS
#include "kernels/simd_targets.h"
#endif
#include <gtest/gtest.h>

#include "hwy/targets.h"

namespace rotunda::testing {

template <typename Body>
void for_each_target(const Body& body) {
  const auto targets = hwy::SupportedAndGeneratedTargets();
  ASSERT_FALSE(targets.empty());
  for (const int64_t target : targets) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    body();
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
}

}  // namespace rotunda::testing
