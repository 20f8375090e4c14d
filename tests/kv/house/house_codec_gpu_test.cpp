// The format on a GPU against the method in fp64 and against the CPU's kernels: what it packs, unpacks, attends to and saves.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "kernels/run_on_gpu.h"
#include "kv/head_rotation.h"
#include "kv/house/house_cache.h"
#include "kv/house/house_codec_cuda.h"
#include "kv/house/kernels/house_codec_ref.h"
#include "kv_harness.h"

namespace rotunda::kv::house {
namespace {

using kv::testing::nmse;

constexpr int64_t kPages = 3;
constexpr int64_t kTokens = kPages * 128;
constexpr int64_t kFirstPosition = 1280;  // a page's: those of the pool are pages 10 .. 12 of the sequence

/// `dynamic` RoPE, at lengths at which its frequencies are no longer those of a short sequence.
KvModel dynamic_model() {
  KvModel model = kv::testing::small_model();
  ops::RopeSpec rope = model.rope.spec();
  rope.type = ops::RopeType::kDynamic;
  rope.factor = 4;
  rope.max_position_embeddings = 256;
  model.rope = ops::Rope(rope);
  return model;
}

/// Tables of no weights: a shift of some pairs in one layer, of other ones in every head, feedback everywhere.
ops::TensorBundle some_setup(const KvModel& model) {
  at::manual_seed(11);
  const int64_t heads = model.n_kv_heads, d = model.head_dim;
  ops::TensorBundle setup;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    at::Tensor shift = at::zeros({heads, d});
    for (int64_t head = 0; head < heads && layer == 1; ++head) {
      for (const int64_t pair : {head, 7 + head, d / 2 - 1}) {
        shift[head][pair] = 20.0 - 3 * head;
        shift[head][pair + d / 2] = -5.0;
      }
    }
    setup.tensors[concat("balance.", layer)] = at::rand({heads, d / 2}) + 0.5;
    setup.tensors[concat("shift.", layer)] = shift;
    setup.tensors[concat("feedback.", layer)] = (0.1 * at::randn({heads, d, d})).triu(1) + (at::rand({heads, d}) + 0.5).diag_embed();
  }
  return setup;
}

class HouseCodecGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ROTUNDA_SKIP_WITHOUT_GPU();
    options_ = HouseOptions::from_spec(parse_kv_spec("rotunda3:values=2"), 3);
    layout_ = house_layout(options_, model_);
    setup_ = some_setup(model_);
    codec_ = make_house_codec_cuda(model_, options_, setup_);
    at::manual_seed(12);
    turned_ = at::randn({model_.n_layers, kTokens, model_.n_kv_heads, model_.head_dim});
    value_ = at::randn({model_.n_layers, kTokens, model_.kv_channels()});
    positions_ = at::arange(kFirstPosition, kFirstPosition + kTokens);
  }

  /// mu R_n, [layers, T, heads, d] fp64.
  at::Tensor shift() const {
    const at::Tensor angles = positions_.to(at::kDouble).unsqueeze(1) * at::tensor(model_.rope.inv_freq(0), at::kDouble);
    const at::Tensor cos = angles.cos().unsqueeze(1), sin = angles.sin().unsqueeze(1);
    std::vector<at::Tensor> layers;
    for (int layer = 0; layer < model_.n_layers; ++layer) {
      const auto halves = setup_.tensors.at(concat("shift.", layer)).to(at::kDouble).chunk(2, 1);
      layers.push_back(at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, 2));
    }
    return at::stack(layers);
  }

  at::Tensor packable() const {
    const at::Tensor unread = at::empty({0}, at::kCUDA);
    return codec_->packable(0, turned_.to(at::kCUDA), unread, unread, positions_.to(at::kCUDA));
  }

  /// Stores all tokens, pages in no order.
  void store(const at::Tensor& key) {
    std::vector<int32_t> pairs;
    for (int page = 0; page < kPages; ++page)
      for (int pair = 0; pair < 4; ++pair) pairs.insert(pairs.end(), {(page + 1) % 3, pair, page * 128 + pair * 32, -1});
    pool_ = at::zeros({kPages, stride()}, at::TensorOptions().device(at::kCUDA).dtype(at::kByte));
    refused_ = at::zeros({model_.n_layers}, at::TensorOptions().device(at::kCUDA).dtype(at::kInt));
    codec_->store(0, key, value_.to(at::kCUDA), at::tensor(pairs, at::kInt).view({-1, 4}).to(at::kCUDA), pages(), refused_);
    table_ = at::tensor({1, 2, 0}, at::kInt).to(at::kCUDA);
  }
  int64_t stride() const { return model_.n_layers * codec_->layer_bytes() + 128; }
  PagesCuda pages() const { return {static_cast<std::byte*>(pool_.data_ptr()), stride()}; }

  std::pair<at::Tensor, at::Tensor> load(int layer, at::ScalarType type) const {
    const at::Tensor unread = at::empty({0}, at::kCUDA);
    return codec_->load(layer, pages(), table_, unread, unread, positions_.to(at::kCUDA), type);
  }

  KvModel model_ = dynamic_model();
  HouseOptions options_;
  HousePageLayout layout_;
  ops::TensorBundle setup_;
  std::unique_ptr<PageCodecCuda> codec_;
  at::Tensor turned_, value_, positions_, pool_, refused_, table_;
};

