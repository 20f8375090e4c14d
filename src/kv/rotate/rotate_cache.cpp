#include "kv/rotate/rotate_cache.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/hadamard/hadamard.h"
#include "kv/rope_tables.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::rotate {

namespace {

// Keys are packed before RoPE, rotated over a group of heads; groups of decode are these rotation groups.
class RotateCache final : public WindowedCache {
 public:
  RotateCache(const KvSpec& spec, const KvModel& model, const RotateOptions& options, const RotatePageLayout& layout,
              std::vector<std::vector<uint16_t>> key_groups)
      : WindowedCache(spec, model, options.exact, layout.page_bytes(),
                      (layout.key_codes_bytes() + layout.value_codes_bytes()) / layout.page_tokens(),
                      2 * (layout.scale_bytes() + layout.zeros_bytes()) / layout.page_tokens()),
        key_groups_(std::move(key_groups)),
        tables_(model.rope, kPageTokens) {
    const kernels::HadamardPlan plan = kernels::hadamard_plan(layout.group_channels());
    for (int layer = 0; layer < model.n_layers; ++layer)
      layers_.push_back({layout, key_groups_[layer].data(), options.clip, options.clip, plan});
  }

 private:
  void on_begin_step(const Step& step) override {
    leaving_.clear();
    std::vector<int64_t> rope_lens;
    for (const Chunk& chunk : step.chunks) {
      tables_.prepare(chunk.rope_len, (chunk.kv_len + kPageTokens - 1) / kPageTokens);
      rope_lens.push_back(chunk.rope_len);
      leaving_.emplace(chunk.seq, leaving_angles(chunk));
    }
    tables_.keep_only(rope_lens);
  }

  std::map<std::string, std::string> saved_settings() const override {
    auto settings = WindowedCache::saved_settings();
    settings.merge(rotate_settings(layers_.front().layout, key_groups_));
    return settings;
  }

  // ---- keys --------------------------------------------------------------------------------------------------------

  NewKeys new_keys(const Step& step, const at::Tensor& k) const override {
    const auto [rotated, plain] = both_bases(k);
    return {ops::apply_rope(plain.view({step.n_tokens, model().n_kv_heads, model().head_dim}), step.cos, step.sin)
                .contiguous(),
            rotated};
  }

  // Keys as [T, channels] fp32, rotated (k W_G) and plain. One of the two comes from the projection, fused or not; the
  // other costs one transform: the exact parts attend on plain keys, codes are of rotated ones.
  std::pair<at::Tensor, at::Tensor> both_bases(const at::Tensor& k) const {
    const at::Tensor given = k.to(at::kFloat).contiguous().view({k.size(0), channels()});
    const at::Tensor other = given.clone();
    const bool given_rotated = !model().key_norm;
    const kernels::HadamardPlan& plan = layers_.front().key_hadamard;
    const int64_t n_rows = other.numel() / plan.n;
    float* data = other.data_ptr<float>();
    at::parallel_for(0, n_rows, std::max<int64_t>(1, (int64_t{1} << 15) / plan.n), [&](int64_t begin, int64_t end) {
      kernels::hadamard_rows(plan, /*inverse=*/given_rotated, data + begin * plan.n, end - begin, plan.n);
    });
    return given_rotated ? std::pair{given, other} : std::pair{other, given};
  }

  // The angles that window tokens which go to pages in this step were turned by.
  struct Leaving {
    int64_t first = 0;
    std::vector<float> cos, sin;  // [tokens][head_dim / 2], divided by the attention factor
  };

  Leaving leaving_angles(const Chunk& chunk) {
    const TokenRange range = leaving_window(chunk);
    const int half = model().head_dim / 2;
    Leaving leaving;
    leaving.first = range.first;
    for (int64_t position = range.first; position < range.end; ++position) {
      const std::vector<double>& inv_freq = tables_.prepare(rope_len_in_window(chunk, position), 0).inv_freq();
      for (int pair = 0; pair < half; ++pair) {
        const double angle = static_cast<double>(position) * inv_freq[pair];
        // k = a R k0 with the attention factor a, so k0 = R^T k / a.
        leaving.cos.push_back(static_cast<float>(std::cos(angle) / model().rope.attention_factor()));
        leaving.sin.push_back(static_cast<float>(std::sin(angle) / model().rope.attention_factor()));
      }
    }
    return leaving;
  }

