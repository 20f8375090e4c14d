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

// The kind of values that the option `values` names; else that of keys.
const GroupedKind& kind_of_values(const KvSpec& spec, const GroupedKind& kind) {
  const auto given = spec.options.find("values");
  const std::string name = given == spec.options.end() ? kind.name : given->second;
  const GroupedKind* const found = find_kind(name);
  if (found == nullptr && is_block_float(kind)) return *find_kind(kind.name);  // a number of bits
  ROTUNDA_CHECK(found != nullptr, spec.format, ": option values=", name, ", expected a grouped format (int4, quarot2, ...)");
  ROTUNDA_CHECK((found->codec.levels == Levels::kE4m3) == (kind.codec.levels == Levels::kE4m3), spec.format, ": option values=", name,
                ", expected e4m3 values with e4m3 keys, and others with others");
  ROTUNDA_CHECK(found->basis != Basis::kAttentionAware || kind.basis == Basis::kAttentionAware || kind.basis == Basis::kSorted, spec.format,
                ": option values=", name, ", which wants a calibration, expected keys of oscar* or bfp* with it");
  return *found;
}

std::string known_options(const GroupedKind& kind) {
  std::string names;
  for (const KvOption& option : GroupedOptions::describe(kind)) names += (names.empty() ? "" : ", ") + option.name;
  return names;
}

}  // namespace

GroupedOptions GroupedOptions::from_spec(const KvSpec& spec, const GroupedKind& kind) {
  GroupedOptions options;
  const GroupedKind& of_values = kind_of_values(spec, kind);
  options.value_kind = &of_values;
  options.key = kind.side;
  options.value = of_values.side;
  options.key_codec = kind.codec;
  options.value_codec = of_values.codec;
  options.value_codec.clip = of_values.value_clip;
  options.exact = kind.exact;
  // What an option says of keys goes for values of the same sort too.
  const bool alike = of_values.codec.rule == kind.codec.rule;
  if (kind.basis == Basis::kSorted || of_values.basis == Basis::kSorted) options.sort = ChannelSort::kWeights;
  for (const auto& [key, text] : spec.options) {
    if (parse_exact_option(spec, key, options.exact)) continue;
    if (kind.group_option != nullptr && key == kind.group_option) {
      options.key.group = text == kWholeHead ? 0 : parse_number(spec, key, 16, kMaxGroup);
      if (of_values.group_option != nullptr && alike) options.value.group = options.key.group;
      ROTUNDA_CHECK(options.key.group % 16 == 0, spec.format, ": option ", key, "=", text,
                    ", expected a multiple of 16 from 16 to ", kMaxGroup);
    } else if (key == "values") {
      if (is_block_float(kind) && find_kind(text) == nullptr) options.value.bits = parse_number(spec, key, 2, 8);
    } else if (key == "clamp" && is_block_float(kind)) {
      options.key_codec.symmetric = parse_choice<bool>(spec, key, {{"asymmetric", false}, {"symmetric", true}});
      if (alike) options.value_codec.symmetric = options.key_codec.symmetric;
    } else if (key == "scale" && kind.codec.rule == Rule::kNorm) {
      options.key_codec.keep_length = parse_choice<bool>(spec, key, {{"norm", false}, {"length", true}});
      if (alike) options.value_codec.keep_length = options.key_codec.keep_length;
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
    options.push_back({"values", std::to_string(kind.side.bits), "bits of a value's mantissa, 2 to 8, or another grouped format for values"});
    options.push_back({"clamp", "asymmetric", "smallest mantissa: -2^(m-1) (asymmetric) or -(2^(m-1)-1) (symmetric)"});
  }
  if (!is_block_float(kind)) options.push_back({"values", kind.name, "the grouped format of values"});
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
  if (options.value_kind->name != std::string_view(kind.name))
    ROTUNDA_CHECK(model.head_dim % layout.value.group == 0 && layout.value.group <= kMaxGroup, kind.name, ": option values=", options.value_kind->name,
                  ", whose groups of ", layout.value.group, " channels do not divide head_dim ", model.head_dim);
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
