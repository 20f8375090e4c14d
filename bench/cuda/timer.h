#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAEvent.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "base/check.h"

namespace rotunda::bench {

inline void check(cudaError_t error, const char* what) { ROTUNDA_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error)); }

inline at::TensorOptions on_gpu(at::ScalarType type) { return at::TensorOptions().device(at::kCUDA).dtype(type); }

struct Time {
  double median_ms, low_ms, high_ms;  // low, high: a tenth of the repetitions lies beyond
};

/// Times of what is launched on the current stream, by events, L2 flushed before each.
class Timer {
 public:
  explicit Timer(int repetitions) : repetitions_(repetitions), flush_(at::zeros({int64_t{64} << 20}, on_gpu(at::kFloat))) {}

  Time operator()(const std::function<void()>& run) {
    for (int i = 0; i < 3; ++i) run();
    std::vector<double> times;
    for (int i = 0; i < repetitions_; ++i) {
      // Read, not written: what is written would lie in L2 and go to memory while the kernel in question reads.
      at::sum_out(sum_, flush_, at::IntArrayRef{});
      at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
      begin.record();
      run();
      end.record();
      end.synchronize();
      times.push_back(begin.elapsed_time(end));
    }
    std::sort(times.begin(), times.end());
    return {times[times.size() / 2], times[times.size() / 10], times[times.size() - 1 - times.size() / 10]};
  }

 private:
  int repetitions_;
  at::Tensor flush_;
  at::Tensor sum_ = at::empty({}, on_gpu(at::kFloat));
};

}  // namespace rotunda::bench
