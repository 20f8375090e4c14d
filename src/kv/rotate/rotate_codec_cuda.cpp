#include "kv/rotate/rotate_codec_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "kv/head_rotation.h"
#include "kv/paged_cache.h"
#include "kv/rotate/kernels/rotate_decode_cuda.h"
#include "kv/rotate/kernels/rotate_load_cuda.h"
#include "kv/rotate/kernels/rotate_store_cuda.h"
#include "ops/launch_cuda.h"
#include "ops/rope.h"

namespace rotunda::kv::rotate {

namespace {

using ops::check_launch;
using ops::current_stream;
using ops::element_type;
using ops::scalar_type;

// [n_layers, kv_channels] int16, bits of uint16, on the GPU.
at::Tensor to_gpu(const std::vector<std::vector<uint16_t>>& tables) {
  const at::Tensor all = at::empty({static_cast<int64_t>(tables.size()), static_cast<int64_t>(tables.front().size())}, at::kShort);
  for (size_t i = 0; i < tables.size(); ++i)
    std::copy(tables[i].begin(), tables[i].end(), reinterpret_cast<uint16_t*>(all[static_cast<int64_t>(i)].mutable_data_ptr<int16_t>()));
  return all.to(at::kCUDA);
}

// The channels of group 0, those of group 1, and so on.
std::vector<uint16_t> order_of(const std::vector<uint16_t>& group_of) {
  std::vector<uint16_t> order(group_of.size());
  std::iota(order.begin(), order.end(), uint16_t{0});
  std::stable_sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return group_of[a] < group_of[b]; });
  return order;
}

class RotateCodecCuda final : public PageCodecCuda {
 public:
  RotateCodecCuda(const KvModel& model, const RotateOptions& options, const std::vector<std::vector<uint16_t>>& key_groups)
      : model_(model),
        layout_(rotate_layout(options, model)),
        clip_(options.clip),
        settings_(rotate_settings(layout_, key_groups)),
        key_group_(to_gpu(key_groups)),
        key_matrix_(hadamard_matrix(layout_.group_channels(), at::kFloat).to(at::kCUDA)) {
    std::vector<std::vector<uint16_t>> orders;
    for (const auto& table : key_groups) orders.push_back(order_of(table));
    key_order_ = to_gpu(orders);
    has_decode_ = rotate_decode_known(layout_) && model.n_heads / model.n_kv_heads <= kRotateQueries &&
                  !model.rope.depends_on_length() && fits_here();
    if (!has_decode_) return;
    token_table_ = token_table();
    std::vector<std::vector<uint16_t>> offsets = key_groups;
    for (auto& table : offsets)
      for (uint16_t& group : table) group = rotate_key_offset(group, layout_.n_quant_groups());
    key_offsets_ = to_gpu(offsets);
  }

  int64_t layer_bytes() const override { return (layout_.page_bytes() + 63) / 64 * 64; }
  int64_t codes_bytes_per_token() const override {
    return (layout_.key_codes_bytes() + layout_.value_codes_bytes()) / layout_.page_tokens();
  }
  int64_t scale_bytes_per_token() const override { return 2 * (layout_.scale_bytes() + layout_.zeros_bytes()) / layout_.page_tokens(); }
  std::map<std::string, std::string> saved_settings() const override { return settings_; }

  // Fused projections give rotated keys; where a norm stands between projection and RoPE nothing is fused.
  at::Tensor before_rope(const at::Tensor& k) const override {
    return model_.key_norm ? k : transformed(k.to(at::kFloat), /*inverse=*/true).view(k.sizes());
  }

  at::Tensor packable(int, const at::Tensor& turned, const at::Tensor& cos, const at::Tensor& sin,
                      const at::Tensor&) const override {
    // k = a R k0 with the attention factor a, which cos and sin carry too, so k0 = (a R)^T k / a^2.
    const double factor = model_.rope.attention_factor();
    const at::Tensor c = cos.unsqueeze(1) / (factor * factor);  // [T, 1, head_dim / 2]
    const at::Tensor s = sin.unsqueeze(1) / (factor * factor);
    const int64_t half = model_.head_dim / 2;
    const at::Tensor first = turned.narrow(3, 0, half);
    const at::Tensor second = turned.narrow(3, half, half);
    const at::Tensor plain = at::cat({first * c + second * s, second * c - first * s}, 3);
    return transformed(plain, /*inverse=*/false).view({turned.size(0), turned.size(1), layout_.kv_channels()});
  }

