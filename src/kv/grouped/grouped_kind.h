#pragma once

#include <string_view>

#include "kv/grouped/kernels/grouped_codec.h"
#include "kv/kv_options.h"

namespace rotunda::kv::grouped {

/// In which basis keys (after RoPE) and values are coded.
enum class Basis {
  kPlain,           ///< as they are
  kSorted,          ///< channels of a head in the order of their size (K-sort, arXiv:2403.20137); option `ksort`
  kHadamard,        ///< rotated by the Hadamard matrix of a head's size (QuaRot, arXiv:2404.00456)
  kRandomRotation,  ///< rotated at random (TurboQuant, arXiv:2504.19874)
  kAttentionAware,  ///< OSCAR (arXiv:2605.17757): calibrated eigenvectors, composed with Hadamard and bit reversal
};

/// One registered format: all that tells it from the others.
struct GroupedKind {
  const char* name;
  const char* summary;
  GroupedSide side;    ///< `group` 0: the head dimension
  GroupedCodec codec;  ///< of keys and values
  Basis basis = Basis::kPlain;
  const char* group_option = nullptr;  ///< the option that sets the group, where the user may
  float value_clip = 1.0F;             ///< kMinMax: the values' own `clip`
  ExactOptions exact{.recent = 0, .sinks = 0};
};

/// The registered kind of this name, or null.
const GroupedKind* find_kind(std::string_view name);

}  // namespace rotunda::kv::grouped
