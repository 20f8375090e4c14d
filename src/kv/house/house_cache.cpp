#include "kv/house/house_cache.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "kv/house/house_tables.h"
#include "kv/rope_tables.h"
#include "kv/windowed_cache.h"

namespace rotunda::kv::house {

namespace {

class HouseCache final : public WindowedCache {
 public:
  HouseCache(const KvSpec& spec, const KvModel& model, const HouseOptions& options, const HousePageLayout& layout,
             const ops::TensorBundle& setup)
      : WindowedCache(spec, model, options.exact, layout.page_bytes(),
                      model.n_kv_heads * (layout.key_codes_bytes() + layout.value_codes_bytes()) / layout.page_tokens(),
                      model.n_kv_heads * 2 * layout.scale_bytes() / layout.page_tokens()),
        // Frequencies of a short sequence also where `dynamic` RoPE lets them change with the length: what is taken off a key need
        // only be the same when it is given back.
        rope_(model.rope.inv_freq(0), kPageTokens),
        tables_(house_tables(model, options, setup)) {
    for (const LayerTables& tables : tables_) {
      HouseLayer kernel_layer;
      kernel_layer.layout = layout;
      kernel_layer.scale = options.scale;
      kernel_layer.hadamard = kernels::hadamard_plan(model.head_dim);
      if (tables.feedback.defined()) kernel_layer.feedback = tables.feedback.const_data_ptr<float>();
      if (tables.shifts()) kernel_layer.shift = tables.shift.const_data_ptr<float>();
      layers_.push_back(kernel_layer);
    }
  }

 private:
  void on_begin_step(const Step& step) override {
    for (const Chunk& chunk : step.chunks) rope_.reserve_pages((chunk.kv_len + kPageTokens - 1) / kPageTokens);
  }

  void make_packable(int layer, const Chunk&, int64_t first, int64_t n_tokens, float* keys) const override {
    const kernels::HadamardPlan& plan = layers_[layer].hadamard;
    if (layers_[layer].shift != nullptr) subtract_shift(tables_[layer], first, n_tokens, keys);
    kernels::hadamard_rows(plan, /*inverse=*/false, keys, n_tokens * model().n_kv_heads, plan.n);
  }

  // keys -= mu R_n.
  void subtract_shift(const LayerTables& tables, int64_t first, int64_t n_tokens, float* keys) const {
    const int half = model().head_dim / 2;
    const BlockAngles angles(rope_, first / kTokenBlock, half);
    for (int head = 0; head < model().n_kv_heads; ++head) {
      const float* shift = tables.shift_of(head);
      for (int64_t i = 0; i < n_tokens; ++i) {
        float* key = keys + i * channels() + int64_t{head} * model().head_dim;
        for (const int pair : tables.pairs[head]) {
          const float c = angles.cos[pair * kTokenBlock + (first + i) % kTokenBlock];
          const float s = angles.sin[pair * kTokenBlock + (first + i) % kTokenBlock];
          key[pair] -= shift[pair] * c - shift[pair + half] * s;
          key[pair + half] -= shift[pair + half] * c + shift[pair] * s;
        }
      }
    }
  }

  bool store(int layer, std::byte* page, int block, int first, int n_tokens, const float* key,
             const float* value) const override {
    return house_store({&layers_[layer], key, value, channels(), block, first, n_tokens, page});
  }

  StoredTokens stored_tokens(int layer, const Chunk& chunk) const override {
    return {model().n_kv_heads, model().head_dim,
            [this, layer, &chunk](int64_t block, float* key, int64_t stride, float* value, int64_t value_head_stride) {
              const BlockAngles angles(rope_, block, model().head_dim / 2);
              for (int head = 0; head < model().n_kv_heads; ++head)
                house_load({&layers_[layer], layer_page(chunk, layer, block / kBlocksPerPage), head,
                            static_cast<int>(block % kBlocksPerPage), angles.cos.data(), angles.sin.data(),
                            key + int64_t{head} * model().head_dim * stride, stride, value + head * value_head_stride});
            }};
  }

  int kv_heads_per_group() const override { return 1; }

  PageAttention page_attention(int layer, const Chunk&, const float* q) const override {
    const int d = model().head_dim;
    std::vector<float> rotated(q, q + int64_t{model().n_heads} * d);
    kernels::hadamard_rows(layers_[layer].hadamard, /*inverse=*/false, rotated.data(), model().n_heads, d);
    return [this, layer, rotated = std::move(rotated), shifts = shift_terms(layer, q)](
               int group, int64_t page_begin, const kernels::PageRun& run, const kernels::SoftmaxState& state) {
      const LayerTables& tables = tables_[layer];
      HouseDecodeParams params{
          &layers_[layer], run, group, rep(), rotated.data() + int64_t{group} * rep() * model().head_dim, {}, state};
      if (!tables.pairs[group].empty()) {
        const int half = model().head_dim / 2;
        params.shift = {static_cast<int>(tables.pairs[group].size()),
                        tables.pairs[group].data(),
                        shifts[group].a.data(),
                        shifts[group].b.data(),
                        rope_.page_cos() + page_begin * half,
                        rope_.page_sin() + page_begin * half,
                        rope_.token_cos(),
                        rope_.token_sin()};
      }
      house_decode(params);
    };
  }

  struct ShiftFactors {
    std::vector<float> a, b;  // [rep][pairs], as ShiftTerm has them
  };
  // By kv head. @param q [n_heads][d] after RoPE
  std::vector<ShiftFactors> shift_terms(int layer, const float* q) const {
    if (layers_[layer].shift == nullptr) return {};
    const LayerTables& tables = tables_[layer];
    const int half = model().head_dim / 2;
    std::vector<ShiftFactors> terms(static_cast<size_t>(model().n_kv_heads));
    for (int head = 0; head < model().n_kv_heads; ++head) {
      const float* shift = tables.shift_of(head);
      for (int h = 0; h < rep(); ++h) {
        const float* query = q + (int64_t{head} * rep() + h) * model().head_dim;
        for (const int pair : tables.pairs[head]) {
          terms[head].a.push_back(query[pair] * shift[pair] + query[pair + half] * shift[pair + half]);
          terms[head].b.push_back(query[pair + half] * shift[pair] - query[pair] * shift[pair + half]);
        }
      }
    }
    return terms;
  }

  std::map<std::string, std::string> saved_settings() const override {
    auto settings = WindowedCache::saved_settings();
    settings.merge(codes_settings(layers_.front().layout, tables_));
    return settings;
  }

  // cos and sin of the 16 positions of one block of the sequence, [d / 2][16] each.
  struct BlockAngles {
    BlockAngles(const RopeTables& rope, int64_t block, int half)
        : cos(static_cast<size_t>(half) * kTokenBlock), sin(cos.size()) {
      rope.block(block, 1.0F, cos.data(), sin.data());
    }
    std::vector<float> cos, sin;
  };

  RopeTables rope_;
  std::vector<LayerTables> tables_;  // [layer]
  std::vector<HouseLayer> layers_;   // [layer], pointing into tables_' tensors
};

}  // namespace

std::unique_ptr<KvCache> make_house_cache(const KvSpec& spec, const KvModel& model, const HouseOptions& options,
                                          const ops::TensorBundle& setup) {
  return std::make_unique<HouseCache>(spec, model, options, house_layout(options, model), setup);
}

}  // namespace rotunda::kv::house
