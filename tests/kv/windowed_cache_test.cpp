// What WindowedCache does for a format, shown with pages that keep elements as they are: whatever differs from exact
// attention is the work of the cache, not of codes.

#include "kv/windowed_cache.h"

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "kv_harness.h"

namespace rotunda::kv {
namespace {

using testing::exact_attention;
using testing::nmse;
using testing::random_text;
using testing::small_model;
using testing::Text;

// Pages of -k in fp32, packed from keys after RoPE. The keys of the first `n_lost` tokens of a sequence are lost in
// packing, so attention is right only where these tokens are read from the exact parts.
class NegativePages final : public WindowedCache {
 public:
  NegativePages(const KvModel& model, const ExactOptions& exact, int64_t n_lost)
      : WindowedCache({"negative", {}, {}}, model, exact, layout_of(model).page_bytes(), 8 * model.kv_channels(), 0),
        layout_(layout_of(model)),
        group_(exact.pack_group),
        unit_(std::max(16, exact.pack_group)),
        n_lost_(n_lost) {}

  // Whether some pair of blocks was stored by two threads.
  bool pair_was_split() const { return pair_was_split_; }

 private:
  static kernels::PlainPageLayout layout_of(const KvModel& model) {
    return {kernels::ElementType::kFp32, model.n_kv_heads, model.head_dim, kBlocksPerPage};
  }

  void make_packable(int, const Chunk&, int64_t first, int64_t n_tokens, float* keys) const override {
    EXPECT_EQ(first / unit_, (first + n_tokens - 1) / unit_);
    for (int64_t i = 0; i < n_tokens; ++i) {
      for (int64_t c = 0; c < channels(); ++c) {
        float& x = keys[i * channels() + c];
        x = first + i < n_lost_ ? 0.0F : -x;
      }
    }
  }

  bool store(int, std::byte* page, int block, int first, int n_tokens, const float* key,
             const float* value) const override {
    EXPECT_LE(block * 16 % unit_ + first + n_tokens, unit_);
    if (group_ > 1) {
      EXPECT_EQ(n_tokens, group_);
    }
    {
      const std::lock_guard lock(mutex_);
      const auto pair = stored_by_.try_emplace({page, block / 2}, std::this_thread::get_id()).first;
      if (pair->second != std::this_thread::get_id()) pair_was_split_ = true;
    }
    return kernels::store_plain(layout_, key, value, channels(), block * 16 + first, n_tokens, page);
  }

  StoredTokens stored_tokens(int layer, const Chunk& chunk) const override {
    return {model().n_kv_heads, model().head_dim,
            [this, layer, &chunk](int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride) {
              for (int head = 0; head < model().n_kv_heads; ++head) {
                float* head_key = key + head * model().head_dim * stride;
                kernels::load_plain(layout_, layer_page(chunk, layer, block / kBlocksPerPage), head,
                                    static_cast<int>(block % kBlocksPerPage), head_key, stride,
                                    value + head * value_head_stride);
                for (int c = 0; c < model().head_dim; ++c)
                  std::transform(head_key + c * stride, head_key + c * stride + 16, head_key + c * stride,
                                 std::negate<>());
              }
            }};
  }

  int kv_heads_per_group() const override { return 1; }

  PageAttention page_attention(int, const Chunk& chunk, const float* q) const override {
    std::vector<float> negative(q, q + model().n_heads * model().head_dim);
    std::transform(negative.begin(), negative.end(), negative.begin(), std::negate<>());
    return [this, &chunk, negative = std::move(negative)](int group, int64_t page_begin, const kernels::PageRun& run,
                                                          const kernels::SoftmaxState& state) {
      EXPECT_LE(page_begin + run.n_pages, (chunk.stored_len + kPageTokens - 1) / kPageTokens);
      kernels::decode_plain(
          {layout_, run, group, rep(), negative.data() + int64_t{group} * rep() * model().head_dim, state});
    };
  }

  kernels::PlainPageLayout layout_;
  int group_;
  int unit_;  // tokens that store() gets at most
  int64_t n_lost_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<std::byte*, int>, std::thread::id> stored_by_;
  mutable bool pair_was_split_ = false;
};

class WindowedCacheTest : public ::testing::TestWithParam<ExactOptions> {
 protected:
  static constexpr int64_t kTokens = 200;
  // Exact parts are fp16: relative errors of 2^-11.
  static constexpr double kTolerance = 1e-6;
  static constexpr int kFirst = 4;

