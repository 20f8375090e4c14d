#include "kv/grouped/grouped_bases.h"

#include <ATen/ATen.h>

#include <bit>

#include "kv/head_rotation.h"

namespace rotunda::kv::grouped {

at::Tensor key_order(const at::Tensor& energy) {
  const int64_t half = energy.size(1) / 2;
  const at::Tensor pairs = energy.narrow(1, 0, half) + energy.narrow(1, half, half);
  const at::Tensor order = std::get<1>(pairs.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
  return at::stack({order, order + half}, 2).flatten(1);
}

at::Tensor value_order(const at::Tensor& energy) {
  return std::get<1>(energy.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true));
}

at::Tensor weight_energy(const KvModel& model, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& input_gain) {
  at::Tensor energy = (weight.to(at::kDouble) * input_gain.to(at::kDouble)).square().sum(1);
  if (bias.defined()) energy = energy + bias.to(at::kDouble).square();
  return energy.view({model.n_kv_heads, model.head_dim});
}

at::Tensor random_signs(const KvModel& model, int layer, bool of_keys) {
  const at::Tensor signs = at::empty({model.n_kv_heads, model.head_dim});
  float* const out = signs.data_ptr<float>();
  uint64_t state = 2 * static_cast<uint64_t>(layer) + (of_keys ? 0 : 1);
  state *= 0xd1342543de82ef95ULL;  // apart, so that no two layers run through the same numbers
  for (int64_t i = 0; i < signs.numel(); ++i) {
    state += 0x9e3779b97f4a7c15ULL;
    uint64_t x = state;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    out[i] = ((x ^ (x >> 31)) & 1) != 0 ? -1.0F : 1.0F;
  }
  return signs;
}

at::Tensor spread_eigenvectors(const at::Tensor& moment) {
  const int64_t d = moment.size(1);
  const at::Tensor vectors = std::get<1>(at::linalg_eigh(moment)).flip(2);  // columns, largest first
  // The bit reversal of the next power of two, without what lies beyond d.
  const int bits = std::bit_width(static_cast<uint64_t>(d - 1));
  std::vector<int64_t> order;
  for (int64_t i = 0; i < int64_t{1} << bits; ++i) {
    int64_t reversed = 0;
    for (int b = 0; b < bits; ++b) reversed |= (i >> b & 1) << (bits - 1 - b);
    if (reversed < d) order.push_back(reversed);
  }
  const at::Tensor spread = vectors.index_select(2, at::tensor(order, at::kLong));
  return at::matmul(spread, hadamard_matrix(static_cast<int>(d), at::kDouble)).to(at::kFloat);
}

}  // namespace rotunda::kv::grouped
