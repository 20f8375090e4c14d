#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace rotunda::kv {

/// Where pages lie: the host's memory or a GPU's. Addresses never move.
class PageMemory {
 public:
  virtual ~PageMemory() = default;

  /// Whose memory it is, for messages: "machine", "GPU".
  virtual const char* owner() const = 0;
  /// Bytes that grow() may still give.
  virtual int64_t available_bytes() const = 0;
  /// So many bytes more, zeros, 64-byte aligned. @return null where they are not to be had after all
  virtual std::byte* grow(int64_t bytes) = 0;
  virtual void copy(std::byte* to, const std::byte* from, int64_t bytes) = 0;
  virtual void read(void* to_host, const std::byte* from, int64_t bytes) const = 0;
  virtual void write(std::byte* to, const void* from_host, int64_t bytes) = 0;
};

std::unique_ptr<PageMemory> host_page_memory();

}  // namespace rotunda::kv
