// What a decode step does with its new tokens on a GPU, run on the CPU by an emulation of warps (tests/cuda_emulation).

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "base/half.h"
#include "kernels/attention/append_decode.cuh"
#include "kernels/hadamard/hadamard.h"
#include "kernels/hadamard/hadamard_ref.h"

namespace rotunda::kernels {
namespace {

constexpr int kLayer = 1, kLayers = 2, kPlaces = 4, kWindowBlocks = 3, kSinkBlocks = 1, kBatch = 2, kHeads = 2, kQ = 3;
constexpr int kWindowSlots = 16 * kWindowBlocks, kSinkSlots = 16 * kSinkBlocks;

template <int kHeadDim>
struct Case {
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int64_t kPieceBytes = int64_t{2} * kHeads * (kWindowBlocks + kSinkBlocks) * 16 * kHeadDim * 2;

  Case() {
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v})
      for (float& element : *x) element = normal(random);
    for (int i = 0; i < kBatch * kHalf; ++i) {
      const double angle = std::uniform_real_distribution<double>(-3, 3)(random);
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    exact.bytes = reinterpret_cast<std::byte*>(bytes.data());
    exact.place_stride = kLayers * kPieceBytes;
    exact.layer_stride = kPieceBytes;
    exact.n_layers = kLayers;
    exact.n_kv_heads = kHeads;
    exact.head_dim = kHeadDim;
    exact.window_blocks = kWindowBlocks;
    exact.sink_blocks = kSinkBlocks;
    exact.sink_positions = sinks.data();
    exact.page_masks = page_masks.data();
    exact.mask_stride = 1;
    exact.n_places = kPlaces;
    p.batch = kBatch;
    p.n_q = kQ;
    p.softmax_scale = 0.25F;
    p.place = place.data(), p.position = position.data(), p.stored_len = stored_len.data(), p.first_token = first_token.data();
    p.cos = cos.data(), p.sin = sin.data();
    p.q = q.data(), p.k = k.data(), p.v = v.data();
    p.q_stride = kHeads * kQ * kHeadDim, p.k_stride = p.v_stride = kHeads * kHeadDim;
    p.q_turned = q_turned.data(), p.q_rotated = q_rotated.data();
    p.exact_masks = masks.data();
    p.refused = &refused;
  }

  void run(int warps) {
    emulation::launch(kBatch * kHeads, static_cast<unsigned>(32 * warps), [&] { append_block<float, kHeadDim>(exact, kLayer, p, warps); });
  }

  /// Channel c of a row after RoPE.
  double turned(const float* row, int seq, int c) const {
    const int pair = c % kHalf;
    const double cosine = cos[seq * kHalf + pair], sine = sin[seq * kHalf + pair];
    return c < kHalf ? row[pair] * cosine - row[pair + kHalf] * sine : row[pair + kHalf] * cosine + row[pair] * sine;
  }
  /// What the window has of a key's or value's channel.
  Half window(bool value, int seq, int head, int slot, int c) const {
    const int64_t piece = (place[seq] * int64_t{kLayers} + kLayer) * kPieceBytes / 2;
    const int64_t blocks = kWindowBlocks + kSinkBlocks;
    return {bytes[piece + (value ? (kHeads * blocks * 16 + head * blocks * 16 + slot) * kHeadDim + c
                                 : ((head * blocks + slot / 16) * kHeadDim + c) * 16 + slot % 16)]};
  }

