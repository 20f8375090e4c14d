#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/generate.h"
#include "engine/toy.h"

namespace rotunda::engine {
namespace {

// tests/golden/make_model_golden.py: greedy continuations by transformers, keys and values rounded to each dtype.
TEST(GoldenGreedy, TheShippedModelContinuesAsTransformersDoes) {
  const std::string root = ROTUNDA_SOURCE_DIR;
  const nlohmann::json golden = nlohmann::json::parse(std::ifstream(root + "/tests/golden/tiny_gqa_greedy.json"));
  SessionOptions load;
  load.model_dir = root + "/models/tiny-gqa";
  const Session session = load_session(load);
  for (const auto& [dtype, spec] : std::vector<std::pair<std::string, std::string>>{{"float32", "fp32"}, {"bfloat16", "bf16"}, {"float16", "fp16"}}) {
    GenerateRequest request;
    request.prompt_ids = {golden.at("prompt").get<std::vector<int64_t>>()};
    request.options.max_new_tokens = golden.at("n_tokens").get<int64_t>();
    request.options.ignore_eos = true;
    const GenerateResult result = generate(session, toy::bind(session, spec), request);
    EXPECT_EQ(result.sequences[0].tokens, golden.at("continuations").at(dtype).at("ids").get<std::vector<int64_t>>()) << spec;
  }
}

}  // namespace
}  // namespace rotunda::engine