TEST_F(HouseCodecGpuTest, PackableIsShiftedAndRotated) {
  const at::Tensor expected = at::matmul(turned_.to(at::kDouble) - shift(), hadamard_matrix(model_.head_dim, at::kDouble));
  // fp32 sums of 64 products around 20 / 8.
  EXPECT_LT((packable().cpu().to(at::kDouble) - expected.flatten(2)).abs().max().item<double>(), 1e-4);
}

TEST_F(HouseCodecGpuTest, BytesOfTheCpuFew) {
  const at::Tensor key = packable();
  store(key);
  EXPECT_TRUE(refused_.cpu().eq(0).all().item<bool>());
  const at::Tensor rows = key.cpu(), bytes = pool_.cpu();
  for (int layer = 0; layer < model_.n_layers; ++layer) {
    HouseLayer of_cpu;
    of_cpu.layout = layout_;
    of_cpu.scale = options_.scale;
    of_cpu.feedback = setup_.tensors.at(concat("feedback.", layer)).const_data_ptr<float>();
    for (int page = 0; page < kPages; ++page) {
      const rotunda::testing::AlignedBytes expected(static_cast<size_t>(layout_.page_bytes()));
      for (int block = 0; block < 8; ++block) {
        const int64_t row = page * 128 + block * 16;
        ASSERT_TRUE(house_store({&of_cpu, rows[layer][row].const_data_ptr<float>(), value_[layer][row].const_data_ptr<float>(),
                                 model_.kv_channels(), block, 0, 16, expected.get()}));
      }
      const auto* const got =
          static_cast<const std::byte*>(bytes.const_data_ptr()) + (page + 1) % 3 * stride() + layer * codec_->layer_bytes();
      EXPECT_EQ(std::memcmp(got, expected.get(), expected.size()), 0) << layer << " " << page;
    }
  }
}

TEST_F(HouseCodecGpuTest, LoadGivesBackWhatWasStoredFew) {
  store(packable());
  const at::Tensor bytes = pool_.cpu(), mu = shift();
  for (int layer = 0; layer < model_.n_layers; ++layer) {
    at::Tensor key = at::empty({model_.n_kv_heads, kTokens, model_.head_dim}, at::kDouble);
    at::Tensor value = at::empty_like(key);
    for (int head = 0; head < model_.n_kv_heads; ++head) {
      for (int64_t token = 0; token < kTokens; ++token) {
        const auto* const page =
            static_cast<const std::byte*>(bytes.const_data_ptr()) + (token / 128 + 1) % 3 * stride() + layer * codec_->layer_bytes();
        for (int c = 0; c < model_.head_dim; ++c) {
          const int64_t at = (head * kTokens + token) * model_.head_dim + c;
          key.mutable_data_ptr<double>()[at] = element_ref(layout_, page, true, head, token % 128, c);
          value.mutable_data_ptr<double>()[at] = element_ref(layout_, page, false, head, token % 128, c);
        }
      }
    }
    key = at::matmul(key, hadamard_matrix(model_.head_dim, at::kDouble).t()) + mu[layer].transpose(0, 1);
    for (const auto& [type, tolerance] : {std::pair{at::kFloat, 1e-12}, {at::kHalf, 1e-7}, {at::kBFloat16, 6e-6}}) {
      const auto [k, v] = load(layer, type);
      EXPECT_LT(nmse(k.cpu(), key), tolerance) << layer << " " << type;
      EXPECT_LT(nmse(v.cpu(), value), tolerance) << layer << " " << type;
      EXPECT_EQ(k.scalar_type(), type);
    }
    // 2 bits of normal numbers.
    EXPECT_LT(nmse(value, value_[layer].view({kTokens, model_.n_kv_heads, -1}).transpose(0, 1)), 0.2);
  }
}

