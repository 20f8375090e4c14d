#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/paged_decode_case.h"
#include "kernels/skip_without_gpu.h"

namespace rotunda::kernels::testing {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

/// A copy of some bytes on the GPU.
class OnGpu {
 public:
  OnGpu(const void* from, size_t bytes) {
    void* at = nullptr;
    check_cuda(cudaMalloc(&at, bytes == 0 ? 16 : bytes), "cudaMalloc");
    at_.reset(at);
    if (bytes > 0) check_cuda(cudaMemcpy(at, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  template <typename T>
  explicit OnGpu(const std::vector<T>& from) : OnGpu(from.data(), from.size() * sizeof(T)) {}
  template <typename T>
  T* as() const {
    return static_cast<T*>(at_.get());
  }

 private:
  struct Free {
    void operator()(void* at) const { cudaFree(at); }
  };
  std::unique_ptr<void, Free> at_;
};

/// Runs a launcher twice over one workspace and gives the second launch's outputs. @param launch (PagedDecode) -> cudaError_t
template <typename Launch>
std::vector<float> run_on_gpu(PagedCase& test, const PagedDecodeGrid& grid, const Launch& launch) {
  PagedDecode p = test.params(grid);
  const OnGpu q_pages(test.q_pages), q_exact(test.q_exact), pool(test.pool.get(), test.pool.size()), block_table(test.block_table);
  const OnGpu stored_len(test.stored_len), first_token(test.first_token), slot(test.slot), page_masks(test.page_masks),
      exact(test.exact.get(), test.exact.size());
  const OnGpu exact_masks(test.exact_masks), units_before(test.units_before), workspace(test.workspace.get(), test.workspace.size());
  p.q_pages = q_pages.as<float>();
  p.q_exact = q_exact.as<float>();
  p.pool = pool.as<std::byte>();
  p.block_table = block_table.as<int32_t>();
  p.stored_len = stored_len.as<int32_t>();
  if (p.first_token != nullptr) p.first_token = first_token.as<int32_t>();
  if (p.slot != nullptr) p.slot = slot.as<int32_t>();
  if (p.page_masks != nullptr) p.page_masks = page_masks.as<uint16_t>();
  p.exact = exact.as<std::byte>();
  p.exact_masks = exact_masks.as<uint16_t>();
  p.units_before = units_before.as<int32_t>();
  p.workspace = workspace.as<std::byte>();
  std::vector<float> out(test.out.size());
  for (int i = 0; i < 2; ++i) {
    const OnGpu poisoned(test.out);
    p.out = poisoned.as<float>();
    check_cuda(launch(p), "launch");
    check_cuda(cudaMemcpy(out.data(), p.out, out.size() * sizeof(float), cudaMemcpyDeviceToHost), "kernel");
  }
  return out;
}

}  // namespace rotunda::kernels::testing