  // Only tokens that leave the window come here: turned back, then rotated.
  void make_packable(int, const Chunk& chunk, int64_t first, int64_t n_tokens, float* keys) const override {
    const Leaving& leaving = leaving_.at(chunk.seq);
    const int half = model().head_dim / 2;
    for (int64_t i = 0; i < n_tokens; ++i) {
      const float* cos = leaving.cos.data() + (first - leaving.first + i) * half;
      const float* sin = leaving.sin.data() + (first - leaving.first + i) * half;
      for (int head = 0; head < model().n_kv_heads; ++head) {
        float* low = keys + i * channels() + head * model().head_dim;
        float* high = low + half;
        for (int pair = 0; pair < half; ++pair) {
          const float a = low[pair];
          const float b = high[pair];
          low[pair] = cos[pair] * a + sin[pair] * b;
          high[pair] = cos[pair] * b - sin[pair] * a;
        }
      }
    }
    const kernels::HadamardPlan& plan = layers_.front().key_hadamard;
    kernels::hadamard_rows(plan, /*inverse=*/false, keys, n_tokens * channels() / plan.n, plan.n);
  }

  bool store(int layer, std::byte* page, int block, int first, int n_tokens, const float* key,
             const float* value) const override {
    return rotate_store({&layers_[layer], key, value, channels(), block, first, n_tokens, page});
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  StoredTokens stored_tokens(int layer, const Chunk& chunk) const override {
    const RopeTables& tables = tables_.at(chunk.rope_len);
    const RotateLayer& rotate_layer = layers_[layer];
    return {model().n_kv_heads, model().head_dim,
            [this, layer, &chunk, &tables, &rotate_layer](int64_t block, float* key, int64_t stride, float* value,
                                                   int64_t value_head_stride) {
              std::vector<float> angles(static_cast<size_t>(model().head_dim) * kTokenBlock);
              float* cos = angles.data();
              float* sin = angles.data() + angles.size() / 2;
              tables.block(block, static_cast<float>(model().rope.attention_factor()), cos, sin);
              const RotatePageLayout& layout = rotate_layer.layout;
              for (int group = 0; group < layout.n_rotation_groups(); ++group)
                rotate_load({&rotate_layer, layer_page(chunk, layer, block / kBlocksPerPage), group,
                             static_cast<int>(block % kBlocksPerPage), cos, sin,
                             key + int64_t{group} * layout.group_channels() * stride, stride,
                             value + int64_t{group} * layout.heads_per_group * value_head_stride, value_head_stride});
            }};
  }

  int kv_heads_per_group() const override { return layers_.front().layout.heads_per_group; }

  PageAttention page_attention(int layer, const Chunk& chunk, const float* q) const override {
    // Stored keys have no attention factor, so queries carry it twice; `scaled` stays empty where it is 1.
    std::vector<float> scaled;
    const float factor = static_cast<float>(model().rope.attention_factor());
    if (factor != 1.0F) {
      scaled.assign(q, q + int64_t{model().n_heads} * model().head_dim);
      for (float& x : scaled) x *= factor;
    }
    return [this, layer, q, scaled = std::move(scaled), tables = &tables_.at(chunk.rope_len)](
               int group, int64_t page_begin, const kernels::PageRun& run, const kernels::SoftmaxState& state) {
      const int64_t half = model().head_dim / 2;
      const float* q_group =
          (scaled.empty() ? q : scaled.data()) + int64_t{group} * kv_heads_per_group() * rep() * model().head_dim;
      rotate_decode({&layers_[layer], run, group, rep(), q_group, tables->page_cos() + page_begin * half,
                     tables->page_sin() + page_begin * half, tables->token_cos(), tables->token_sin(), state});
    };
  }

  std::vector<std::vector<uint16_t>> key_groups_;
  std::vector<RotateLayer> layers_;
  RopeTableSet tables_;
  std::map<SeqId, Leaving> leaving_;  // of the open step
};

}  // namespace

std::unique_ptr<KvCache> make_rotate_cache(const KvSpec& spec, const KvModel& model, const RotateOptions& options,
                                           std::vector<std::vector<uint16_t>> key_groups) {
  return std::make_unique<RotateCache>(spec, model, options, rotate_layout(options, model), std::move(key_groups));
}

}  // namespace rotunda::kv::rotate
