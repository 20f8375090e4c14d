#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace rotunda::kernels {

/// Working memory of one thread that only grows: after a few calls of a shape no kernel allocates. 64-byte aligned.
class Scratch {
 public:
  /// @return `n_floats` floats, uninitialized; the next call may move and overwrite them
  float* floats(size_t n_floats) {
    if (n_floats > size_) {
      data_.reset();  // first, so that old and new never live together
      data_.reset(static_cast<float*>(::operator new(n_floats * sizeof(float), std::align_val_t{kAlign})));
      size_ = n_floats;
    }
    return data_.get();
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

/// Rounds a count of floats up to whole cache lines.
inline constexpr size_t whole_lines(size_t n_floats) { return (n_floats + 15) / 16 * 16; }

}  // namespace rotunda::kernels