  std::mt19937 random{3};
  std::vector<float> q = std::vector<float>(kBatch * kHeads * kQ * kHeadDim), k = std::vector<float>(kBatch * kHeads * kHeadDim), v = k;
  std::vector<float> cos, sin, q_turned = std::vector<float>(q.size(), NAN), q_rotated = q_turned;
  std::vector<uint16_t> bytes = std::vector<uint16_t>(kPlaces * kLayers * kPieceBytes / 2, 0x7c00);
  std::vector<int32_t> sinks = std::vector<int32_t>(kPlaces * kLayers * kSinkSlots, -1);
  std::vector<uint16_t> page_masks = std::vector<uint16_t>(kPlaces * kLayers, 0xffff), masks = std::vector<uint16_t>(kBatch * (kWindowBlocks + kSinkBlocks), 0xabcd);
  std::vector<int32_t> place = {3, 1}, position = {70, 20}, stored_len = {40, 0}, first_token = {0, 5};
  int32_t refused = 0;
  ExactTokens exact;
  DecodeAppend p;
};

template <int kHeadDim>
void expect_rows(int warps) {
  Case<kHeadDim> test;
  test.run(warps);
  std::vector<double> rotated;
  for (int row = 0; row < kBatch * kHeads * kQ; ++row) {
    for (int c = 0; c < kHeadDim; ++c) {
      rotated.push_back(0.25 * test.turned(test.q.data() + row * kHeadDim, row / (kHeads * kQ), c));
      ASSERT_NEAR(test.q_turned[row * kHeadDim + c], rotated.back(), 1e-6);
    }
  }
  hadamard_rows_ref(hadamard_plan(kHeadDim), false, rotated.data(), kBatch * kHeads * kQ, kHeadDim);
  // Up to eight additions in a row, of at most 16: 2^-24 each.
  for (size_t i = 0; i < rotated.size(); ++i) ASSERT_NEAR(test.q_rotated[i], rotated[i], 1e-5);
  for (int seq = 0; seq < kBatch; ++seq) {
    for (int head = 0; head < kHeads; ++head) {
      const int row = (seq * kHeads + head) * kHeadDim;
      const int slot = test.position[seq] % kWindowSlots;
      for (int c = 0; c < kHeadDim; ++c) {
        ASSERT_NEAR(to_float(test.window(false, seq, head, slot, c)), test.turned(test.k.data() + row, seq, c), 2e-3);
        ASSERT_EQ(test.window(true, seq, head, slot, c).bits, to_half(test.v[row + c]).bits);
        ASSERT_EQ(test.window(true, seq, head, (slot + 1) % kWindowSlots, c).bits, 0x7c00) << "only the token's slot is written";
      }
    }
  }
  EXPECT_EQ(test.refused, 0);
}
TEST(AppendDecodeTest, TurnsRotatesAndWrites) {
  expect_rows<64>(5);
  expect_rows<128>(5);
  expect_rows<256>(2);
}

TEST(AppendDecodeTest, MasksSayWhatIsAttended) {
  Case<64> test;
  const auto sink = [&](int seq, int slot) -> int32_t& { return test.sinks[(test.place[seq] * kLayers + kLayer) * kSinkSlots + slot]; };
  sink(0, 2) = 7;    // in pages: attended here
  sink(0, 15) = 45;  // still in the window
  sink(1, 0) = 3;    // before the first token that is attended
  test.run(2);
  for (int seq = 0; seq < kBatch; ++seq) {
    for (int slot = 0; slot < kWindowSlots + kSinkSlots; ++slot) {
      bool expected = false;
      if (slot < kWindowSlots) {
        for (int position = std::max(test.stored_len[seq], test.first_token[seq]); position <= test.position[seq]; ++position)
          expected = expected || position % kWindowSlots == slot;
      } else {
        expected = seq == 0 && slot == kWindowSlots + 2;
      }
      EXPECT_EQ((test.masks[seq * (kWindowBlocks + kSinkBlocks) + slot / 16] >> slot % 16 & 1) != 0, expected) << seq << " " << slot;
    }
  }
}

TEST(AppendDecodeTest, LeavesMasksForLater) {
  Case<64> test;
  test.p.masks_later = true;
  test.run(5);
  for (const uint16_t mask : test.masks) EXPECT_EQ(mask, 0xabcd);
}

TEST(AppendDecodeTest, RefusesWhatSixteenBitsCannotHold) {
  Case<64> test;
  test.v[5] = 1e5F;
  test.run(5);
  EXPECT_EQ(test.refused, 1);
  EXPECT_EQ(test.window(true, 0, 0, test.position[0] % kWindowSlots, 5).bits, 0);
}

}  // namespace
}  // namespace rotunda::kernels
