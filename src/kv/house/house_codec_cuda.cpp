#include "kv/house/house_codec_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kv/head_rotation.h"
#include "kv/house/house_tables.h"
#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_load_cuda.h"
#include "kv/house/kernels/house_store_cuda.h"
#include "ops/launch_cuda.h"

namespace rotunda::kv::house {

namespace {

using ops::check_launch;
using ops::current_stream;
using ops::on_gpu;

constexpr int kShiftStep = 8;  // pairs that the decode kernel takes at once


// Which pairs of a layer are shifted, as PagedShift and ShiftQueries have them.
struct ShiftedPairs {
  int n_steps = 0;
  at::Tensor pairs;    // [n_kv_heads, 8 n_steps] int16
  at::Tensor n_pairs;  // [n_kv_heads] int32
  at::Tensor turns;    // [n_kv_heads, n_steps, page_tokens / 16, 2, 32, 8] fp16: PagedShift::turns
};

ShiftedPairs shifted_pairs(const LayerTables& tables) {
  ShiftedPairs made;
  size_t most = 0;
  for (const auto& pairs : tables.pairs) most = std::max(most, pairs.size());
  made.n_steps = static_cast<int>((most + kShiftStep - 1) / kShiftStep);
  if (made.n_steps == 0) return made;
  const auto heads = static_cast<int64_t>(tables.pairs.size());
  const at::Tensor all = at::zeros({heads, int64_t{made.n_steps} * kShiftStep}, at::kShort);
  const at::Tensor counts = at::empty({heads}, at::kInt);
  for (int64_t head = 0; head < heads; ++head) {
    const auto& pairs = tables.pairs[head];
    std::copy(pairs.begin(), pairs.end(), all.mutable_data_ptr<int16_t>() + head * all.size(1));
    counts.mutable_data_ptr<int32_t>()[head] = static_cast<int32_t>(pairs.size());
  }
  made.pairs = all.to(at::kCUDA);
  made.n_pairs = counts.to(at::kCUDA);
  return made;
}

class HouseCodecCuda final : public PageCodecCuda {
 public:
  HouseCodecCuda(const KvModel& model, const HouseOptions& options, const ops::TensorBundle& setup)
      : layout_(house_layout(options, model)), scale_(options.scale), n_q_(model.n_heads / model.n_kv_heads) {
    const std::vector<LayerTables> tables = house_tables(model, options, setup);
    settings_ = codes_settings(layout_, tables);
    hadamard_ = hadamard_matrix(model.head_dim, at::kFloat).to(at::kCUDA);
    std::vector<at::Tensor> feedback, shift;
    for (const LayerTables& of_layer : tables) {
      if (of_layer.feedback.defined()) feedback.push_back(of_layer.feedback);
      shift.push_back(of_layer.shift);
      pairs_.push_back(shifted_pairs(of_layer));
    }
    if (!feedback.empty()) feedback_ = at::stack(feedback).to(at::kCUDA);
    shift_ = at::stack(shift).to(at::kCUDA);
    if (std::any_of(pairs_.begin(), pairs_.end(), [](const ShiftedPairs& pairs) { return pairs.n_steps > 0; })) make_turns(model);
  }

  int64_t layer_bytes() const override { return layout_.page_bytes(); }
  int64_t codes_bytes_per_token() const override {
    return layout_.n_kv_heads * (layout_.key_codes_bytes() + layout_.value_codes_bytes()) / layout_.page_tokens();
  }
  int64_t scale_bytes_per_token() const override { return layout_.n_kv_heads * 2 * layout_.scale_bytes() / layout_.page_tokens(); }
  std::map<std::string, std::string> saved_settings() const override { return settings_; }

  at::Tensor packable(int first_layer, const at::Tensor& turned, const at::Tensor&, const at::Tensor&,
                      const at::Tensor& positions) const override {
    if (!shifts(first_layer, turned.size(0))) return at::matmul(turned, hadamard_).flatten(2);
    const at::Tensor shifted = turned.clone();
    add_shift(first_layer, shifted, positions, -1);
    return at::matmul(shifted, hadamard_).flatten(2);
  }

