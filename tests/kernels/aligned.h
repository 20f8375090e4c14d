#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

namespace rotunda::testing {

/// Bytes at a 64-byte boundary, of exactly the size asked for, so that AddressSanitizer sees one byte too many.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t size, int fill = 0) : size_(size), data_(static_cast<std::byte*>(::operator new(size, std::align_val_t{64}))) {
    std::memset(data_.get(), fill, size);
  }
  std::byte* get() const { return data_.get(); }
  float* floats() const { return reinterpret_cast<float*>(data_.get()); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  size_t size_ = 0;
  std::unique_ptr<std::byte, Free> data_;
};

}  // namespace rotunda::testing
