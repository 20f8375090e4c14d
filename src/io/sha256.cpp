#include "io/sha256.h"

#include <openssl/evp.h>

#include "base/check.h"

namespace rotunda::io {

namespace {

EVP_MD_CTX* evp(const std::unique_ptr<void, void (*)(void*)>& context) {
  return static_cast<EVP_MD_CTX*>(context.get());
}

}  // namespace

Sha256::Sha256()
    : context_(EVP_MD_CTX_new(), [](void* context) { EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(context)); }) {
  ROTUNDA_CHECK_WORLD(context_ && EVP_DigestInit_ex(evp(context_), EVP_sha256(), nullptr) == 1,
                      "sha256: libcrypto does not provide SHA-256");
}

void Sha256::update(const void* data, size_t size_bytes) {
  ROTUNDA_ASSERT(EVP_DigestUpdate(evp(context_), data, size_bytes) == 1);
}

Sha256Digest Sha256::finish() {
  Sha256Digest digest;
  ROTUNDA_ASSERT(EVP_DigestFinal_ex(evp(context_), digest.data(), nullptr) == 1);
  return digest;
}

std::string to_hex(const Sha256Digest& digest) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * digest.size());
  for (const uint8_t byte : digest) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace rotunda::io
