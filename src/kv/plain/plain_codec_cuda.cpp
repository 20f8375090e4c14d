#include "kv/plain/plain_codec_cuda.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include "kernels/attention/plain_decode_cuda.h"
#include "kernels/attention/plain_pages_cuda.h"
#include "kv/plain/plain_cache.h"
#include "ops/launch_cuda.h"

namespace rotunda::kv::plain {

namespace {

using ops::check_launch;
using ops::current_stream;
using ops::element_type;
using ops::scalar_type;

class PlainCodecCuda final : public PageCodecCuda {
 public:
  PlainCodecCuda(const KvModel& model, kernels::ElementType type)
      : layout_(plain_layout(model, type)), rep_(model.n_heads / model.n_kv_heads) {}

  int64_t layer_bytes() const override { return layout_.page_bytes(); }
  int64_t codes_bytes_per_token() const override { return layout_.page_bytes() / layout_.page_tokens(); }
  int64_t scale_bytes_per_token() const override { return 0; }

  at::Tensor within_chunk(const at::Tensor& x) const override { return x.to(scalar_type(layout_.type)); }

  at::Tensor packable(int, const at::Tensor& turned, const at::Tensor&, const at::Tensor&, const at::Tensor&) const override {
    return turned.flatten(2);
  }

  void store(int first_layer, const at::Tensor& key, const at::Tensor& value, const at::Tensor& pairs, const PagesCuda& pages,
             const at::Tensor& refused) const override {
    check_launch(kernels::store_plain_cuda(at_layer(pages, first_layer), key.const_data_ptr<float>(), value.const_data_ptr<float>(), key.size(1),
                                           static_cast<int>(key.size(0)), reinterpret_cast<const kernels::StorePair*>(pairs.const_data_ptr<int32_t>()),
                                           static_cast<int>(pairs.size(0)), refused.mutable_data_ptr<int32_t>(), current_stream()),
                 "store_plain");
  }

  std::pair<at::Tensor, at::Tensor> load(int layer, const PagesCuda& pages, const at::Tensor& table, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, at::ScalarType dtype) const override {
    const int64_t n_pages = table.size(0);
    const at::Tensor key =
        at::empty({layout_.n_kv_heads, n_pages * layout_.page_tokens(), layout_.head_dim}, at::TensorOptions().device(at::kCUDA).dtype(dtype));
    const at::Tensor value = at::empty_like(key);
    check_launch(kernels::load_plain_cuda(at_layer(pages, layer), table.const_data_ptr<int32_t>(), static_cast<int>(n_pages), element_type(dtype),
                                          key.mutable_data_ptr(), value.mutable_data_ptr(), current_stream()),
                 "load_plain");
    return {key, value};
  }

  bool has_decode() const override {
    kernels::PagedDecode shape;
    shape.n_q = rep_;
    shape.head_dim = layout_.head_dim;
    kernels::PagedDecodeGrid grid;
    return kernels::plain_decode_grid(shape, layout_.type, &grid) != cudaErrorInvalidValue;
  }
  int unit_tokens() const override { return kernels::kPlainUnitTokens; }
  kernels::PagedDecodeGrid decode_grid(const kernels::PagedDecode& shape) const override {
    kernels::PagedDecodeGrid grid;
    check_launch(kernels::plain_decode_grid(shape, layout_.type, &grid), "plain_decode_grid");
    return grid;
  }
  void decode(int, kernels::PagedDecode params, const kernels::PagedDecodeGrid& grid) const override {
    params.q_pages = params.q_exact;
    check_launch(kernels::plain_decode_cuda(params, layout_.type, grid, current_stream()), "plain_decode");
  }

 private:
  kernels::PlainPagesCuda at_layer(const PagesCuda& pages, int layer) const {
    return {layout_, pages.pool + layer * layer_bytes(), pages.page_stride, layer_bytes()};
  }

  kernels::PlainPageLayout layout_;
  int rep_;
};

}  // namespace

std::unique_ptr<PageCodecCuda> make_plain_codec_cuda(const KvModel& model, kernels::ElementType type) {
  return std::make_unique<PlainCodecCuda>(model, type);
}

}  // namespace rotunda::kv::plain
