#include "kv/grouped/grouped_cache.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "kernels/scratch.h"
#include "kv/grouped/grouped_bases.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::grouped {

namespace {

class GroupedCache final : public WindowedCache {
 public:
  GroupedCache(const KvSpec& spec, const KvModel& model, const GroupedOptions& options, const GroupedPageLayout& layout,
               std::vector<HeadBasis> key_bases)
      : WindowedCache(spec, model, options.exact, layout.page_bytes(), layout.codes_bytes_per_token(),
                      layout.scale_bytes_per_token()),
        layer_{layout, options.key_codec, options.value_codec},
        values_(options.value_kind->name),
        bases_(std::move(key_bases)) {}

 private:
  void make_packable(int layer, const Chunk&, int64_t, int64_t n_tokens, float* keys) const override {
    for (int head = 0; head < model().n_kv_heads; ++head)
      bases_[layer].apply(head, keys + int64_t{head} * model().head_dim, n_tokens, channels());
  }

  bool store(int, std::byte* page, int block, int first, int n_tokens, const float* key,
             const float* value) const override {
    return grouped_store({&layer_, key, value, channels(), block, first, n_tokens, page});
  }

  StoredTokens stored_tokens(int layer, const Chunk& chunk) const override {
    return {model().n_kv_heads, model().head_dim,
            [this, layer, &chunk](int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride) {
              static thread_local kernels::Scratch scratch;
              const int d = model().head_dim;
              float* const lanes = scratch.floats(static_cast<size_t>(d) * kernels::kTokenBlock);
              for (int head = 0; head < model().n_kv_heads; ++head) {
                grouped_load({&layer_, layer_page(chunk, layer, block / kBlocksPerPage), head,
                              static_cast<int>(block % kBlocksPerPage), lanes, value + head * value_head_stride});
                bases_[layer].undo_lanes(head, lanes);
                for (int c = 0; c < d; ++c)
                  std::copy_n(lanes + c * kernels::kTokenBlock, kernels::kTokenBlock,
                              key + (int64_t{head} * d + c) * stride);
              }
            }};
  }

  int kv_heads_per_group() const override { return 1; }

  PageAttention page_attention(int layer, const Chunk&, const float* q) const override {
    const int64_t d = model().head_dim;
    std::vector<float> turned(q, q + model().n_heads * d);
    for (int head = 0; head < model().n_kv_heads; ++head)
      bases_[layer].apply(head, turned.data() + head * rep() * d, rep(), d);
    return [this, d, turned = std::move(turned)](int group, int64_t, const kernels::PageRun& run,
                                                 const kernels::SoftmaxState& state) {
      grouped_decode({&layer_, run, group, rep(), turned.data() + group * rep() * d, state});
    };
  }

  std::map<std::string, std::string> saved_settings() const override {
    auto settings = WindowedCache::saved_settings();
    settings.merge(codes_settings(layer_.layout, values_, bases_));
    return settings;
  }

  GroupedLayer layer_;
  std::string values_;             // name of their kind
  std::vector<HeadBasis> bases_;  // [layer]
};

}  // namespace

std::unique_ptr<KvCache> make_grouped_cache(const KvSpec& spec, const KvModel& model, const GroupedOptions& options,
                                            const GroupedPageLayout& layout, std::vector<HeadBasis> key_bases) {
  return std::make_unique<GroupedCache>(spec, model, options, layout, std::move(key_bases));
}

}  // namespace rotunda::kv::grouped
