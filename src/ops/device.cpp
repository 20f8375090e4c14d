#include "ops/device.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "base/check.h"
#include "base/env.h"
#ifdef ROTUNDA_CUDA
#include "ops/device_cuda.h"
#endif

namespace rotunda::ops {

at::Device open_device(const std::string& where, const std::string& text) {
  if (text == "cpu") return at::kCPU;
  int index = 0;
  bool known = text == "cuda";
  if (text.starts_with("cuda:")) {
    const auto [end, error] = std::from_chars(text.data() + 5, text.data() + text.size(), index);
    known = error == std::errc() && end == text.data() + text.size() && index >= 0 && index <= std::numeric_limits<int8_t>::max();
  }
  ROTUNDA_CHECK(known, where, ": got '", text, "', expected cpu, cuda or cuda:N");
#ifdef ROTUNDA_CUDA
  open_cuda_device(concat(where, " ", text), index);
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
#else
  throw_user_error(concat(where, " ", text, ": this program is built without CUDA (`make build-cuda` builds it with)"));
#endif
}

int64_t available_bytes(at::Device device, int64_t budget_bytes) {
#ifdef ROTUNDA_CUDA
  if (device.is_cuda()) {
    const CudaMemory memory = cuda_memory();
    const int64_t free_bytes = memory.free_bytes;
    return budget_bytes == 0 ? free_bytes : std::min(free_bytes, budget_bytes - (memory.total_bytes - free_bytes));
  }
#endif
  ROTUNDA_ASSERT(device.is_cpu() && budget_bytes == 0);
  return env::available_memory_bytes();
}

int64_t total_bytes(at::Device device) {
#ifdef ROTUNDA_CUDA
  if (device.is_cuda()) return cuda_memory().total_bytes;
#endif
  ROTUNDA_ASSERT(device.is_cpu());
  return env::available_memory_bytes();
}

}  // namespace rotunda::ops