TEST_F(HouseCodecGpuTest, DecodeAttendsToWhatLoadGivesShifted) {
  store(packable());
  ASSERT_TRUE(codec_->has_decode());
  const auto on_gpu = [](at::ScalarType type) { return at::TensorOptions().device(at::kCUDA).dtype(type); };
  const at::Tensor q = 0.3 * at::randn({1, model_.n_heads, model_.head_dim}, on_gpu(at::kFloat));
  constexpr int kStored = 300;
  for (int layer = 0; layer < model_.n_layers; ++layer) {
    const at::Tensor out = at::full_like(q, NAN), stored = at::full({1}, kStored, on_gpu(at::kInt));
    // The pages stand where their positions say: before them come ten that no token of is attended.
    const at::Tensor table = at::cat({at::zeros({10}, on_gpu(at::kInt)), table_});
    at::Tensor masks = at::zeros({13 * 8}, on_gpu(at::kShort));
    masks.narrow(0, 80, kStored / 16).fill_(-1);
    masks[80 + kStored / 16] = (1 << kStored % 16) - 1;
    const at::Tensor length = stored + kFirstPosition;
    kernels::PagedDecode p;
    p.batch = 1;
    p.n_kv_heads = model_.n_kv_heads;
    p.n_q = model_.n_heads / model_.n_kv_heads;
    p.head_dim = model_.head_dim;
    p.q_exact = q.const_data_ptr<float>();
    const at::Tensor rotated = at::matmul(q, hadamard_matrix(model_.head_dim, at::kFloat).to(at::kCUDA));
    p.q_pages = rotated.const_data_ptr<float>();
    p.pool = pages().pool + layer * codec_->layer_bytes();
    p.page_bytes = stride();
    p.block_table = table.const_data_ptr<int32_t>();
    p.table_stride = static_cast<int>(table.size(0));
    p.stored_len = length.const_data_ptr<int32_t>();
    p.page_masks = reinterpret_cast<const uint16_t*>(masks.const_data_ptr<int16_t>());
    const at::Tensor units =
        at::tensor({0, kernels::paged_decode_units(kFirstPosition + kStored, codec_->unit_tokens(), 0)}, at::kInt).to(at::kCUDA);
    p.units_before = units.const_data_ptr<int32_t>();
    p.out = out.mutable_data_ptr<float>();
    const kernels::PagedDecodeGrid grid = codec_->decode_grid(p);
    const at::Tensor workspace =
        at::zeros({kernels::paged_decode_workspace_bytes(grid, p.batch, p.n_kv_heads, p.n_q, p.head_dim)}, on_gpu(at::kByte));
    p.workspace = static_cast<std::byte*>(workspace.data_ptr());
    codec_->decode(layer, p, grid);

    const auto [k, v] = load(layer, at::kFloat);
    const at::Tensor grouped = q.view({p.n_kv_heads, p.n_q, p.head_dim}).to(at::kDouble);
    const at::Tensor weights = at::matmul(grouped, k.narrow(1, 0, kStored).to(at::kDouble).transpose(1, 2)).softmax(-1);
    const at::Tensor expected = at::matmul(weights, v.narrow(1, 0, kStored).to(at::kDouble)).view_as(out);
    // As kTolerance of house_paged_case.h says, squared; scores of up to 20 double it.
    EXPECT_LT(nmse(out, expected), 4e-6) << layer;
  }
}

TEST_F(HouseCodecGpuTest, RefusesPositionsBeyondItsTable) {
  kernels::PagedDecode p;
  p.batch = 1;
  p.table_stride = kMaxShiftedPositions / 128 + 1;
  try {
    codec_->decode(1, p, {1, 1});
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kUser);
    EXPECT_NE(std::string(error.what()).find("1048576"), std::string::npos) << error.what();
  }
}

TEST_F(HouseCodecGpuTest, SavesWhatTheCpuSaves) {
  const auto cpu = make_house_cache(parse_kv_spec("rotunda3:values=2"), model_, options_, setup_);
  const ops::TensorBundle saved = cpu->export_sequence(cpu->create());
  EXPECT_EQ(codec_->saved_settings().size(), 3U);
  for (const auto& [key, value] : codec_->saved_settings()) EXPECT_EQ(saved.meta(key), value) << key;
}

}  // namespace
}  // namespace rotunda::kv::house
