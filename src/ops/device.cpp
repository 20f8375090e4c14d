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

namespace {

// The digits that follow `words` in a message; empty where the words are not in it.
std::string number_after(const std::string& message, const std::string& words) {
  const size_t place = message.find(words);
  if (place == std::string::npos) return {};
  const size_t begin = place + words.size();
  return message.substr(begin, message.find_first_not_of("0123456789", begin) - begin);
}

// The sentence of a message that begins with `words`, without its full stop; empty where there is none.
std::string sentence_from(const std::string& message, const std::string& words) {
  const size_t begin = message.find(words);
  if (begin == std::string::npos) return {};
  return message.substr(begin, std::min(message.find(". ", begin), message.find('\n', begin)) - begin);
}

}  // namespace

at::Device parse_device(const std::string& name) {
  if (name == "cpu") return at::kCPU;
  if (name == "cuda") return {at::kCUDA, 0};
  constexpr size_t kPrefix = 5;  // "cuda:"
  int index = -1;
  if (name.starts_with("cuda:")) {
    const auto [end, error] = std::from_chars(name.data() + kPrefix, name.data() + name.size(), index);
    if (error != std::errc() || end != name.data() + name.size()) index = -1;
  }
  ROTUNDA_CHECK(index >= 0 && index <= std::numeric_limits<at::DeviceIndex>::max(), "--device: got '", name,
                "', expected cpu, cuda or cuda:N");
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
}

#ifdef ROTUNDA_CUDA
void require_device(at::Device device) {
  if (device.is_cuda()) cuda::require_device(device);
}

std::string device_name(at::Device device) { return device.is_cuda() ? cuda::device_name(device) : "cpu"; }

int64_t total_memory_bytes(at::Device device) {
  ROTUNDA_ASSERT(device.is_cuda());
  return cuda::total_memory_bytes(device);
}

int64_t available_memory_bytes(at::Device device, int64_t budget_bytes) {
  if (!device.is_cuda()) return env::available_memory_bytes();
  const int64_t free_bytes = cuda::free_memory_bytes(device);
  if (budget_bytes == 0) return free_bytes;
  return std::clamp<int64_t>(budget_bytes - cuda::allocated_bytes(device), 0, free_bytes);
}

void synchronize(at::Device device) {
  if (device.is_cuda()) cuda::synchronize(device);
}
#else
void require_device(at::Device device) {
  ROTUNDA_CHECK(device.is_cpu(), "--device ", device, ": this build has no CUDA half; build one with `make build-cuda`");
}

std::string device_name(at::Device) { return "cpu"; }

int64_t total_memory_bytes(at::Device device) {
  ROTUNDA_ASSERT(false, "memory of ", device, " in a build without CUDA");
}

int64_t available_memory_bytes(at::Device device, int64_t) {
  ROTUNDA_ASSERT(device.is_cpu());
  return env::available_memory_bytes();
}

void synchronize(at::Device) {}
#endif

// LibTorch says only in words that memory ran out: "... you tried to allocate N bytes ..." of the machine's, "CUDA out of memory. Tried to
// allocate 2.00 GiB. GPU 0 has a total capacity of ..." of a GPU's.
Error as_error(const c10::Error& error) {
  const std::string message = error.what_without_backtrace();
  if (const std::string bytes = number_after(message, "you tried to allocate "); !bytes.empty())
    return {Fault::kWorld, "out of memory: cannot allocate " + bytes + " bytes"};
  if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) {
    const std::string wanted = sentence_from(message, "Tried to allocate ");
    const std::string capacity = sentence_from(message, "GPU ");
    return {Fault::kWorld,
            concat("GPU out of memory", wanted.empty() ? "" : ": t" + wanted.substr(1), capacity.empty() ? "" : "; " + capacity)};
  }
  if (const std::string reason = sentence_from(message, "CUDA error: "); !reason.empty()) return {Fault::kWorld, reason};
  return {Fault::kBug, "bug: " + message.substr(0, message.find('\n'))};
}

}  // namespace rotunda::ops
