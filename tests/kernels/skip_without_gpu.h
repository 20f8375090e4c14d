#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

/// In a test's SetUp: skips, saying why, where there is no GPU to run on.
#define ROTUNDA_SKIP_WITHOUT_GPU()                                                                \
  do {                                                                                            \
    int n_devices = 0;                                                                            \
    const cudaError_t device_error = cudaGetDeviceCount(&n_devices);                              \
    if (device_error != cudaSuccess) GTEST_SKIP() << "no GPU: " << cudaGetErrorString(device_error); \
    if (n_devices == 0) GTEST_SKIP() << "no GPU";                                                 \
  } while (false)
