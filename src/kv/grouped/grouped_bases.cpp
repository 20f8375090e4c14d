#include "kv/grouped/grouped_bases.h"

#include <ATen/ATen.h>

#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>

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

at::Tensor random_rotation(const KvModel& model, int layer, bool of_keys) {
  const int64_t d = model.head_dim;
  const at::Tensor rotation = at::empty({model.n_kv_heads, d, d}, at::kDouble);
  uint64_t state = 2 * static_cast<uint64_t>(layer) + (of_keys ? 0 : 1);
  state *= 0xd1342543de82ef95ULL;  // apart, so that no two layers run through the same numbers
  const auto uniform = [&] {       // above 0, up to 1
    state += 0x9e3779b97f4a7c15ULL;
    uint64_t x = state;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return static_cast<double>(((x ^ (x >> 31)) >> 11) + 1) * 0x1p-53;
  };
  for (int head = 0; head < model.n_kv_heads; ++head) {
    double* const rows = rotation.data_ptr<double>() + head * d * d;
    for (int64_t i = 0; i < d; ++i) {
      double* const row = rows + i * d;
      for (int64_t j = 0; j < d; ++j) {
        const double radius = std::sqrt(-2.0 * std::log(uniform()));
        row[j] = radius * std::cos(2.0 * std::numbers::pi * uniform());
      }
      // Gram-Schmidt; a second time takes away what rounding has left.
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t before = 0; before < i; ++before) {
          const double* const other = rows + before * d;
          const double along = std::inner_product(row, row + d, other, 0.0);
          for (int64_t j = 0; j < d; ++j) row[j] -= along * other[j];
        }
      }
      const double length = std::sqrt(std::inner_product(row, row + d, row, 0.0));
      for (int64_t j = 0; j < d; ++j) row[j] /= length;
    }
  }
  return rotation.to(at::kFloat);
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

std::map<std::string, std::string> codes_settings(const GroupedPageLayout& layout, const std::string& values,
                                                  const std::vector<HeadBasis>& key_bases) {
  // FNV-1a. The upper 16 bits alone: a calibration may end in other low bits elsewhere.
  uint64_t hash = 14695981039346656037ULL;
  for (const HeadBasis& basis : key_bases) {
    const at::Tensor matrix = basis.matrix();
    if (!matrix.defined()) continue;
    const at::Tensor flat = matrix.contiguous();
    for (int64_t i = 0; i < flat.numel(); ++i)
      hash = (hash ^ ((std::bit_cast<uint32_t>(flat.const_data_ptr<float>()[i]) + 0x8000U) >> 16)) * 1099511628211ULL;
  }
  return {{"rotunda.key_bits", std::to_string(layout.key.bits)},
          {"rotunda.value_bits", std::to_string(layout.value.bits)},
          {"rotunda.values", values},
          {"rotunda.group", std::to_string(layout.key.group)},
          {"rotunda.value_group", std::to_string(layout.value.group)},
          {"rotunda.basis_hash", std::to_string(hash)}};
}

}  // namespace rotunda::kv::grouped
