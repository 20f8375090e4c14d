// libtorch_cpu and libsentencepiece both bring protobuf; one program with both must load and tokenize right. Built twice,
// with the two linked in either order.

#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "io/tokenizer/tokenizer.h"

namespace rotunda::io {
namespace {

TEST(TorchSentencePieceTest, BothWork) {
  EXPECT_EQ(at::ones({2, 3}).sum().item<float>(), 6.0f);
  const auto tokenizer = load_tokenizer(std::filesystem::path(ROTUNDA_SOURCE_DIR) / "tests/golden/tokenizers/sp_tiny");
  const std::string text = "The quick brown fox \xF0\x9F\x98\x80 jumps.";
  const auto ids = tokenizer->encode(text, true);
  EXPECT_EQ(ids.front(), 1);
  EXPECT_GT(ids.size(), 8u);
  EXPECT_EQ(tokenizer->decode(ids, true), text);
  EXPECT_EQ(at::ones({4}).mul(2).sum().item<float>(), 8.0f);
}

}  // namespace
}  // namespace rotunda::io
