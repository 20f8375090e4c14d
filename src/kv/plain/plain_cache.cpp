#include "kv/plain/plain_cache.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "kv/paged_cache.h"
#include "kv/stored_attention.h"

namespace rotunda::kv::plain {

namespace {

using kernels::kTokenBlock;

at::ScalarType scalar_type(kernels::ElementType type) {
  switch (type) {
    case kernels::ElementType::kFp32: return at::kFloat;
    case kernels::ElementType::kBf16: return at::kBFloat16;
    case kernels::ElementType::kFp16: return at::kHalf;
  }
  ROTUNDA_ASSERT(false);
}

class PlainCache final : public PagedCache {
 public:
  PlainCache(const KvSpec& spec, const KvModel& model, kernels::ElementType type)
      : PagedCache(spec, model, plain_layout(model, type).page_bytes(),
                   2 * model.kv_channels() * kernels::element_bytes(type), /*scale_bytes_per_token=*/0),
        layout_(plain_layout(model, type)) {}

 private:
  int64_t stored_len_after(const Sequence&, int64_t kv_len) const override { return kv_len; }

  at::Tensor attend_layer(int layer, const Step& step, const AttendInput& in) override {
    const at::Tensor q = ops::apply_rope(in.q, step.cos, step.sin);
    const at::Tensor k = ops::apply_rope(in.k, step.cos, step.sin).to(at::kFloat).contiguous();
    const at::Tensor v = in.v.to(at::kFloat).contiguous();
    const at::Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
    std::vector<const Chunk*> decode;
    for (const Chunk& chunk : step.chunks) {
      store(layer, chunk, k, v);
      if (chunk.n_tokens == 1) {
        decode.push_back(&chunk);
      } else {
        out.narrow(0, chunk.row, chunk.n_tokens).copy_(prefill(layer, chunk, q, k, v));
      }
    }
    if (!decode.empty()) attend_decode(layer, decode, q, out);
    return out;
  }

  void store(int layer, const Chunk& chunk, const at::Tensor& k, const at::Tensor& v) {
    const int64_t channels = model().kv_channels();
    for (int64_t position = chunk.first; position < chunk.kv_len;) {
      const int64_t in_page = position % kPageTokens;
      const int64_t n = std::min<int64_t>(kPageTokens - in_page, chunk.kv_len - position);
      const int64_t row = chunk.row + position - chunk.first;
      const bool finite = kernels::store_plain(layout_, k.data_ptr<float>() + row * channels, v.data_ptr<float>() + row * channels, channels,
                                               in_page, n, layer_page(chunk, layer, position / kPageTokens));
      ROTUNDA_CHECK(finite, spec().format, ": a key or value of layer ", model().layer_id(layer), ", sequence ", chunk.seq, ", tokens ",
                    position, " to ", position + n - 1, " is NaN, infinite or beyond the format's range");
      position += n;
    }
  }

  // Past tokens tile by tile; the chunk itself through LibTorch on elements rounded as the cache rounds them.
  at::Tensor prefill(int layer, const Chunk& chunk, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    const at::ScalarType stored = scalar_type(layout_.type);
    const at::Tensor chunk_q = q.narrow(0, chunk.row, chunk.n_tokens);
    // Where the model computes in the cache's own dtype, LibTorch does too; else in fp32 on rounded elements.
    const at::ScalarType compute = model().dtype == stored ? stored : at::kFloat;
    const auto rounded = [&](const at::Tensor& x) { return x.narrow(0, chunk.row, chunk.n_tokens).to(stored).to(compute); };
    auto [chunk_out, lse] = ops::chunk_attention(chunk_q.to(compute), rounded(k), rounded(v), model().softmax_scale, model().sliding_window);
    if (chunk.first > 0) {
      const int64_t rep = model().n_heads / model().n_kv_heads;
      ops::TileAttention attention(ops::stack_query_heads(chunk_q.to(at::kFloat) * model().softmax_scale, model().n_kv_heads));
      attention.add_finished(chunk_out, lse);
      const StoredTokens tokens{model().n_kv_heads, model().head_dim,
                                [&](int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride) {
                                  const std::byte* page = layer_page(chunk, layer, block / kBlocksPerPage);
                                  for (int head = 0; head < model().n_kv_heads; ++head)
                                    kernels::load_plain(layout_, page, head, static_cast<int>(block % kBlocksPerPage),
                                                        key + head * model().head_dim * stride, stride, value + head * value_head_stride);
                                }};
      add_stored(attention, tokens, 0, chunk.first, {}, chunk.first, chunk.n_tokens, rep, {model().sliding_window, 0});
      chunk_out = attention.finish();
    }
    return ops::unstack_query_heads(chunk_out, chunk.n_tokens).to(model().dtype);
  }

  void attend_decode(int layer, const std::vector<const Chunk*>& chunks, const at::Tensor& q, const at::Tensor& out) const {
    const int rep = model().n_heads / model().n_kv_heads;
    const int head_dim = model().head_dim;
    const int64_t row_floats = int64_t{model().n_heads} * head_dim;
    const at::Tensor scaled = (q.to(at::kFloat) * model().softmax_scale).contiguous();
    const bool direct = out.scalar_type() == at::kFloat;
    const at::Tensor result = direct ? out : at::empty(out.sizes(), at::kFloat);
    std::vector<std::vector<const std::byte*>> pages(chunks.size());
    std::vector<std::vector<uint16_t>> masks(chunks.size());
    std::vector<SplitDecode::Item> items;
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Chunk& chunk = *chunks[i];
      for (const Page* page : chunk.sequence->pages) pages[i].push_back(layer_page(page, layer));
      const int64_t n_pages = static_cast<int64_t>(pages[i].size());
      const int64_t oldest = model().sliding_window == 0 ? 0 : std::max<int64_t>(0, chunk.kv_len - model().sliding_window);
      masks[i] = block_masks(n_pages * kBlocksPerPage, oldest, chunk.kv_len);
      const float* q_row = scaled.data_ptr<float>() + chunk.row * row_floats;
      items.push_back({n_pages,
                       [this, i, q_row, rep, head_dim, &pages, &masks](int group, int64_t begin, int64_t end, const kernels::SoftmaxState& state) {
                         kernels::decode_plain({layout_,
                                                {pages[i].data() + begin, masks[i].data() + begin * kBlocksPerPage, static_cast<int>(end - begin)},
                                                group, rep, q_row + int64_t{group} * rep * head_dim, state});
                       },
                       {},
                       result.data_ptr<float>() + chunk.row * row_floats});
    }
    SplitDecode{model().n_kv_heads, rep, head_dim, int64_t{2} * kPageTokens * head_dim}.run(items);
    if (!direct)
      for (const Chunk* chunk : chunks) out.select(0, chunk->row).copy_(result.select(0, chunk->row));
  }

  kernels::PlainPageLayout layout_;
};

}  // namespace

kernels::PlainPageLayout plain_layout(const KvModel& model, kernels::ElementType type) {
  return {type, model.n_kv_heads, model.head_dim, kBlocksPerPage};
}

std::unique_ptr<KvCache> make_plain_cache(const KvSpec& spec, const KvModel& model, kernels::ElementType type) {
  return std::make_unique<PlainCache>(spec, model, type);
}

}  // namespace rotunda::kv::plain
