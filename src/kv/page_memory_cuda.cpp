#include "kv/page_memory_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "ops/device_cuda.h"

namespace rotunda::kv {

namespace {

// The driver's functions, asked for at run time: a program that links libcuda does not start on a machine without a driver.
template <typename Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  ROTUNDA_CHECK_WORLD(error == cudaSuccess && found == cudaDriverEntryPointSuccess, "CUDA driver: has no ", name, ", expected CUDA 12 or newer");
  return reinterpret_cast<Function>(function);
}

struct Driver {
  decltype(&cuMemAddressReserve) reserve = driver_function<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(&cuMemAddressFree) free_addresses = driver_function<decltype(&cuMemAddressFree)>("cuMemAddressFree");
  decltype(&cuMemCreate) create = driver_function<decltype(&cuMemCreate)>("cuMemCreate");
  decltype(&cuMemRelease) release = driver_function<decltype(&cuMemRelease)>("cuMemRelease");
  decltype(&cuMemMap) map = driver_function<decltype(&cuMemMap)>("cuMemMap");
  decltype(&cuMemUnmap) unmap = driver_function<decltype(&cuMemUnmap)>("cuMemUnmap");
  decltype(&cuMemSetAccess) set_access = driver_function<decltype(&cuMemSetAccess)>("cuMemSetAccess");
  decltype(&cuMemGetAllocationGranularity) granularity =
      driver_function<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
};

void check(cudaError_t error, const char* what) {
  ROTUNDA_CHECK_WORLD(error == cudaSuccess, "CUDA: ", what, " failed: ", cudaGetErrorString(error));
}

class MappedMemory final : public PageMemoryCuda {
 public:
  explicit MappedMemory(int64_t budget_bytes) {
    // The driver's functions want the context that the runtime makes at its first use.
    check(cudaFree(nullptr), "initialization");
    const int64_t total = ops::cuda::total_memory_bytes(device_);
    budget_ = budget_bytes > 0 ? std::min(budget_bytes, total) : total;
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_.index()}};
    access_ = {properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check_driver(driver_.granularity(&piece_bytes_, &properties_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "granularity");
    reserved_ = (static_cast<size_t>(budget_) + piece_bytes_ - 1) / piece_bytes_ * piece_bytes_;
    check_driver(driver_.reserve(&base_, reserved_, 0, 0, 0), "cuMemAddressReserve");
  }

  ~MappedMemory() override {
    // Steps may still be under way; errors have been told by those who waited for them.
    cudaDeviceSynchronize();
    if (mapped_ > 0) driver_.unmap(base_, mapped_);
    for (const CUmemGenericAllocationHandle handle : pieces_) driver_.release(handle);
    driver_.free_addresses(base_, reserved_);
  }

  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  std::byte* base() const override { return reinterpret_cast<std::byte*>(base_); }
  const char* owner() const override { return "GPU"; }

  int64_t available_bytes() const override {
    // What is mapped and not given out yet counts as taken on the GPU.
    const int64_t on_gpu = ops::cuda::free_memory_bytes(device_) + static_cast<int64_t>(mapped_) - used_;
    return std::min(on_gpu, budget_ - ops::cuda::allocated_bytes(device_) - used_);
  }

  std::byte* grow(int64_t bytes) override {
    const size_t wanted = (static_cast<size_t>(used_ + bytes) + piece_bytes_ - 1) / piece_bytes_ * piece_bytes_;
    if (wanted > reserved_) return nullptr;
    if (wanted > mapped_) {
      const size_t more = wanted - mapped_;
      CUmemGenericAllocationHandle handle = 0;
      CUresult result = driver_.create(&handle, more, &properties_, 0);
      if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        c10::cuda::CUDACachingAllocator::emptyCache();  // what LibTorch holds without using it
        result = driver_.create(&handle, more, &properties_, 0);
      }
      if (result == CUDA_ERROR_OUT_OF_MEMORY) return nullptr;
      check_driver(result, "cuMemCreate");
      pieces_.push_back(handle);
      check_driver(driver_.map(base_ + mapped_, more, 0, handle, 0), "cuMemMap");
      check_driver(driver_.set_access(base_ + mapped_, more, &access_, 1), "cuMemSetAccess");
      mapped_ = wanted;
    }
    std::byte* const at = base() + used_;
    check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), at::cuda::getCurrentCUDAStream()), "cudaMemset");
    used_ += bytes;
    return at;
  }

  void copy(std::byte* to, const std::byte* from, int64_t bytes) override {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, at::cuda::getCurrentCUDAStream()), "copying a page");
  }
  void read(void* to_host, const std::byte* from, int64_t bytes) const override {
    const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
    check(cudaMemcpyAsync(to_host, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream), "reading a page");
    check(cudaStreamSynchronize(stream), "reading a page");
  }
  void write(std::byte* to, const void* from_host, int64_t bytes) override {
    const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
    check(cudaMemcpyAsync(to, from_host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream), "writing a page");
    check(cudaStreamSynchronize(stream), "writing a page");
  }

 private:
  static void check_driver(CUresult result, const char* what) {
    ROTUNDA_CHECK_WORLD(result == CUDA_SUCCESS, "CUDA driver: ", what, " failed with error ", static_cast<int>(result));
  }

  const at::Device device_{at::kCUDA, c10::cuda::current_device()};
  Driver driver_;
  CUmemAllocationProp properties_{};
  CUmemAccessDesc access_{};
  size_t piece_bytes_ = 0;
  size_t reserved_ = 0;
  size_t mapped_ = 0;
  int64_t budget_ = 0;
  int64_t used_ = 0;
  CUdeviceptr base_ = 0;
  std::vector<CUmemGenericAllocationHandle> pieces_;
};

}  // namespace

std::unique_ptr<PageMemoryCuda> cuda_page_memory(int64_t budget_bytes) { return std::make_unique<MappedMemory>(budget_bytes); }

}  // namespace rotunda::kv
