#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/answers.h"
#include "engine/perplexity.h"
#include "engine/retrieval.h"
#include "engine/session.h"

namespace rotunda::engine {

struct CompareOptions : EvalOptions {
  std::optional<int64_t> window_len;        ///< as PerplexityOptions
  int64_t windows = 8;                      ///< of the text at most; 0: all. `limit` is for the lines of each data file
  std::vector<std::filesystem::path> data;  ///< files of evaluate_answers
  std::optional<std::vector<std::string>> prompts;  ///< none: three pieces of the text; empty: nothing is generated
  int64_t max_new_tokens = 48;                      ///< of each prompt, greedy
  int64_t decode_len =
      1024;  ///< tokens in the cache while the speed of decoding is measured, fewer where text or context is shorter; 0: not
  int64_t probe_len = 256;       ///< tokens of the text that the looks inside take, 2 to 1024
  std::optional<int> key_layer;  ///< whose keys are shown; none: the one in the middle
  int key_head = 0;              ///< kv head of that layer
};

/// What one cache made of a prompt.
struct GeneratedText {
  std::string same;  ///< what it shares with the 16-bit cache's text, up to a whole character
  std::string rest;  ///< what follows
  /// Tokens until the first that differs from the 16-bit cache's; none where none does.
  std::optional<int64_t> first_difference;
  std::string finished;  ///< to_string(FinishReason)
};

/// One cache's part of the comparison.
struct CompareRow {
  PerplexityResult quality;                     ///< with the bits and bytes that the windows took
  std::vector<AccuracyResult> answers;          ///< by data file
  std::vector<std::vector<int64_t>> retrieved;  ///< right answers by the cells of CompareReport::retrieval
  double decode_tok_s = 0.0;                    ///< 0: not measured
  std::vector<double> layer_error;              ///< see engine/layer_probe.h
  at::Tensor keys;                       ///< as CompareReport::keys, coded; undefined where the cache does not tell
  std::vector<GeneratedText> generated;  ///< by prompt
};

/// All that a comparison found. The first row that names it, or else one put in front, is the 16-bit cache that all are measured against.
struct CompareReport {
  std::vector<CompareRow> rows;
  size_t reference = 0;  ///< index of its row
  int64_t window_len = 0;
  int64_t scored_tokens = 0;
  int64_t decode_len = 0;                 ///< 0: speed was not measured
  RetrievalGrid retrieval;                ///< over all data files
  std::vector<std::string> probe_tokens;  ///< texts of the tokens that were looked at
  at::Tensor attention;                   ///< [n_layers, probe tokens] fp32, see attention_shares
  int key_layer = 0;
  int key_head = 0;
  int64_t key_tokens = 0;  ///< tokens shown
  int64_t key_tokens_per_row = 1;
  at::Tensor
      keys;  ///< [rows, head_dim] fp32: the largest |key element| of so many tokens, as the model makes it before RoPE
  std::vector<std::string> prompts;
};

/// Runs everything for every cache: perplexity, answers, layer errors, keys, attention, speed, generations.
/// All input is read and checked before the first run of the model.
/// @throws Error{kUser}, Error{kWorld} as the parts do; Interrupted where a stop came before the end: there is no half report.
CompareReport compare(const Session& session, std::string_view text, const CompareOptions& options);

}  // namespace rotunda::engine
