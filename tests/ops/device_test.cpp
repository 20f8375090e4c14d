#include "ops/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace rotunda::ops {
namespace {

using ::testing::HasSubstr;

TEST(DeviceTest, NamesOfDevices) {
  EXPECT_EQ(parse_device("cpu"), at::Device(at::kCPU));
  EXPECT_EQ(parse_device("cuda"), at::Device(at::kCUDA, 0));
  EXPECT_EQ(parse_device("cuda:3"), at::Device(at::kCUDA, 3));
  for (const char* name : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:1000", "cuda:99999999999", "CUDA", "auto", "cpu:0"}) {
    SCOPED_TRACE(name);
    try {
      parse_device(name);
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kUser);
      EXPECT_THAT(error.what(), HasSubstr("expected cpu, cuda or cuda:N"));
    }
  }
}

TEST(DeviceTest, TheProcessorIsThere) {
  EXPECT_NO_THROW(require_device(at::kCPU));
  EXPECT_EQ(device_name(at::kCPU), "cpu");
  EXPECT_GT(available_memory_bytes(at::kCPU), 0);
}

// The messages are LibTorch 2.11's own.
TEST(DeviceTest, ErrorsOfLibTorchInOneLine) {
  const c10::SourceLocation here{"f", "file.cpp", 1};
  const Error host = as_error(c10::Error(here,
                                         "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                                         "you tried to allocate 8000000000 bytes. Error code 12"));
  EXPECT_EQ(host.fault(), Fault::kWorld);
  EXPECT_STREQ(host.what(), "out of memory: cannot allocate 8000000000 bytes");
  const Error gpu = as_error(c10::OutOfMemoryError(
      here,
      "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free. "
      "Process 7 has 78.00 GiB memory in use."));
  EXPECT_EQ(gpu.fault(), Fault::kWorld);
  EXPECT_STREQ(gpu.what(),
               "GPU out of memory: tried to allocate 2.00 GiB; GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free");
  const Error kernel = as_error(c10::AcceleratorError(here, 700, "CUDA error: an illegal memory access was encountered\nSearch for it."));
  EXPECT_EQ(kernel.fault(), Fault::kWorld);
  EXPECT_STREQ(kernel.what(), "CUDA error: an illegal memory access was encountered");
  const Error other = as_error(c10::Error(here, "The size of tensor a must match\nmore"));
  EXPECT_EQ(other.fault(), Fault::kBug);
  EXPECT_STREQ(other.what(), "bug: The size of tensor a must match");
}

}  // namespace
}  // namespace rotunda::ops
