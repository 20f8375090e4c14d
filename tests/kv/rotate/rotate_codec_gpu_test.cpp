// What RotateKV does with its pages on a GPU, against the scalar references and dense matrices in double.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <gtest/gtest.h>

#include "kernels/run_on_gpu.h"
#include "kv/head_rotation.h"
#include "kv/rotate/kernels/rotate_store_case.h"
#include "kv/rotate/rotate_codec_cuda.h"

namespace rotunda::kv::rotate {
namespace {

constexpr int kLayers = 2;
constexpr int64_t kTokens = 256;

/// A model whose cos and sin carry an attention factor.
KvModel model_of(int n_kv_heads, int head_dim, bool key_norm) {
  KvModel model;
  model.n_layers = kLayers;
  model.n_kv_heads = n_kv_heads;
  model.n_heads = 2 * n_kv_heads;
  model.head_dim = head_dim;
  model.key_norm = key_norm;
  ops::RopeSpec rope;
  rope.type = ops::RopeType::kYarn;
  rope.head_dim = head_dim;
  rope.factor = 4;
  rope.original_max_position_embeddings = 1024;
  rope.attention_factor = 1.25;
  model.rope = ops::Rope(rope);
  return model;
}

class RotateCodecGpuTest : public ::testing::TestWithParam<std::tuple<int, int, bool>> {
 protected:
  void SetUp() override {
    ROTUNDA_SKIP_WITHOUT_GPU();
    at::manual_seed(7);
    std::tie(n_kv_heads_, head_dim_, key_norm_) = GetParam();
    model_ = model_of(n_kv_heads_, head_dim_, key_norm_);
    layout_ = rotate_layout(options_, model_);
    std::mt19937 random(3);
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<uint16_t> order = testing::random_order(model_.kv_channels(), random);
      key_groups_.emplace_back(order.size());
      for (size_t i = 0; i < order.size(); ++i) key_groups_.back()[order[i]] = static_cast<uint16_t>(i / layout_.group_size);
    }
    codec_ = make_rotate_codec_cuda(model_, options_, key_groups_);
    matrix_ = hadamard_matrix(layout_.group_channels(), at::kDouble);
    positions_ = at::arange(kTokens, at::TensorOptions().dtype(at::kLong).device(at::kCUDA));
    std::tie(cos_, sin_) = model_.rope.cos_sin(at::arange(kTokens, at::kLong), kTokens);
  }

  /// x [..., channels] times W_G or its transpose, in double.
  at::Tensor transformed(const at::Tensor& x, bool inverse) const {
    return at::matmul(x.to(at::kDouble).reshape({-1, layout_.group_channels()}), inverse ? matrix_.t() : matrix_).reshape(x.sizes());
  }

