#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace rotunda::io {

using Sha256Digest = std::array<uint8_t, 32>;

/// SHA-256 (FIPS 180-4) of bytes that come in pieces.
class Sha256 {
 public:
  Sha256();
  void update(const void* data, size_t size_bytes);
  void update(const std::string& text) { update(text.data(), text.size()); }
  /// The digest of all bytes so far; the object is spent after it.
  Sha256Digest finish();

 private:
  std::unique_ptr<void, void (*)(void*)> context_;
};

/// 64 lower-case hexadecimal digits.
std::string to_hex(const Sha256Digest& digest);

}  // namespace rotunda::io
