#include "kv/rotate/rope_tables.h"

#include <cmath>

namespace rotunda::kv::rotate {

using kernels::kTokenBlock;

RopeTables::RopeTables(std::vector<double> inv_freq, int64_t page_tokens) : inv_freq_(std::move(inv_freq)), page_tokens_(page_tokens) {
  const size_t pairs = inv_freq_.size();
  token_cos_.resize(pairs * static_cast<size_t>(page_tokens));
  token_sin_.resize(pairs * static_cast<size_t>(page_tokens));
  for (int64_t token = 0; token < page_tokens; ++token) {
    for (size_t pair = 0; pair < pairs; ++pair) {
      const double angle = static_cast<double>(token) * inv_freq_[pair];
      const size_t place = (static_cast<size_t>(token / kTokenBlock) * pairs + pair) * kTokenBlock + static_cast<size_t>(token % kTokenBlock);
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

}  // namespace rotunda::kv::rotate
