#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/safetensors.h"
#include "model/causal_lm.h"
#include "reference_cache.h"

namespace rotunda::test {

inline std::filesystem::path golden_dir() { return std::filesystem::path(ROTUNDA_SOURCE_DIR) / "tests/golden"; }
inline std::filesystem::path shipped_model_dir() {
  return std::filesystem::path(ROTUNDA_SOURCE_DIR) / "models/tiny-gqa";
}

/// Models as small as these gain nothing from threads, and lose much where other tests run beside them.
class OneThread : public testing::Environment {
 public:
  void SetUp() override { at::set_num_threads(1); }
};
inline testing::Environment* const kOneThread = testing::AddGlobalTestEnvironment(new OneThread);

/// The tiny checkpoints of make_model_golden.py.
inline std::vector<std::string> golden_cases() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(golden_dir() / "models"))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

/// An empty folder of this test's own, removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
    std::string name = std::string("rotunda_") + test->test_suite_name() + "_" + test->name();
    std::replace(name.begin(), name.end(), '/', '_');
    path_ = std::filesystem::path(testing::TempDir()) / name;
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// The message of the user error that `action` throws; a test failure where it throws none.
inline std::string user_error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kUser) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// Largest error of a row, relative to the row's length. @param got, want [N, D]
inline double relative_error(const at::Tensor& got, const at::Tensor& want) {
  EXPECT_EQ(got.sizes(), want.sizes());
  const at::Tensor g = got.to(at::kDouble), w = want.to(at::kDouble);
  return (g - w).norm(2, 1).div(w.norm(2, 1)).max().item<double>();
}

/// One step of one sequence. @return [T, vocab_size]
inline at::Tensor run_step(const model::CausalLm& lm, kv::KvCache& cache, kv::SeqId seq, const at::Tensor& tokens,
                           int64_t rope_len = 0) {
  cache.begin_step({{.seq = seq, .n_tokens = tokens.size(0), .is_prompt = true, .rope_len = rope_len}});
  const at::Tensor hidden = lm.forward(tokens, cache);
  cache.end_step();
  return lm.logits(hidden);
}

}  // namespace rotunda::test
