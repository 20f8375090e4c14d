#include "kv/kivi/kivi_cache.h"

#include "base/check.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::kivi {

namespace {

class KiviCache final : public WindowedCache {
 public:
  KiviCache(const KvSpec& spec, const KvModel& model, const ExactOptions& exact, ZeroPoint zero,
            const KiviPageLayout& layout)
      : WindowedCache(spec, model, exact, layout.page_bytes(),
                      2 * model.n_kv_heads * layout.codes_bytes() / layout.page_tokens(),
                      4 * model.n_kv_heads * layout.scale_bytes() / layout.page_tokens()),
        zero_(zero),
        layout_(layout) {}

 private:
  // Keys are packed as they are after RoPE.
  void make_packable(int, const Chunk&, int64_t, int64_t, float*) const override {}

  bool store(int, std::byte* page, int block, int first, int n_tokens, const float* key,
             const float* value) const override {
    ROTUNDA_ASSERT(block * kTokenBlock % kGroup == 0 && first == 0 && n_tokens == kGroup);
    return kivi_store({&layout_, zero_, key, value, channels(), block * kTokenBlock / kGroup, page});
  }

  StoredTokens stored_tokens(int layer, const Chunk& chunk) const override {
    return {model().n_kv_heads, model().head_dim,
            [this, layer, &chunk](int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride) {
              for (int head = 0; head < model().n_kv_heads; ++head)
                kivi_load({&layout_, layer_page(chunk, layer, block / kBlocksPerPage), head,
                           static_cast<int>(block % kBlocksPerPage), key + int64_t{head} * model().head_dim * stride,
                           stride, value + head * value_head_stride});
            }};
  }

  int kv_heads_per_group() const override { return 1; }

  PageAttention page_attention(int, const Chunk&, const float* q) const override {
    return [this, q](int group, int64_t, const kernels::PageRun& run, const kernels::SoftmaxState& state) {
      kivi_decode({&layout_, run, group, rep(), q + int64_t{group} * rep() * model().head_dim, state});
    };
  }

  ZeroPoint zero_;
  KiviPageLayout layout_;
};

}  // namespace

std::unique_ptr<KvCache> make_kivi_cache(const KvSpec& spec, const KvModel& model, const ExactOptions& exact,
                                         ZeroPoint zero, const KiviPageLayout& layout) {
  return std::make_unique<KiviCache>(spec, model, exact, zero, layout);
}

}  // namespace rotunda::kv::kivi