  void store(int first_layer, const at::Tensor& key, const at::Tensor& value, const at::Tensor& pairs, const PagesCuda& pages,
             const at::Tensor& refused) const override {
    HouseStoreBatch batch;
    batch.layout = layout_;
    batch.scale = scale_;
    if (feedback_.defined()) batch.feedback = feedback_[first_layer].const_data_ptr<float>();
    batch.key = key.const_data_ptr<float>();
    batch.value = value.const_data_ptr<float>();
    batch.row_stride = key.size(2);
    batch.layer_stride = key.size(1) * key.size(2);
    batch.pool = pages.pool + first_layer * layer_bytes();
    batch.page_bytes = pages.page_stride;
    batch.layer_bytes = layer_bytes();
    batch.pairs = reinterpret_cast<const StorePair*>(pairs.const_data_ptr<int32_t>());
    batch.n_pairs = static_cast<int>(pairs.size(0));
    batch.n_rows = static_cast<int>(key.size(1));
    batch.n_layers = static_cast<int>(key.size(0));
    batch.refused = refused.mutable_data_ptr<int32_t>();
    check_launch(house_store_cuda(batch, current_stream()), "house_store");
  }

  std::pair<at::Tensor, at::Tensor> load(int layer, const PagesCuda& pages, const at::Tensor& table, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor& positions, at::ScalarType dtype) const override {
    const at::Tensor codes = at::empty({layout_.n_kv_heads, table.size(0) * layout_.page_tokens(), layout_.head_dim}, on_gpu(at::kFloat));
    const at::Tensor value = at::empty_like(codes);
    check_launch(house_load_cuda({layout_, pages.pool + layer * layer_bytes(), pages.page_stride, table.const_data_ptr<int32_t>(),
                                  static_cast<int>(table.size(0)), kernels::ElementType::kFp32, codes.mutable_data_ptr<float>(),
                                  value.mutable_data_ptr<float>()},
                                 current_stream()),
                 "house_load");
    const at::Tensor key = at::matmul(codes, hadamard_.t());
    add_shift(layer, key.transpose(0, 1).unsqueeze(0), positions, 1);
    return {key.to(dtype), value.to(dtype)};
  }

  bool has_decode() const override {
    kernels::PagedDecode shape;
    shape.n_q = n_q_;
    shape.head_dim = layout_.head_dim;
    kernels::PagedDecodeGrid grid;
    return house_decode_grid(shape, layout_.key_bits, layout_.value_bits, &grid) != cudaErrorInvalidValue;
  }
  int unit_tokens() const override { return kHouseUnitTokens; }
  kernels::PagedDecodeGrid decode_grid(const kernels::PagedDecode& shape) const override {
    kernels::PagedDecodeGrid grid;
    check_launch(house_decode_grid(shape, layout_.key_bits, layout_.value_bits, &grid), "house_decode_grid");
    return grid;
  }

  bool rotates_queries() const override { return true; }

  void decode(int layer, kernels::PagedDecode params, const kernels::PagedDecodeGrid& grid) const override {
    const ShiftedPairs& shifted = pairs_[layer];
    at::Tensor operands, norm;
    if (shifted.n_steps > 0) {
      ROTUNDA_CHECK(params.table_stride <= page_turns_.size(0), "rotunda on cuda: room for ", params.table_stride * layout_.page_tokens(),
                    " tokens in a sequence, expected at most ", kMaxShiftedPositions, " where keys are shifted (shift=none has no limit)");
      const int64_t heads = int64_t{params.batch} * params.n_kv_heads;
      const int sets = params.n_q <= 4 ? 1 : 2;
      operands = at::empty({heads * params.table_stride * shifted.n_steps * sets, 32, 2}, on_gpu(at::kInt));
      norm = at::empty({heads * params.n_q}, on_gpu(at::kFloat));
      ShiftQueries queries;
      queries.batch = params.batch;
      queries.n_kv_heads = params.n_kv_heads;
      queries.n_q = params.n_q;
      queries.head_dim = params.head_dim;
      queries.q = params.q_exact;
      queries.n_steps = shifted.n_steps;
      queries.shift = shift_[layer].const_data_ptr<float>();
      queries.pairs = reinterpret_cast<const uint16_t*>(shifted.pairs.const_data_ptr<int16_t>());
      queries.n_pairs = shifted.n_pairs.const_data_ptr<int32_t>();
      queries.page_table = reinterpret_cast<const float2*>(page_turns_.const_data_ptr<float>());
      queries.stored_len = params.stored_len;
      queries.first_token = params.first_token;
      queries.pages = params.table_stride;
      queries.queries = reinterpret_cast<uint2*>(operands.mutable_data_ptr<int32_t>());
      queries.norm = norm.mutable_data_ptr<float>();
      check_launch(shift_query_cuda(queries, current_stream()), "shift_query");
      params.shift = {shifted.n_steps, static_cast<const uint4*>(shifted.turns.const_data_ptr()), queries.queries, queries.pages, queries.norm};
    }
    check_launch(house_decode_cuda(params, layout_.key_bits, layout_.value_bits, grid, current_stream()), "house_decode");
  }

