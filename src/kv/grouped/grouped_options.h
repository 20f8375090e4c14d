#pragma once

#include <vector>

#include "kv/grouped/grouped_kind.h"
#include "kv/kv_format.h"
#include "kv/kv_options.h"

namespace rotunda::kv::grouped {

/// What channels are sorted by.
enum class ChannelSort {
  kWeights,      ///< norms of the rows of W_k and W_v
  kCalibration,  ///< root mean squares of keys and values
  kNone,
};

/// The options of a grouped format, read from a KvSpec.
struct GroupedOptions {
  GroupedSide key;
  GroupedSide value;
  GroupedCodec key_codec;
  GroupedCodec value_codec;
  ExactOptions exact;
  ChannelSort sort = ChannelSort::kNone;     ///< of keys and of values, where their basis is sorted
  const GroupedKind* value_kind = nullptr;  ///< whose codec and basis values have, in register.cpp

  /// @throws Error{kUser} naming format, option, got and expected.
  static GroupedOptions from_spec(const KvSpec& spec, const GroupedKind& kind);
  /// Name, default and help of each.
  static std::vector<KvOption> describe(const GroupedKind& kind);
};

/// The page of one layer. @throws Error{kUser} naming the option where a group does not divide the head.
GroupedPageLayout grouped_layout(const GroupedOptions& options, const GroupedKind& kind, const KvModel& model);

}  // namespace rotunda::kv::grouped
