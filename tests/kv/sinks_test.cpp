#include "kv/sinks.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "base/check.h"

namespace rotunda::kv {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int kHeads = 2;
constexpr int kHeadDim = 16;
constexpr int kChannels = kHeads * kHeadDim;

// A text whose keys and values say which token they are of; tokens 9 and 30 have the largest layer inputs, then 2 and
// 1.
class SinksTest : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 48;

  SinksTest() {
    hidden_[9][4] = 300.0;
    hidden_[30][0] = -200.0;
    hidden_[2][1] = 100.0;
    hidden_[1][1] = 50.0;
    key_ += at::arange(kTokens).unsqueeze(1);
    value_ -= at::arange(kTokens).unsqueeze(1);
  }

  bool feed(LayerSinks& sinks, int64_t begin, int64_t end, bool choose = true) const {
    return sinks.update(choose ? hidden_.slice(0, begin, end) : at::Tensor(), begin, end - begin,
                        key_.data_ptr<float>() + begin * kChannels, value_.data_ptr<float>() + begin * kChannels);
  }

  // Every slot holds the key and the value of the token that it is said to hold.
  static void expect_content(const LayerSinks& sinks) {
    std::vector<float> key(kChannels);
    std::vector<float> value(kChannels);
    for (size_t slot = 0; slot < sinks.slots().size(); ++slot) {
      const auto position = static_cast<float>(sinks.slots()[slot]);
      if (position < 0) continue;
      sinks.store().read(static_cast<int64_t>(slot), key.data(), value.data());
      EXPECT_THAT(key, ::testing::Each(position));
      EXPECT_THAT(value, ::testing::Each(-position));
    }
  }

  // No two entries are equal: which of equal ones counts first is not laid down.
  at::Tensor hidden_ =
      at::arange(kTokens * 6).remainder(101).add(at::arange(kTokens * 6) / 1000.0).view({kTokens, 6}) / 1000.0;
  at::Tensor key_ = at::zeros({kTokens, kChannels});
  at::Tensor value_ = at::zeros({kTokens, kChannels});
};

TEST_F(SinksTest, FirstTokensAreKeptWithoutAnyEntry) {
  LayerSinks sinks(kHeads, kHeadDim, /*n_entries=*/0, /*n_first=*/4);
  EXPECT_TRUE(feed(sinks, 0, 40, /*choose=*/false));
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(sinks.entries(), IsEmpty());
  expect_content(sinks);
  EXPECT_FALSE(sinks.would_change({}, 40));
  EXPECT_FALSE(feed(sinks, 40, kTokens, /*choose=*/false));
}

TEST_F(SinksTest, FirstTokensStandBesideTheOwnersOfTheLargestEntries) {
  LayerSinks sinks(kHeads, kHeadDim, 3, 2);
  feed(sinks, 0, kTokens);
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 2, 9, 30));
  expect_content(sinks);
}

TEST_F(SinksTest, AFirstTokenStaysWhenItsEntryIsOutdone) {
  LayerSinks sinks(kHeads, kHeadDim, 2, 2);
  feed(sinks, 0, 3);
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 2));  // entries of 2 and 1
  feed(sinks, 3, kTokens);
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 9, 30));
  expect_content(sinks);
}

TEST_F(SinksTest, WithoutFirstTokensOnlyEntriesChoose) {
  LayerSinks sinks(kHeads, kHeadDim, 2, 0);
  EXPECT_FALSE(sinks.would_change({}, 0));
  EXPECT_FALSE(feed(sinks, 0, 5, /*choose=*/false));
  EXPECT_THAT(sinks.positions(), IsEmpty());
  feed(sinks, 5, kTokens);
  EXPECT_THAT(sinks.positions(), ElementsAre(9, 30));
  EXPECT_EQ(LayerSinks(kHeads, kHeadDim, 0, 0).would_change(hidden_, 0), false);
}

TEST_F(SinksTest, ChunksOfAnyLengthEndAsTheWholeDoes) {
  for (const int n_entries : {0, 1, 3, 20}) {
    for (const int n_first : {0, 1, 4, 16, 17}) {
      LayerSinks whole(kHeads, kHeadDim, n_entries, n_first);
      feed(whole, 0, kTokens);
      for (const int64_t chunk : {1, 3, 4, 16, 47}) {
        LayerSinks chunked(kHeads, kHeadDim, n_entries, n_first);
        for (int64_t t = 0; t < kTokens; t += chunk) feed(chunked, t, std::min(t + chunk, kTokens));
        EXPECT_EQ(chunked.positions(), whole.positions()) << n_entries << " " << n_first << " " << chunk;
        expect_content(chunked);
      }
    }
  }
}

TEST_F(SinksTest, FirstTokensMayBeGeneratedOnes) {
  // The prompt is one token; the rest comes one by one, and entries are not looked at.
  LayerSinks sinks(kHeads, kHeadDim, 2, 4);
  feed(sinks, 0, 1);
  for (int64_t t = 1; t < kTokens; ++t) EXPECT_EQ(feed(sinks, t, t + 1, /*choose=*/false), t < 4) << t;
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 2, 3));
  expect_content(sinks);
}

TEST_F(SinksTest, TruncatingForgetsAndLaterTokensTakeThePlace) {
  LayerSinks sinks(kHeads, kHeadDim, 2, 4);
  feed(sinks, 0, kTokens);
  sinks.truncate(20);
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 2, 3, 9));
  sinks.truncate(2);
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1));
  key_ += 100;
  value_ -= 100;
  feed(sinks, 2, 30);
  EXPECT_THAT(sinks.positions(), ElementsAre(0, 1, 2, 3, 9));
  std::vector<float> key(kChannels);
  std::vector<float> value(kChannels);
  for (size_t slot = 0; slot < sinks.slots().size(); ++slot) {
    const int64_t position = sinks.slots()[slot];
    if (position < 0) continue;
    sinks.store().read(static_cast<int64_t>(slot), key.data(), value.data());
    EXPECT_EQ(key[5], static_cast<float>(position + (position < 2 ? 0 : 100))) << position;
  }
  sinks.truncate(0);
  EXPECT_THAT(sinks.positions(), IsEmpty());
}

TEST_F(SinksTest, RestoredSinksGoOnAsTheOldOnes) {
  LayerSinks sinks(kHeads, kHeadDim, 2, 4);
  feed(sinks, 0, 3);
  LayerSinks restored(kHeads, kHeadDim, 2, 4);
  ops::TensorBundle bundle;
  sinks.export_to(bundle, ".7");
  restored.import_from(bundle, ".7", 3);
  EXPECT_EQ(restored.positions(), sinks.positions());
  for (LayerSinks* each : {&sinks, &restored}) feed(*each, 3, kTokens);
  EXPECT_THAT(restored.positions(), ElementsAre(0, 1, 2, 3, 9, 30));
  EXPECT_EQ(restored.slots(), sinks.slots());
  EXPECT_TRUE(restored.store().export_bytes().equal(sinks.store().export_bytes()));
  expect_content(restored);
}

TEST_F(SinksTest, AFirstTokenBeyondFp16IsRefused) {
  for (const float bad : {1e6F, std::numeric_limits<float>::quiet_NaN()}) {
    LayerSinks sinks(kHeads, kHeadDim, 0, 4);
    key_[3][7] = bad;
    EXPECT_THROW(feed(sinks, 0, 4, /*choose=*/false), Error);
  }
}

}  // namespace
}  // namespace rotunda::kv