  void store(int first_layer, const at::Tensor& key, const at::Tensor& value, const at::Tensor& pairs, const PagesCuda& pages,
             const at::Tensor& refused) const override {
    RotateStoreBatch p;
    p.layout = layout_;
    p.n_layers = static_cast<int>(key.size(0));
    p.key_group = key_group(first_layer);
    p.key_order = reinterpret_cast<const uint16_t*>(key_order_.const_data_ptr<int16_t>()) + int64_t{first_layer} * layout_.kv_channels();
    p.key_clip = clip_;
    p.value_clip = clip_;
    p.key = key.const_data_ptr<float>();
    p.value = value.const_data_ptr<float>();
    p.row_stride = layout_.kv_channels();
    p.layer_stride = key.size(1) * p.row_stride;
    p.pool = pages.pool + first_layer * layer_bytes();
    p.page_stride = pages.page_stride;
    p.layer_page_stride = layer_bytes();
    p.pairs = reinterpret_cast<const StorePair*>(pairs.const_data_ptr<int32_t>());
    p.n_pairs = static_cast<int>(pairs.size(0));
    p.refused = refused.mutable_data_ptr<int32_t>();
    check_launch(rotate_store_cuda(p, current_stream()), "rotate_store");
  }

  std::pair<at::Tensor, at::Tensor> load(int layer, const PagesCuda& pages, const at::Tensor& table, const at::Tensor& cos,
                                         const at::Tensor& sin, const at::Tensor&, at::ScalarType dtype) const override {
    const int64_t n_tokens = table.size(0) * layout_.page_tokens();
    const at::TensorOptions on_gpu = key_matrix_.options();
    const at::Tensor rotated = at::empty({n_tokens, layout_.kv_channels()}, on_gpu);
    const at::Tensor value = at::empty({model_.n_kv_heads, n_tokens, model_.head_dim}, on_gpu.dtype(dtype));
    RotateLoadBatch p;
    p.layout = layout_;
    p.key_group = key_group(layer);
    p.pool = pages.pool + layer * layer_bytes();
    p.page_stride = pages.page_stride;
    p.table = table.const_data_ptr<int32_t>();
    p.n_pages = static_cast<int>(table.size(0));
    p.key = rotated.mutable_data_ptr<float>();
    p.value = value.mutable_data_ptr();
    p.value_type = element_type(dtype);
    check_launch(rotate_load_cuda(p, current_stream()), "rotate_load");
    const at::Tensor plain = transformed(rotated, /*inverse=*/true).view({n_tokens, model_.n_kv_heads, model_.head_dim});
    return {ops::apply_rope(plain, cos, sin).transpose(0, 1).to(dtype).contiguous(), value};
  }

  bool has_decode() const override { return has_decode_; }
  int unit_tokens() const override { return kRotateUnitTokens; }
  kernels::PagedDecodeGrid decode_grid(const kernels::PagedDecode&) const override {
    kernels::PagedDecodeGrid grid;
    check_launch(rotate_decode_grid(&grid), "rotate_decode_grid");
    return grid;
  }

  void prepare_decode(const kernels::PagedDecodeGrid& grid, int batch, int table_stride) const override {
    workspace(grid, batch);
    page_table(table_stride);
  }

  void decode(int layer, kernels::PagedDecode p, const kernels::PagedDecodeGrid& grid) const override {
    ROTUNDA_ASSERT(has_decode_, "rotate: decode without a kernel");
    p.workspace = static_cast<std::byte*>(workspace(grid, p.batch).mutable_data_ptr());
    p.rotate = {layout_.n_quant_groups(), layout_.zero == ZeroPoint::kMinimum,
                reinterpret_cast<const uint16_t*>(key_offsets_.const_data_ptr<int16_t>()) + int64_t{layer} * layout_.kv_channels(),
                static_cast<const uint4*>(token_table_.const_data_ptr()),
                static_cast<const float2*>(page_table(p.table_stride).const_data_ptr())};
    // Packed keys have no attention factor, so their queries carry it twice. The kernel takes four query heads for each kv head.
    const int64_t heads = int64_t{p.batch} * p.n_kv_heads;
    const int n_q = p.n_q;
    const at::TensorOptions on_gpu = key_matrix_.options();
    at::Tensor exact = at::from_blob(const_cast<float*>(p.q_exact), {heads, n_q, p.head_dim}, on_gpu);
    at::Tensor out = at::from_blob(p.out, {heads, n_q, p.head_dim}, on_gpu.dtype(scalar_type(p.out_type)));
    at::Tensor padded_out = out;
    if (n_q < kRotateQueries) {
      exact = at::constant_pad_nd(exact, {0, 0, 0, kRotateQueries - n_q});
      padded_out = at::empty(exact.sizes(), out.options());
      p.n_q = kRotateQueries;
    }
    const double factor = model_.rope.attention_factor();
    const at::Tensor pages = factor == 1.0 ? exact : exact * factor;
    p.q_exact = exact.const_data_ptr<float>();
    p.q_pages = pages.const_data_ptr<float>();
    p.out = padded_out.mutable_data_ptr();
    check_launch(rotate_decode_cuda(p, grid, current_stream()), "rotate_decode");
    if (n_q < kRotateQueries) out.copy_(padded_out.narrow(1, 0, n_q));
  }

