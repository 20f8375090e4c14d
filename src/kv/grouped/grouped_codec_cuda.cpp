#include "kv/grouped/grouped_codec_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include "base/check.h"
#include "kv/grouped/grouped_bases.h"
#include "kv/grouped/kernels/fp8_decode_cuda.h"
#include "kv/grouped/kernels/grouped_pages_cuda.h"
#include "ops/launch_cuda.h"

namespace rotunda::kv::grouped {

namespace {

using ops::check_launch;
using ops::current_stream;
using ops::element_type;
using ops::on_gpu;

class GroupedCodecCuda final : public PageCodecCuda {
 public:
  GroupedCodecCuda(const KvModel& model, const GroupedOptions& options, const GroupedPageLayout& layout, const std::vector<HeadBasis>& key_bases)
      : layer_{layout, options.key_codec, options.value_codec},
        n_q_(model.n_heads / model.n_kv_heads),
        settings_(codes_settings(layout, options.value_kind->name, key_bases)) {
    std::vector<at::Tensor> matrices;
    for (const HeadBasis& basis : key_bases)
      if (const at::Tensor matrix = basis.matrix(); matrix.defined()) matrices.push_back(matrix);
    if (matrices.empty()) return;
    ROTUNDA_ASSERT(matrices.size() == key_bases.size(), "bases of ", matrices.size(), " layers, expected all ", key_bases.size());
    bases_ = at::stack(matrices).to(at::kCUDA);
  }

  int64_t layer_bytes() const override { return layer_.layout.page_bytes(); }
  int64_t codes_bytes_per_token() const override { return layer_.layout.codes_bytes_per_token(); }
  int64_t scale_bytes_per_token() const override { return layer_.layout.scale_bytes_per_token(); }
  std::map<std::string, std::string> saved_settings() const override { return settings_; }

  at::Tensor packable(int first_layer, const at::Tensor& turned, const at::Tensor&, const at::Tensor&, const at::Tensor&) const override {
    if (!bases_.defined()) return turned.flatten(2);
    const at::Tensor basis = bases_.narrow(0, first_layer, turned.size(0));  // [N, n_kv_heads or 1, d, d]
    return at::matmul(turned.transpose(1, 2), basis).transpose(1, 2).flatten(2).contiguous();
  }

  void store(int first_layer, const at::Tensor& key, const at::Tensor& value, const at::Tensor& pairs, const PagesCuda& pages,
             const at::Tensor& refused) const override {
    GroupedStoreBatch batch;
    batch.layer = layer_;
    batch.key = key.const_data_ptr<float>();
    batch.value = value.const_data_ptr<float>();
    batch.row_stride = key.size(2);
    batch.layer_stride = key.size(1) * key.size(2);
    batch.pool = pages.pool + first_layer * layer_bytes();
    batch.page_bytes = pages.page_stride;
    batch.layer_bytes = layer_bytes();
    batch.pairs = reinterpret_cast<const StorePair*>(pairs.const_data_ptr<int32_t>());
    batch.n_pairs = static_cast<int>(pairs.size(0));
    batch.n_layers = static_cast<int>(key.size(0));
    batch.refused = refused.mutable_data_ptr<int32_t>();
    check_launch(grouped_store_cuda(batch, current_stream()), "grouped_store");
  }

  std::pair<at::Tensor, at::Tensor> load(int layer, const PagesCuda& pages, const at::Tensor& table, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, at::ScalarType dtype) const override {
    const GroupedPageLayout& l = layer_.layout;
    // Another basis is undone before anything is rounded.
    const at::ScalarType loaded = bases_.defined() ? at::kFloat : dtype;
    const at::Tensor key = at::empty({l.n_kv_heads, table.size(0) * l.page_tokens(), l.head_dim}, on_gpu(loaded));
    const at::Tensor value = at::empty_like(key);
    check_launch(grouped_load_cuda({layer_, pages.pool + layer * layer_bytes(), pages.page_stride, table.const_data_ptr<int32_t>(),
                                    static_cast<int>(table.size(0)), element_type(loaded), key.mutable_data_ptr(), value.mutable_data_ptr()},
                                   current_stream()),
                 "grouped_load");
    if (!bases_.defined()) return {key, value};
    return {at::matmul(key, bases_[layer].transpose(1, 2)).to(dtype), value.to(dtype)};
  }

  bool has_decode() const override {
    const GroupedPageLayout& l = layer_.layout;
    const auto is_fp8 = [&](const GroupedSide& side, const GroupedCodec& codec) {
      return codec.levels == Levels::kE4m3 && side.group == l.head_dim && side.scale == ScaleType::kFp16;
    };
    if (!is_fp8(l.key, layer_.key) || !is_fp8(l.value, layer_.value) || bases_.defined()) return false;
    kernels::PagedDecode shape;
    shape.n_q = n_q_;
    shape.head_dim = l.head_dim;
    kernels::PagedDecodeGrid grid;
    return fp8_decode_grid(shape, &grid) != cudaErrorInvalidValue;
  }
  int unit_tokens() const override { return kFp8UnitTokens; }
  kernels::PagedDecodeGrid decode_grid(const kernels::PagedDecode& shape) const override {
    kernels::PagedDecodeGrid grid;
    check_launch(fp8_decode_grid(shape, &grid), "fp8_decode_grid");
    return grid;
  }
  void decode(int, kernels::PagedDecode params, const kernels::PagedDecodeGrid& grid) const override {
    params.q_pages = params.q_exact;
    check_launch(fp8_decode_cuda(params, grid, current_stream()), "fp8_decode");
  }

 private:
  GroupedLayer layer_;
  int n_q_;
  std::map<std::string, std::string> settings_;
  at::Tensor bases_;  // [n_layers, n_kv_heads or 1, d, d] fp32 on the GPU, or undefined
};

}  // namespace

std::unique_ptr<PageCodecCuda> make_grouped_codec_cuda(const KvModel& model, const GroupedOptions& options, const GroupedPageLayout& layout,
                                                       const std::vector<HeadBasis>& key_bases) {
  return std::make_unique<GroupedCodecCuda>(model, options, layout, key_bases);
}

}  // namespace rotunda::kv::grouped