  int n_kv_heads_ = 0, head_dim_ = 0;
  bool key_norm_ = false;
  RotateOptions options_;
  KvModel model_;
  RotatePageLayout layout_;
  std::vector<std::vector<uint16_t>> key_groups_;
  std::unique_ptr<PageCodecCuda> codec_;
  at::Tensor matrix_, cos_, sin_, positions_;
};

/// fp32 sums of up to 512 elements of size 4: a few 1e-6.
constexpr double kTolerance = 1e-5;

TEST_P(RotateCodecGpuTest, KeysBeforeRope) {
  const at::Tensor k = at::randn({kTokens, n_kv_heads_, head_dim_});
  const at::Tensor expected = key_norm_ ? k.to(at::kDouble) : transformed(k.view({kTokens, -1}), true).view(k.sizes());
  EXPECT_LT((codec_->before_rope(k.to(at::kCUDA)).cpu().to(at::kDouble) - expected).abs().max().item<double>(), kTolerance);
}

TEST_P(RotateCodecGpuTest, PackableTurnsBackAndRotates) {
  const at::Tensor plain = at::randn({kLayers, kTokens, n_kv_heads_, head_dim_});
  std::vector<at::Tensor> turned;
  for (int layer = 0; layer < kLayers; ++layer) turned.push_back(ops::apply_rope(plain[layer], cos_, sin_));
  const at::Tensor rows = codec_->packable(0, at::stack(turned).to(at::kCUDA), cos_.to(at::kCUDA), sin_.to(at::kCUDA), positions_);
  ASSERT_EQ(rows.sizes(), (std::vector<int64_t>{kLayers, kTokens, model_.kv_channels()}));
  ASSERT_TRUE(rows.is_contiguous());
  EXPECT_LT((rows.cpu().to(at::kDouble) - transformed(plain.view(rows.sizes()), false)).abs().max().item<double>(), kTolerance);
}

// Two pages of both layers: the bytes of rotate_store_ref, and out of them what they stand for.
TEST_P(RotateCodecGpuTest, StoresAndLoads) {
  const at::Tensor key = at::randn({kLayers, kTokens, model_.kv_channels()});
  const at::Tensor value = at::randn({kLayers, kTokens, model_.kv_channels()});
  const std::vector<int32_t> table = {2, 0};
  std::vector<int32_t> pairs;
  for (int i = 0; i < kTokens / 32; ++i)
    for (const int32_t x : {table[i / 4], i % 4, 32 * i, -1}) pairs.push_back(x);
  const int64_t stride = kLayers * codec_->layer_bytes();
  const at::Tensor pool = at::zeros({3, stride}, at::TensorOptions().dtype(at::kByte).device(at::kCUDA));
  const PagesCuda pages{static_cast<std::byte*>(pool.mutable_data_ptr()), stride};
  const at::Tensor refused = at::zeros({kLayers}, at::TensorOptions().dtype(at::kInt).device(at::kCUDA));
  codec_->store(0, key.to(at::kCUDA), value.to(at::kCUDA), at::tensor(pairs, at::kInt).view({-1, 4}).to(at::kCUDA), pages, refused);
  EXPECT_EQ(refused.sum().item<int64_t>(), 0);

  const at::Tensor got = pool.cpu();
  std::vector<std::byte> expected(static_cast<size_t>(3 * stride));
  for (int index = 0; index < kLayers; ++index) {
    RotateLayer layer{};
    layer.layout = layout_;
    layer.key_group = key_groups_[index].data();
    layer.key_clip = layer.value_clip = options_.clip;
    for (int block = 0; block < kTokens / 16; ++block) {
      std::byte* const page = expected.data() + table[block / 8] * stride + index * codec_->layer_bytes();
      const auto rows = [&](const at::Tensor& of) { return of[index][16 * block].const_data_ptr<float>(); };
      ASSERT_TRUE(rotate_store_ref({&layer, rows(key), rows(value), model_.kv_channels(), block % 8, 0, 16, page}));
    }
    at::Tensor want_key = at::empty({kTokens, model_.kv_channels()}, at::kDouble);
    at::Tensor want_value = at::empty_like(want_key);
    for (int64_t token = 0; token < kTokens; ++token) {
      const std::byte* const page = expected.data() + table[token / 128] * stride + index * codec_->layer_bytes();
      const int n = layout_.group_channels();
      for (int c = 0; c < model_.kv_channels(); ++c) {
        want_key[token].mutable_data_ptr<double>()[c] = dequantize_ref(layout_, page, true, layer.key_group[c], token % 128,
                                                                       read_code(page, key_place(layout_, c / n, token % 128, c % n)));
        want_value[token].mutable_data_ptr<double>()[c] =
            dequantize_ref(layout_, page, false, c / layout_.group_size, token % 128,
                           read_code(page, value_place(layout_, c / head_dim_, token % 128, c % head_dim_)));
      }
    }
    const at::Tensor plain = transformed(want_key, true).view({kTokens, n_kv_heads_, head_dim_});
    const at::Tensor numbers = at::tensor(table, at::kInt).to(at::kCUDA);
    const at::Tensor cos = cos_.to(at::kCUDA);
    const at::Tensor sin = sin_.to(at::kCUDA);
    const auto [k, v] = codec_->load(index, pages, numbers, cos, sin, positions_, at::kFloat);
    EXPECT_LT((k.cpu().to(at::kDouble) - ops::apply_rope(plain, cos_, sin_).transpose(0, 1)).abs().max().item<double>(), kTolerance);
    EXPECT_TRUE(at::equal(v.cpu(), want_value.to(at::kFloat).view({kTokens, n_kv_heads_, head_dim_}).transpose(0, 1)));
    const auto [k16, v16] = codec_->load(index, pages, numbers, cos, sin, positions_, at::kBFloat16);
    EXPECT_TRUE(at::equal(k16, k.to(at::kBFloat16)));
    EXPECT_TRUE(at::equal(v16, v.to(at::kBFloat16)));
  }
  EXPECT_EQ(std::memcmp(got.const_data_ptr(), expected.data(), expected.size()), 0);
}

// Fewer query heads than the kernel takes, and an attention factor: the same as attention over what load() gives.
TEST_P(RotateCodecGpuTest, Decodes) {
  EXPECT_EQ(codec_->has_decode(), head_dim_ == 128);
  if (!codec_->has_decode()) return;
  const at::TensorOptions on_gpu = at::TensorOptions().device(at::kCUDA);
  const auto ints = [&](const std::vector<int32_t>& x) { return at::tensor(x, at::kInt).to(at::kCUDA); };
  const int64_t stride = kLayers * codec_->layer_bytes();
  const at::Tensor pool = at::zeros({3, stride}, on_gpu.dtype(at::kByte));
  const PagesCuda pages{static_cast<std::byte*>(pool.mutable_data_ptr()), stride};
  const at::Tensor table = ints({2, 0});
  std::vector<int32_t> pairs;
  for (int32_t i = 0; i < kTokens / 32; ++i)
    for (const int32_t x : {i < 4 ? 2 : 0, i % 4, 32 * i, -1}) pairs.push_back(x);
  const at::Tensor rows = at::randn({kLayers, kTokens, model_.kv_channels()}, on_gpu);
  codec_->store(0, rows, rows, ints(pairs).view({-1, 4}), pages, at::zeros({kLayers}, on_gpu.dtype(at::kInt)));

  const int layer = kLayers - 1;
  const int64_t rep = model_.n_heads / n_kv_heads_;
  const at::Tensor q = at::randn({n_kv_heads_, rep, head_dim_}, on_gpu) * 0.1;
  const at::Tensor out = at::full({n_kv_heads_, rep, head_dim_}, std::nan(""), on_gpu);
  const at::Tensor stored_len = ints({static_cast<int32_t>(kTokens)});
  const at::Tensor units_before = ints({0, kernels::paged_decode_units(kTokens, codec_->unit_tokens(), 0)});
  kernels::PagedDecode p;
  p.batch = 1;
  p.n_kv_heads = n_kv_heads_;
  p.n_q = static_cast<int>(rep);
  p.head_dim = head_dim_;
  p.q_exact = q.const_data_ptr<float>();
  p.pool = pages.pool + layer * codec_->layer_bytes();
  p.page_bytes = stride;
  p.block_table = table.const_data_ptr<int32_t>();
  p.table_stride = 2;
  p.stored_len = stored_len.const_data_ptr<int32_t>();
  p.units_before = units_before.const_data_ptr<int32_t>();
  p.out = out.mutable_data_ptr<float>();
  codec_->decode(layer, p, codec_->decode_grid(p));

  const auto [k, v] = codec_->load(layer, pages, table, cos_.to(at::kCUDA), sin_.to(at::kCUDA), positions_, at::kFloat);
  const at::Tensor expected = at::bmm(at::bmm(q, k.transpose(1, 2)).softmax(-1), v);
  // Keys of size 1 and scores of size 1: the kernel's fp16 keys and queries err by about 1e-3 of a score.
  EXPECT_LT(((out - expected).norm() / expected.norm()).item<double>(), 2e-3);
}

INSTANTIATE_TEST_SUITE_P(Shapes, RotateCodecGpuTest,
                         ::testing::Values(std::tuple(8, 128, false), std::tuple(4, 64, true), std::tuple(2, 80, false)));

}  // namespace
}  // namespace rotunda::kv::rotate
