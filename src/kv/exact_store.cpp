#include "kv/exact_store.h"

#include <ATen/ATen.h>

#include <cstring>

#include "base/check.h"
#include "base/half.h"

namespace rotunda::kv {

using kernels::kTokenBlock;

ExactStore::ExactStore(int n_kv_heads, int head_dim, int64_t n_slots)
    : layout_{kernels::ElementType::kFp16, n_kv_heads, head_dim, static_cast<int>((n_slots + kTokenBlock - 1) / kTokenBlock)},
      storage_(static_cast<size_t>(layout_.page_bytes())) {}

bool ExactStore::write(int64_t slot, const float* key, const float* value) {
  return kernels::store_plain(layout_, key, value, int64_t{layout_.n_kv_heads} * layout_.head_dim, slot, 1, storage_.data());
}

void ExactStore::read(int64_t slot, float* key, float* value) const {
  const auto* base = reinterpret_cast<const Half*>(storage_.data());
  for (int head = 0; head < layout_.n_kv_heads; ++head) {
    const Half* k = base + layout_.key_block_offset(head, static_cast<int>(slot / kTokenBlock)) / 2 + slot % kTokenBlock;
    const Half* v = base + layout_.value_row_offset(head, slot) / 2;
    for (int c = 0; c < layout_.head_dim; ++c) {
      key[head * layout_.head_dim + c] = to_float(k[c * kTokenBlock]);
      value[head * layout_.head_dim + c] = to_float(v[c]);
    }
  }
}

std::pair<at::Tensor, at::Tensor> ExactStore::load(const std::vector<int64_t>& slots) const {
  const int64_t n_heads = layout_.n_kv_heads;
  const int64_t head_dim = layout_.head_dim;
  const at::Tensor key = at::empty({n_heads, head_dim, n_slots()}, at::kFloat);
  const at::Tensor value = at::empty({n_heads, n_slots(), head_dim}, at::kFloat);
  for (int head = 0; head < n_heads; ++head)
    for (int block = 0; block < layout_.blocks_per_page; ++block)
      kernels::load_plain(layout_, storage_.data(), head, block, key.data_ptr<float>() + head * head_dim * n_slots() + block * kTokenBlock,
                          n_slots(), value.data_ptr<float>() + (head * n_slots() + block * kTokenBlock) * head_dim);
  const at::Tensor index = at::tensor(slots, at::kLong);
  return {key.index_select(2, index), value.index_select(1, index)};
}

at::Tensor ExactStore::export_bytes() const {
  at::Tensor out = at::empty({bytes()}, at::kByte);
  if (bytes() > 0) std::memcpy(out.data_ptr<uint8_t>(), storage_.data(), storage_.size());
  return out;
}

void ExactStore::import_bytes(const at::Tensor& bytes) {
  ROTUNDA_ASSERT(bytes.numel() == this->bytes());
  if (this->bytes() > 0) std::memcpy(storage_.data(), bytes.contiguous().data_ptr<uint8_t>(), storage_.size());
}

void ExactStore::grow(int64_t wanted_slots) {
  if (wanted_slots <= n_slots()) return;
  ExactStore larger(layout_.n_kv_heads, layout_.head_dim, wanted_slots);
  // Offsets depend on the number of blocks, so the parts move one by one.
  for (int head = 0; head < layout_.n_kv_heads; ++head) {
    const size_t block_bytes = static_cast<size_t>(layout_.head_dim) * kTokenBlock * 2;
    if (layout_.blocks_per_page == 0) continue;
    std::memcpy(larger.storage_.data() + larger.layout_.key_block_offset(head, 0), storage_.data() + layout_.key_block_offset(head, 0),
                block_bytes * layout_.blocks_per_page);
    std::memcpy(larger.storage_.data() + larger.layout_.value_row_offset(head, 0), storage_.data() + layout_.value_row_offset(head, 0),
                static_cast<size_t>(n_slots()) * layout_.head_dim * 2);
  }
  *this = std::move(larger);
}

}  // namespace rotunda::kv
