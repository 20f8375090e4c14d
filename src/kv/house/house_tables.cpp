#include "kv/house/house_tables.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace rotunda::kv::house {

namespace {

std::vector<uint16_t> shifted_pairs(const float* shift, int half) {
  std::vector<uint16_t> pairs;
  for (int i = 0; i < half; ++i)
    if (shift[i] != 0.0F || shift[i + half] != 0.0F) pairs.push_back(static_cast<uint16_t>(i));
  return pairs;
}

LayerTables layer_tables(const KvModel& model, int layer, bool with_feedback, const ops::TensorBundle& setup) {
  const int64_t heads = model.n_kv_heads, d = model.head_dim;
  const auto part = [&](const char* name, at::IntArrayRef sizes) {
    return setup.get(concat(name, ".", layer), at::kFloat, sizes).contiguous();
  };
  LayerTables tables;
  tables.balance = part("balance", {heads, d / 2});
  tables.shift = part("shift", {heads, d}) * model.rope.attention_factor();
  if (with_feedback) tables.feedback = part("feedback", {heads, d, d});
  for (int head = 0; head < model.n_kv_heads; ++head)
    tables.pairs.push_back(shifted_pairs(tables.shift_of(head), model.head_dim / 2));
  return tables;
}

// FNV-1a over balance and shift: codes mean nothing under others. Their upper 16 bits alone, for the same weights may give other low
// bits on another machine.
uint64_t tables_hash(const std::vector<LayerTables>& layers) {
  uint64_t hash = 14695981039346656037ULL;
  for (const LayerTables& tables : layers) {
    for (const at::Tensor& table : {tables.balance, tables.shift}) {
      for (int64_t i = 0; i < table.numel(); ++i)
        hash =
            (hash ^ ((std::bit_cast<uint32_t>(table.const_data_ptr<float>()[i]) + 0x8000U) >> 16)) * 1099511628211ULL;
    }
  }
  return hash;
}

}  // namespace

bool LayerTables::shifts() const {
  return std::any_of(pairs.begin(), pairs.end(), [](const auto& of_head) { return !of_head.empty(); });
}

std::vector<LayerTables> house_tables(const KvModel& model, const HouseOptions& options, const ops::TensorBundle& setup) {
  std::vector<LayerTables> tables;
  for (int layer = 0; layer < model.n_layers; ++layer)
    tables.push_back(layer_tables(model, layer, options.feedback != Moments::kNone, setup));
  return tables;
}

std::map<std::string, std::string> codes_settings(const HousePageLayout& layout, const std::vector<LayerTables>& tables) {
  return {{"rotunda.key_bits", std::to_string(layout.key_bits)},
          {"rotunda.value_bits", std::to_string(layout.value_bits)},
          {"rotunda.tables_hash", std::to_string(tables_hash(tables))}};
}

}  // namespace rotunda::kv::house
