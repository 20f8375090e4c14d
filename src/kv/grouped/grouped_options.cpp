#include "kv/grouped/grouped_options.h"

#include <string>

#include "base/check.h"
#include "kv/paged_cache.h"

namespace rotunda::kv::grouped {

namespace {

constexpr const char* kWholeHead = "head_dim";

bool is_block_float(const GroupedKind& kind) {
  return kind.codec.rule == Rule::kBlockFloat && kind.group_option != nullptr;
}

std::string known_options(const GroupedKind& kind) {
  std::string names;
  for (const KvOption& option : GroupedOptions::describe(kind)) names += (names.empty() ? "" : ", ") + option.name;
  return names;
}

}  // namespace

GroupedOptions GroupedOptions::from_spec(const KvSpec& spec, const GroupedKind& kind) {
  GroupedOptions options;
  options.key = options.value = kind.side;
  options.key_codec = options.value_codec = kind.codec;
  options.value_codec.clip = kind.value_clip;
  options.exact = kind.exact;
  if (kind.basis == Basis::kSorted) options.sort = ChannelSort::kWeights;
  for (const auto& [key, text] : spec.options) {
    if (parse_exact_option(spec, key, options.exact)) continue;
    if (kind.group_option != nullptr && key == kind.group_option) {
      if (text == kWholeHead) {
        options.key.group = options.value.group = 0;
        continue;
      }
      options.key.group = options.value.group = parse_number(spec, key, 16, kMaxGroup);
      ROTUNDA_CHECK(options.key.group % 16 == 0, spec.format, ": option ", key, "=", text,
                    ", expected a multiple of 16 from 16 to ", kMaxGroup);
    } else if (key == "values" && is_block_float(kind)) {
      options.value.bits = parse_number(spec, key, 2, 8);
    } else if (key == "clamp" && is_block_float(kind)) {
      options.key_codec.symmetric = options.value_codec.symmetric =
          parse_choice<bool>(spec, key, {{"asymmetric", false}, {"symmetric", true}});
    } else if (key == "scale" && kind.codec.rule == Rule::kNorm) {
      options.key_codec.keep_length = options.value_codec.keep_length =
          parse_choice<bool>(spec, key, {{"norm", false}, {"length", true}});
    } else if (key == "ksort" && kind.basis == Basis::kSorted) {
      options.sort = parse_choice<ChannelSort>(spec, key,
                                               {{"weights", ChannelSort::kWeights},
                                                {"calibration", ChannelSort::kCalibration},
                                                {"none", ChannelSort::kNone}});
    } else {
      throw_user_error(concat(spec.format, ": option '", key, "' is unknown, expected one of: ", known_options(kind)));
    }
  }
  return options;
}

std::vector<KvOption> GroupedOptions::describe(const GroupedKind& kind) {
  std::vector<KvOption> options = describe_exact_options(kind.exact);
  if (kind.group_option != nullptr) {
    options.push_back({kind.group_option, kind.side.group == 0 ? kWholeHead : std::to_string(kind.side.group),
                       "channels per scale: a multiple of 16 that divides the head dimension, or head_dim"});
  }
  if (is_block_float(kind)) {
    options.push_back({"values", std::to_string(kind.side.bits), "bits of a value's mantissa, 2 to 8"});
    options.push_back({"clamp", "asymmetric", "smallest mantissa: -2^(m-1) (asymmetric) or -(2^(m-1)-1) (symmetric)"});
  }
  if (kind.codec.rule == Rule::kNorm) {
    options.push_back({"scale", "norm",
                       "a vector's norm (norm, as published), or what makes the decoded vector as long (length)"});
  }
  if (kind.basis == Basis::kSorted) {
    options.push_back(
        {"ksort", "weights", "sorts the channels of a head: by norms of W_k and W_v (weights), by calibration, none"});
  }
  return options;
}

GroupedPageLayout grouped_layout(const GroupedOptions& options, const GroupedKind& kind, const KvModel& model) {
  GroupedPageLayout layout{options.key, options.value, model.n_kv_heads, model.head_dim, kBlocksPerPage};
  for (GroupedSide* side : {&layout.key, &layout.value})
    if (side->group == 0) side->group = model.head_dim;
  const int group = layout.key.group;
  ROTUNDA_CHECK(group <= kMaxGroup, kind.name, ": a group of head_dim ", group, " channels, expected ", kMaxGroup,
                " at most");
  if (model.head_dim % group != 0) {
    if (kind.group_option == nullptr)
      throw_user_error(
          concat(kind.name, ": its group of ", group, " channels does not divide head_dim ", model.head_dim));
    throw_user_error(concat(kind.name, ": option ", kind.group_option, "=", group,
                            ", expected a group of channels that divides head_dim ", model.head_dim));
  }
  return layout;
}

}  // namespace rotunda::kv::grouped