 private:
  const uint16_t* key_group(int layer) const {
    return reinterpret_cast<const uint16_t*>(key_group_.const_data_ptr<int16_t>()) + int64_t{layer} * layout_.kv_channels();
  }

  // One of each for every size that there was, so that recorded graphs find theirs again.
  const at::Tensor& page_table(int n_pages) const {
    at::Tensor& table = page_tables_[n_pages];
    if (!table.defined()) {
      const auto [cos, sin] = turns(at::arange(n_pages, at::kLong) * kPageTokens);
      table = at::stack({cos, sin}, 2).to(at::kCUDA);
    }
    return table;
  }
  const at::Tensor& workspace(const kernels::PagedDecodeGrid& grid, int batch) const {
    at::Tensor& bytes = workspaces_[batch];
    if (!bytes.defined())
      bytes = at::zeros({rotate_decode_workspace_bytes(grid, batch, model_.n_kv_heads)}, key_matrix_.options().dtype(at::kByte));
    return bytes;
  }

  // Whether the GPU has the shared memory that the kernel wants.
  static bool fits_here() {
    return at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin >= static_cast<size_t>(rotate_decode_shared_bytes());
  }

  // Pure cos and sin [T, head_dim / 2] fp32.
  std::pair<at::Tensor, at::Tensor> turns(const at::Tensor& positions) const {
    const auto [cos, sin] = model_.rope.cos_sin(positions, 0);
    return {cos / model_.rope.attention_factor(), sin / model_.rope.attention_factor()};
  }

  // As PagedRotate::token_table.
  at::Tensor token_table() const {
    const auto [cos, sin] = turns(at::arange(kPageTokens, at::kLong));
    const at::Tensor cos16 = cos.to(at::kHalf);
    const at::Tensor sin16 = sin.to(at::kHalf);
    const at::Tensor table = at::empty({kPageTokens, model_.head_dim * 2}, at::kHalf);
    at::Half* const to = table.mutable_data_ptr<at::Half>();
    const int half = model_.head_dim / 2;
    for (int place = 0; place < kPageTokens; ++place) {
      for (int pair = 0; pair < half; ++pair) {
        const int64_t at = rotate_turn_place(place, pair);
        to[at] = cos16.const_data_ptr<at::Half>()[place * half + pair];
        to[at + 2] = sin16.const_data_ptr<at::Half>()[place * half + pair];
      }
    }
    return table.to(at::kCUDA);
  }

  // Rows of group_channels, times W_G or its transpose; fp32.
  at::Tensor transformed(const at::Tensor& keys, bool inverse) const {
    return at::matmul(keys.reshape({-1, layout_.group_channels()}), inverse ? key_matrix_.t() : key_matrix_);
  }

  KvModel model_;
  RotatePageLayout layout_;
  float clip_;
  std::map<std::string, std::string> settings_;
  at::Tensor key_group_, key_order_;  // [n_layers, kv_channels] int16, bits of uint16
  at::Tensor key_matrix_;             // W_G
  bool has_decode_ = false;
  at::Tensor key_offsets_;  // [n_layers, kv_channels] int16: PagedRotate::key_offsets
  at::Tensor token_table_;
  mutable std::map<int, at::Tensor> page_tables_;  // by pages: [pages, head_dim / 2, cos and sin] fp32
  mutable std::map<int, at::Tensor> workspaces_;   // by batch
};

}  // namespace

std::unique_ptr<PageCodecCuda> make_rotate_codec_cuda(const KvModel& model, const RotateOptions& options,
                                                      const std::vector<std::vector<uint16_t>>& key_groups) {
  return std::make_unique<RotateCodecCuda>(model, options, key_groups);
}

}  // namespace rotunda::kv::rotate
