#pragma once

#include <map>
#include <string>
#include <vector>

#include "kv/grouped/grouped_calibrator.h"
#include "kv/grouped/head_basis.h"
#include "kv/grouped/kernels/grouped_page.h"
#include "kv/kv_format.h"

namespace rotunda::kv::grouped {

/// The channels of each head, largest first. Keys in RoPE pairs, since RoPE mixes the two channels i and i + d / 2: they stand side
/// by side, pairs by the sum of their energies. @param energy [n_kv_heads, d]   @return [n_kv_heads, d] int64, for
/// HeadBasis::permutation
at::Tensor key_order(const at::Tensor& energy);
at::Tensor value_order(const at::Tensor& energy);

/// What the weights alone say of the energy of channels: squared norms of the rows behind the norm's gain, bias added. [n_kv_heads, d] fp64
at::Tensor weight_energy(const KvModel& model, const at::Tensor& weight, const at::Tensor& bias,
                         const at::Tensor& input_gain);

/// A random rotation of each head, uniformly distributed: Gaussian rows (Box-Muller on SplitMix64, its state set by layer and side) made
/// orthonormal one after the other. @return [n_kv_heads, d, d] fp32
at::Tensor random_rotation(const KvModel& model, int layer, bool of_keys);

/// OSCAR: eigenvectors of a second moment, largest eigenvalue first, in bit-reversed order, times H. @param moment [n_kv_heads, d, d] fp64
/// @return [n_kv_heads, d, d] fp32, orthogonal
at::Tensor spread_eigenvectors(const at::Tensor& moment);

/// What a saved sequence must share with the cache that reads it: codes mean nothing in another basis.
/// @param values the name of their kind   @param key_bases [n_layers]
std::map<std::string, std::string> codes_settings(const GroupedPageLayout& layout, const std::string& values,
                                                  const std::vector<HeadBasis>& key_bases);

}  // namespace rotunda::kv::grouped