  at::Tensor step(KvCache& cache, SeqId seq, int64_t begin, int64_t end, bool is_prompt = true,
                  StepKind kind = StepKind::kGenerate) const {
    cache.begin_step({{seq, end - begin, is_prompt, 0}}, kind);
    std::vector<at::Tensor> outs;
    for (int layer = 0; layer < model_.n_layers; ++layer) {
      const auto rows = [&](const std::vector<at::Tensor>& x) { return x[layer].slice(0, begin, end); };
      outs.push_back(cache.attend(layer, {rows(text_.q), rows(text_.k), rows(text_.v),
                                          cache.wants_hidden() ? rows(text_.hidden) : at::Tensor()}));
    }
    cache.end_step();
    return at::stack(outs);
  }

  // A cache that keeps the first tokens, whose packed form is useless.
  NegativePages cache() const {
    ExactOptions exact = GetParam();
    exact.n_first = kFirst;
    return NegativePages(model_, exact, kFirst);
  }

  KvModel model_ = small_model();
  Text text_ = random_text(model_, kTokens, 31);
  at::Tensor expected_ = exact_attention(model_, text_, kTokens);
};

TEST_P(WindowedCacheTest, WithoutFirstTokensTheirLossShows) {
  NegativePages lossy(model_, GetParam(), kTokens);
  const SeqId a = lossy.create();
  EXPECT_GT(nmse(step(lossy, a, 0, kTokens, true, StepKind::kQuantizeAll), expected_), 0.01);
  NegativePages lossless(model_, GetParam(), 0);
  const SeqId b = lossless.create();
  EXPECT_LT(nmse(step(lossless, b, 0, kTokens, true, StepKind::kQuantizeAll), expected_), kTolerance);
}

TEST_P(WindowedCacheTest, WantsTheLayersInputOnlyForEntries) {
  EXPECT_EQ(cache().wants_hidden(), GetParam().sinks > 0);
}

TEST_P(WindowedCacheTest, QuantizeAllIsExact) {
  NegativePages made = cache();
  const SeqId seq = made.create();
  EXPECT_LT(nmse(step(made, seq, 0, kTokens, true, StepKind::kQuantizeAll), expected_), kTolerance);
}

TEST_P(WindowedCacheTest, PairsOfBlocksAreStoredByOneThread) {
  const int before = at::get_num_threads();
  at::set_num_threads(3);
  NegativePages made = cache();
  const SeqId seq = made.create();
  step(made, seq, 0, kTokens, true, StepKind::kQuantizeAll);  // 13 blocks: three threads would take 5 each
  at::set_num_threads(before);
  EXPECT_FALSE(made.pair_was_split());
}

TEST_P(WindowedCacheTest, ChunksAndSingleTokensAreExact) {
  for (const int64_t prompt : {0, 1, 2, 3, 4, 90, 150}) {
    NegativePages made = cache();
    const SeqId seq = made.create();
    std::vector<at::Tensor> outs;
    if (prompt > 0) outs.push_back(step(made, seq, 0, prompt));
    for (int64_t t = prompt; t < prompt + 40; t += 4) outs.push_back(step(made, seq, t, t + 4, false));
    for (int64_t t = prompt + 40; t < kTokens; ++t) outs.push_back(step(made, seq, t, t + 1, false));
    EXPECT_LT(nmse(at::cat(outs, 1), expected_), kTolerance) << prompt;
  }
}

TEST_P(WindowedCacheTest, FirstTokensMayBeGeneratedOneByOne) {
  NegativePages made = cache();
  const SeqId seq = made.create();
  std::vector<at::Tensor> outs;
  for (int64_t t = 0; t < kTokens; ++t) outs.push_back(step(made, seq, t, t + 1, false));
  EXPECT_LT(nmse(at::cat(outs, 1), expected_), kTolerance);
}

TEST_P(WindowedCacheTest, FirstTokensSurviveSavingForkingAndTruncating) {
  NegativePages made = cache();
  const SeqId seq = made.create();
  step(made, seq, 0, 150);
  NegativePages reader = cache();
  const SeqId read = reader.import_sequence(made.export_sequence(seq));
  const at::Tensor after = step(made, made.fork(seq), 150, kTokens);
  EXPECT_TRUE(step(reader, read, 150, kTokens).equal(after));
  EXPECT_LT(nmse(after, expected_.slice(1, 150)), kTolerance);
  for (const int64_t keep : {100, 6, 3, 1}) {
    made.truncate(seq, keep);
    EXPECT_LT(nmse(step(made, made.fork(seq), keep, kTokens), expected_.slice(1, keep)), kTolerance) << keep;
  }
}

// Also where a group is cut off, again and again, and where its other tokens are shared with a sequence that goes on.
TEST_P(WindowedCacheTest, TruncatingAnywhereLosesNothing) {
  NegativePages made = cache();
  const SeqId seq = made.create();
  step(made, seq, 0, 190);
  const SeqId other = made.fork(seq);
  for (const int64_t keep : {189, 161, 160, 159, 131, 97, 96, 33, 31, 5}) {
    made.truncate(seq, keep);
    const SeqId branch = made.fork(seq);
    std::vector<at::Tensor> outs;
    for (int64_t t = keep; t < std::min<int64_t>(keep + 40, kTokens); ++t)
      outs.push_back(step(made, branch, t, t + 1, false));
    EXPECT_LT(nmse(at::cat(outs, 1), expected_.slice(1, keep, keep + 40)), kTolerance) << keep;
    EXPECT_LT(nmse(step(made, made.fork(seq), keep, kTokens, false), expected_.slice(1, keep)), kTolerance) << keep;
  }
  EXPECT_LT(nmse(step(made, other, 190, kTokens), expected_.slice(1, 190)), kTolerance);
}

TEST_P(WindowedCacheTest, SavedSequenceWithAPartOfAGroupInPagesIsRefused) {
  NegativePages made = cache();
  const SeqId seq = made.create();
  step(made, seq, 0, 150);
  const ops::TensorBundle good = made.export_sequence(seq);
  const int64_t stored_len = good.meta_int("rotunda.stored_len");
  EXPECT_EQ(stored_len, (150 - GetParam().recent) / GetParam().pack_group * GetParam().pack_group);
  for (const int64_t wrong : {stored_len - 64, stored_len + 1}) {
    if (wrong > stored_len && GetParam().pack_group == 1) continue;
    ops::TensorBundle bundle = good;
    bundle.metadata["rotunda.stored_len"] = std::to_string(wrong);
    EXPECT_THROW(made.import_sequence(bundle), Error) << wrong;
  }
}

TEST_P(WindowedCacheTest, SavedSequenceOfOtherFirstTokensIsRefused) {
  NegativePages made = cache();
  const SeqId seq = made.create();
  step(made, seq, 0, 150);
  const ops::TensorBundle good = made.export_sequence(seq);
  NegativePages other(model_, GetParam(), 0);
  EXPECT_THROW(other.import_sequence(good), Error);
  EXPECT_THROW(made.import_sequence(other.export_sequence(other.create())), Error);
  for (const int64_t wrong : {-1, 0, 3, 100, 150, -2}) {
    ops::TensorBundle bundle = good;
    const at::Tensor slots = bundle.tensors.at("sink_slots.1").clone();
    slots.masked_fill_(slots.eq(2), wrong);
    bundle.tensors["sink_slots.1"] = slots;
    EXPECT_THROW(made.import_sequence(bundle), Error) << wrong;
  }
}

TEST_P(WindowedCacheTest, PlannedBytesCountFirstTokens) {
  ExactOptions exact = GetParam();
  exact.n_first = 20;
  for (const int64_t length : {1, 15, 17, 128, 200}) {
    NegativePages made(model_, exact, 0);
    const SeqId seq = made.create();
    step(made, seq, 0, length);
    const KvUsage usage = made.usage();
    const int64_t planned = planned_windowed_bytes(
        exact, model_, kernels::PlainPageLayout{kernels::ElementType::kFp32, 2, 64, kBlocksPerPage}.page_bytes(),
        length);
    EXPECT_LE(usage.cache_bytes(), planned) << length;
    if (exact.sinks == 0) {
      EXPECT_EQ(usage.cache_bytes(), planned) << length;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Options, WindowedCacheTest,
    ::testing::Values(ExactOptions{.recent = 0, .sinks = 0}, ExactOptions{.recent = 24, .sinks = 0},
                      ExactOptions{.recent = 0, .sinks = 3},
                      ExactOptions{.recent = 40, .sinks = 3, .sink_select = SinkSelect::kRunning},
                      ExactOptions{.recent = 0, .sinks = 0, .pack_group = 32},
                      ExactOptions{.recent = 20, .sinks = 0, .pack_group = 16},
                      ExactOptions{.recent = 40, .sinks = 3, .sink_select = SinkSelect::kRunning, .pack_group = 32}),
    [](const auto& info) {
      return concat("recent", info.param.recent, "sinks", info.param.sinks, "group", info.param.pack_group);
    });

}  // namespace
}  // namespace rotunda::kv
