#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/control.h"
#include "engine/kv_binding.h"
#include "engine/sampling.h"
#include "engine/session.h"

namespace rotunda::engine {

struct GenerateOptions {
  int64_t max_new_tokens = 256;  ///< 0: run the prompt only
  SamplingOptions sampling;
  std::vector<std::string> stops;  ///< texts that end a sequence; they are not part of its text
  int64_t prefill_chunk = 512;     ///< most tokens of a prompt in one step
  bool ignore_eos = false;
  /// Called with text as it comes (whole characters, nothing that may still become a stop text); may be empty.
  std::function<void(size_t sequence, const std::string& text)> on_text;
  Progress progress;
  StopFlag stop = nullptr;
};

enum class FinishReason { kEos, kStop, kLength, kInterrupted };
/// "eos", "stop", "length", "interrupted".
const char* to_string(FinishReason reason);

struct GeneratedSequence {
  int64_t prompt_tokens = 0;
  std::vector<int64_t> tokens;  ///< generated, without the EOS that ended them
  std::string text;
  FinishReason finished = FinishReason::kLength;
  double ttft_ms = 0.0;  ///< from the start of the call to this sequence's first token; 0 where there is none
};

struct GenerateResult {
  std::vector<GeneratedSequence> sequences;
  int64_t prompt_tokens = 0;  ///< run through the model, of all sequences
  int64_t new_tokens = 0;
  double ttft_ms = 0.0;       ///< of the first sequence that got a token
  double prefill_tok_s = 0.0;
  double decode_tok_s = 0.0;  ///< all sequences together, the first token of each left out; 0 where none was decoded
  double bits_per_element = 0.0;
  int64_t cache_bytes = 0;    ///< where the cache was largest
  bool interrupted() const;
};

/// A sequence of the cache and what is to be fed to it before it is continued.
struct Continuation {
  kv::SeqId seq = -1;
  std::vector<int64_t> tokens;  ///< not empty
};

/// Feeds and continues sequences of an open cache: prompts in chunks, then one step a token for all that still run. A
/// sequence's chunks begin at the same places whatever else is in the batch. Warns once where a sequence passes the trained
/// context. Finished sequences are released unless `keep_sequences`. A stop returns what there is until then.
/// @throws Error of cache, model or sampler; the sequences are then the caller's to release.
GenerateResult continue_sequences(const model::CausalLm& model, const io::Tokenizer& tokenizer, const std::set<int64_t>& eos_ids,
                                  kv::KvCache& cache, const std::vector<Continuation>& inputs, const GenerateOptions& options,
                                  bool keep_sequences);

struct GenerateRequest {
  std::vector<std::string> prompts;              ///< tokenized with special tokens, after a loaded cache without; or
  std::vector<std::vector<int64_t>> prompt_ids;  ///< token ids as they are; one of the two is empty
  std::optional<std::filesystem::path> load_cache;  ///< every prompt continues the sequence that this file holds
  std::optional<std::filesystem::path> save_cache;  ///< writes the one sequence here in the end
  GenerateOptions options;
};

/// Generates from a batch of prompts with a new cache.
/// @throws Error{kUser} for an empty prompt, a token outside the vocabulary, options out of range, a saved cache that does
///   not fit; Error{kWorld} where the caches would not fit memory (asked before anything is allocated) or a file fails.
GenerateResult generate(const Session& session, const KvBinding& binding, const GenerateRequest& request);

}  // namespace rotunda::engine
