#include "kv/rope_tables.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace rotunda::kv {

using kernels::kTokenBlock;

RopeTables::RopeTables(std::vector<double> inv_freq, int64_t page_tokens)
    : inv_freq_(std::move(inv_freq)), page_tokens_(page_tokens) {
  const size_t pairs = inv_freq_.size();
  token_cos_.resize(pairs * static_cast<size_t>(page_tokens));
  token_sin_.resize(pairs * static_cast<size_t>(page_tokens));
  for (int64_t token = 0; token < page_tokens; ++token) {
    for (size_t pair = 0; pair < pairs; ++pair) {
      const double angle = static_cast<double>(token) * inv_freq_[pair];
      const size_t place = (static_cast<size_t>(token / kTokenBlock) * pairs + pair) * kTokenBlock +
                           static_cast<size_t>(token % kTokenBlock);
      token_cos_[place] = static_cast<float>(std::cos(angle));
      token_sin_[place] = static_cast<float>(std::sin(angle));
    }
  }
}

void RopeTables::reserve_pages(int64_t n_pages) {
  const size_t pairs = inv_freq_.size();
  for (int64_t page = static_cast<int64_t>(page_cos_.size() / pairs); page < n_pages; ++page) {
    for (size_t pair = 0; pair < pairs; ++pair) {
      const double angle = static_cast<double>(page * page_tokens_) * inv_freq_[pair];
      page_cos_.push_back(static_cast<float>(std::cos(angle)));
      page_sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

void RopeTables::block(int64_t block, float factor, float* cos, float* sin) const {
  const size_t pairs = inv_freq_.size();
  const int64_t blocks_per_page = page_tokens_ / kTokenBlock;
  const float* base_cos = page_cos_.data() + static_cast<size_t>(block / blocks_per_page) * pairs;
  const float* base_sin = page_sin_.data() + static_cast<size_t>(block / blocks_per_page) * pairs;
  const size_t offset = static_cast<size_t>(block % blocks_per_page) * pairs * kTokenBlock;
  for (size_t pair = 0; pair < pairs; ++pair) {
    const float c = base_cos[pair] * factor;
    const float s = base_sin[pair] * factor;
    for (int t = 0; t < kTokenBlock; ++t) {
      const size_t place = pair * kTokenBlock + static_cast<size_t>(t);
      const float token_cos = token_cos_[offset + place];
      const float token_sin = token_sin_[offset + place];
      cos[place] = c * token_cos - s * token_sin;
      sin[place] = s * token_cos + c * token_sin;
    }
  }
}

int64_t RopeTableSet::key(int64_t rope_len) const {
  return rope_.depends_on_length() && rope_len > rope_.spec().max_position_embeddings ? rope_len : 0;
}

const RopeTables& RopeTableSet::prepare(int64_t rope_len, int64_t n_pages) {
  auto [it, added] = tables_.try_emplace(key(rope_len));
  if (added) it->second = RopeTables(rope_.inv_freq(it->first), page_tokens_);
  it->second.reserve_pages(n_pages);
  return it->second;
}

const RopeTables& RopeTableSet::at(int64_t rope_len) const {
  const auto it = tables_.find(key(rope_len));
  ROTUNDA_ASSERT(it != tables_.end(), "RoPE angles for length ", rope_len, " were not prepared");
  return it->second;
}

void RopeTableSet::keep_only(const std::vector<int64_t>& rope_lens) {
  std::erase_if(tables_, [&](const auto& table) {
    return std::none_of(rope_lens.begin(), rope_lens.end(), [&](int64_t length) { return key(length) == table.first; });
  });
}

}  // namespace rotunda::kv