 private:
  // The tables of a shift. Frequencies are those of a short sequence also under `dynamic` RoPE, as in the cache on the CPU.
  void make_turns(const KvModel& model) {
    const std::vector<double> inv_freq = model.rope.inv_freq(0);
    inv_freq_ = at::tensor(inv_freq, at::kDouble).to(at::kCUDA);
    const at::Tensor pages = at::arange(kMaxShiftedPositions / layout_.page_tokens(), on_gpu(at::kDouble)) * layout_.page_tokens();
    page_turns_ = at::stack(turns(pages), 2).contiguous();
    const at::Tensor tokens =
        at::stack(turns(at::arange(layout_.page_tokens(), on_gpu(at::kDouble))), 2).transpose(0, 1);  // [d / 2, tokens, 2]
    for (ShiftedPairs& of_layer : pairs_)
      if (of_layer.n_steps > 0) of_layer.turns = shift_operands(tokens.index_select(0, of_layer.pairs.flatten().to(at::kLong)), of_layer.n_steps);
  }

  // cos and sin at positions [T]: [T, d / 2] fp32 each, no attention factor, which the shift has in it.
  std::vector<at::Tensor> turns(const at::Tensor& positions) const {
    const at::Tensor angles = positions.to(at::kDouble).unsqueeze(1) * inv_freq_;
    return {angles.cos().to(at::kFloat), angles.sin().to(at::kFloat)};
  }

  bool shifts(int first_layer, int64_t n_layers) const {
    const auto first = pairs_.begin() + first_layer;
    return std::any_of(first, first + n_layers, [](const ShiftedPairs& pairs) { return pairs.n_steps > 0; });
  }

  // keys += factor mu R_n, in place. @param keys [N, T, n_kv_heads, d] fp32
  void add_shift(int first_layer, const at::Tensor& keys, const at::Tensor& positions, double factor) const {
    if (!shifts(first_layer, keys.size(0))) return;
    const std::vector<at::Tensor> turn = turns(positions);
    const at::Tensor cos = turn[0].unsqueeze(1), sin = turn[1].unsqueeze(1);  // [T, 1, d / 2]
    const int64_t half = layout_.head_dim / 2;
    const at::Tensor shift = shift_.narrow(0, first_layer, keys.size(0)).unsqueeze(1);  // [N, 1, n_kv_heads, d]
    const at::Tensor low = shift.narrow(3, 0, half), high = shift.narrow(3, half, half);
    keys.narrow(3, 0, half).addcmul_(low, cos, factor).addcmul_(high, sin, -factor);
    keys.narrow(3, half, half).addcmul_(high, cos, factor).addcmul_(low, sin, factor);
  }

  HousePageLayout layout_;
  ScaleRule scale_;
  int n_q_;
  std::map<std::string, std::string> settings_;
  std::vector<ShiftedPairs> pairs_;  // [layer]
  at::Tensor hadamard_;              // [d, d]
  at::Tensor feedback_;              // [n_layers, n_kv_heads, d, d], or undefined
  at::Tensor shift_;                 // [n_layers, n_kv_heads, d], attention factor in
  // Undefined where no layer has a shift:
  at::Tensor inv_freq_;     // [d / 2] fp64
  at::Tensor page_turns_;   // [pages, d / 2, 2] fp32 cos and sin of each page's first position
};

}  // namespace

at::Tensor shift_operands(const at::Tensor& turns, int64_t n_steps) {
  const at::Tensor number = turns.to(at::kHalf);
  const at::Tensor both = at::stack({number, (turns - number.to(at::kFloat)).to(at::kHalf)});
  // Register 2 i + r of lane 4 g + t is pair 4 i + t at token 32 tile + 4 g + 2 k + r.
  //                                      number or rest, head, step, i, t, tile, g, k, r, cos and sin
  return both.view({2, -1, n_steps, 2, 4, 4, 8, 2, 2, 2}).permute({1, 2, 5, 7, 0, 6, 4, 3, 8, 9}).reshape({-1, n_steps, 8, 2, 32, 8});
}

std::unique_ptr<PageCodecCuda> make_house_codec_cuda(const KvModel& model, const HouseOptions& options, const ops::TensorBundle& setup) {
  return std::make_unique<HouseCodecCuda>(model, options, setup);
}

}  // namespace rotunda::kv::house
