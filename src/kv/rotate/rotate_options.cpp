#include "kv/rotate/rotate_options.h"

#include <numeric>

#include "base/check.h"
#include "kv/paged_cache.h"

namespace rotunda::kv::rotate {

namespace {

// Published: 0.8 at 2 bits, none at 3 and 4.
float default_clip(int bits) { return bits == 2 ? 0.8F : 1.0F; }

// What a quantization group must divide so that reordering can do what it says.
int reorder_scope(Reorder reorder, const KvModel& model) {
  return reorder == Reorder::kGroup ? heads_per_group(model) * model.head_dim : model.kv_channels();
}

// FNV-1a over the channel-to-group tables: codes mean nothing under other tables.
uint64_t hash_of(const std::vector<std::vector<uint16_t>>& key_groups) {
  uint64_t hash = 14695981039346656037ULL;
  for (const auto& table : key_groups)
    for (const uint16_t group : table) hash = (hash ^ group) * 1099511628211ULL;
  return hash;
}

}  // namespace

RotateOptions RotateOptions::from_spec(const KvSpec& spec, int bits) {
  RotateOptions options;
  options.bits = bits;
  options.clip = default_clip(bits);
  for (const auto& [key, text] : spec.options) {
    if (key == "recent") {
      options.exact.recent = parse_number(spec, key, 0, 1 << 20);
    } else if (key == "sinks") {
      options.exact.sinks = parse_number(spec, key, 0, 4096);
    } else if (key == "sink_select") {
      options.exact.sink_select = parse_choice<SinkSelect>(spec, key, {{"prompt", SinkSelect::kPrompt}, {"running", SinkSelect::kRunning}});
    } else if (key == "reorder") {
      options.reorder = parse_choice<Reorder>(spec, key, {{"layer", Reorder::kLayer}, {"group", Reorder::kGroup}, {"none", Reorder::kNone}});
    } else if (key == "clip") {
      options.clip = parse_number(spec, key, 0.1F, 1.0F);
    } else if (key == "zero") {
      options.zero = parse_choice<ZeroPoint>(spec, key, {{"code", ZeroPoint::kCode}, {"minimum", ZeroPoint::kMinimum}});
    } else if (key == "group") {
      options.group = parse_number(spec, key, 16, 1 << 16);
    } else {
      throw_user_error(concat(spec.format, ": option '", key,
                              "' is unknown, expected one of: clip, group, recent, reorder, sink_select, sinks, zero"));
    }
  }
  return options;
}

std::vector<KvOption> RotateOptions::describe(int bits) {
  return {
      {"recent", "64", "newest tokens kept in 16 bits, 0 or more (0: as published)"},
      {"sinks", "20", "largest entries of a layer's input; their tokens stay in 16 bits, 0 or more"},
      {"sink_select", "prompt", "tokens that may be sinks: prompt (as published) or running (all so far)"},
      {"reorder", "layer", "channels that may share a scale: layer (as published), group (of rotated heads) or none"},
      {"clip", bits == 2 ? "0.8" : "1.0", "factor on the largest and smallest element of a group, 0.1 to 1"},
      {"zero", "code", "where codes begin: code (8-bit integer, as published) or minimum (fp16)"},
      {"group", "128", "channels per scale, a multiple of 16 that divides the layer's channels (smaller where 128 does not)"},
  };
}

int heads_per_group(const KvModel& model) { return std::gcd(4, model.n_kv_heads); }

RotatePageLayout rotate_layout(const RotateOptions& options, const KvModel& model) {
  const int scope = reorder_scope(options.reorder, model);
  int group = options.group;
  if (group == 0) {
    group = std::min(128, scope);
    while (scope % group != 0 || group % 16 != 0) group -= 16;  // ends at 16: head_dim is a multiple of it
  }
  ROTUNDA_CHECK(group % 16 == 0 && scope % group == 0, "rotate", options.bits, ": option group=", group, ", expected a multiple of 16 that divides ",
                scope, " channels");
  RotatePageLayout layout;
  layout.bits = options.bits;
  layout.zero = options.zero;
  layout.n_kv_heads = model.n_kv_heads;
  layout.head_dim = model.head_dim;
  layout.heads_per_group = heads_per_group(model);
  layout.group_size = group;
  layout.blocks_per_page = kBlocksPerPage;
  return layout;
}

std::map<std::string, std::string> rotate_settings(const RotatePageLayout& layout,
                                                   const std::vector<std::vector<uint16_t>>& key_groups) {
  return {{"rotunda.bits", std::to_string(layout.bits)},
          {"rotunda.zero", layout.zero == ZeroPoint::kCode ? "code" : "minimum"},
          {"rotunda.group_size", std::to_string(layout.group_size)},
          {"rotunda.heads_per_group", std::to_string(layout.heads_per_group)},
          {"rotunda.key_groups_hash", std::to_string(hash_of(key_groups))}};
}

}  // namespace rotunda::kv::rotate
