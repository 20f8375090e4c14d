#include "kv/page_memory.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/env.h"

namespace rotunda::kv {

namespace {

constexpr size_t kAlignment = 64;

class HostPageMemory final : public PageMemory {
 public:
  const char* owner() const override { return "machine"; }
  int64_t available_bytes() const override { return env::available_memory_bytes(); }

  std::byte* grow(int64_t bytes) override {
    const size_t rounded = (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
    auto* slab = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (slab == nullptr) return nullptr;
    slabs_.emplace_back(slab);
    // Touched now rather than in the middle of a step.
    std::memset(slab, 0, rounded);
    return slab;
  }

  void copy(std::byte* to, const std::byte* from, int64_t bytes) override { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  void read(void* to_host, const std::byte* from, int64_t bytes) const override { std::memcpy(to_host, from, static_cast<size_t>(bytes)); }
  void write(std::byte* to, const void* from_host, int64_t bytes) override { std::memcpy(to, from_host, static_cast<size_t>(bytes)); }

 private:
  struct FreeDeleter {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  std::vector<std::unique_ptr<std::byte, FreeDeleter>> slabs_;
};

}  // namespace

std::unique_ptr<PageMemory> host_page_memory() { return std::make_unique<HostPageMemory>(); }

}  // namespace rotunda::kv
