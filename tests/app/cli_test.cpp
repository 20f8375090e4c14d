#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "app/program.h"

namespace rotunda::cli {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

const std::string kModel = std::string(ROTUNDA_SOURCE_DIR) + "/models/tiny-gqa";

class CliTest : public testing::Test {
 protected:
  Outcome run(const std::vector<std::string>& arguments) { return run_program(arguments, folder_); }
  json read_json(const std::string& name) { return json::parse(read_file(folder_ / name)); }

  TemporaryFolder folder_;
};

TEST_F(CliTest, HelpAndVersion) {
  Outcome outcome = run({"--version"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, StartsWith("rotunda "));
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {"--help"}, {"generate", "--help"}, {"eval", "ppl", "--help"}, {"calibrate", "--help"}, {"compare", "--help"}, {"info", "--help"}}) {
    outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << arguments[0];
    EXPECT_EQ(outcome.err, "");
    EXPECT_GT(outcome.out.size(), 200u);
  }
}

TEST_F(CliTest, WrongInputGivesOneLineAndItsExitCode) {
  write_file(folder_ / "text", "Some text, enough for a few tokens of it.");
  write_file(folder_ / "empty", "");
  write_file(folder_ / "junk", "this is no safetensors file");
  std::filesystem::create_directories(folder_ / "no_model");
  std::filesystem::create_directories(folder_ / "odd_model");
  write_file(folder_ / "odd_model/config.json", R"({"architectures": ["OddForCausalLM"]})");
  struct Row {
    std::vector<std::string> arguments;
    int exit_code;
    std::string message;
  };
  const std::string text = folder_ / "text";
  const std::vector<Row> rows = {
      {{}, 2, "subcommand"},
      {{"nonsense"}, 2, "nonsense"},
      {{"eval"}, 2, "subcommand"},
      {{"generate"}, 2, "MODEL"},
      {{"generate", kModel, "--max-new-tokens", "many", "--prompt", "a"}, 2, "max-new-tokens"},
      {{"generate", kModel, "--no-such-flag"}, 2, "no-such-flag"},
      {{"generate", kModel}, 2, "--prompt"},
      {{"generate", kModel, "--prompt", "a", "--prompt-file", text}, 2, "expected one"},
      {{"generate", kModel, "--prompt", ""}, 2, "prompt: is empty"},
      {{"generate", kModel, "--prompt-file", folder_ / "empty"}, 2, "is empty"},
      {{"generate", kModel, "--prompt-file", folder_ / "absent"}, 1, "absent: cannot be opened"},
      {{"generate", kModel, "--prompts-file", folder_ / "empty"}, 2, "holds no prompt"},
      {{"generate", folder_ / "absent", "--prompt", "a"}, 2, "absent"},
      {{"generate", folder_ / "no_model", "--prompt", "a"}, 1, "config.json"},
      {{"generate", folder_ / "odd_model", "--prompt", "a"}, 2, "OddForCausalLM"},
      {{"generate", kModel, "--prompt", "a", "--kv", "nonsense"}, 2, "nonsense"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotate2:recent=-1"}, 2, "recent"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotate2:clip=0"}, 2, "clip"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotate2:colour=red"}, 2, "colour"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotate2:"}, 2, "rotate2:"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotunda2:values=5"}, 2, "values=5, expected a number from 2 to 4"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotunda2:balance=even"}, 2, "auto, weights, calibrated, none"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotunda2", "--calibration", folder_ / "junk"}, 2, "junk"},
      {{"generate", kModel, "--prompt", "a", "--kv", "layers 0,12=bf16;rotunda2"}, 2, "layer 12, the model has layers 0 to 7"},
      {{"generate", kModel, "--prompt", "a", "--kv", "layers 0=bf16"}, 2, "layer 1 has no format"},
      {{"generate", kModel, "--prompt", "a", "--kv", "k=rotunda3,v=bf16"}, 2, "keys of rotunda3 do not go with values of bf16"},
      {{"generate", kModel, "--prompt", "a", "--self-check", "maybe"}, 2, "--self-check: got 'maybe', expected on, off or auto"},
      {{"generate", kModel, "--prompt", "a", "--dtype", "fp8"}, 2, "--dtype: got 'fp8'"},
      {{"generate", kModel, "--prompt", "a", "--device", "gpu"}, 2, "--device: got 'gpu', expected cpu, cuda or cuda:N"},
      {{"generate", kModel, "--prompt", "a", "--device", "cuda:x"}, 2, "--device: got 'cuda:x'"},
      {{"info", kModel, "--memory", "0.5"}, 2, "--memory: is for a GPU, --device is cpu"},
      {{"info", kModel, "--device", "cuda", "--memory", "1.5"}, 2, "--memory: got 1.5"},
      {{"generate", kModel, "--prompt", "a", "--threads", "-2"}, 2, "--threads: got -2"},
      {{"generate", kModel, "--prompt", "a", "--temperature", "-1"}, 2, "--temperature: got -1"},
      {{"generate", kModel, "--prompt", "a", "--top-p", "0"}, 2, "--top-p: got 0"},
      {{"generate", kModel, "--prompt", "a", "--prefill-chunk", "0"}, 2, "--prefill-chunk: got 0"},
      {{"generate", kModel, "--prompt", "a", "--max-new-tokens", "2000000000"}, 1, "not enough memory"},
      {{"generate", kModel, "--prompt", "a", "--json", folder_ / "nowhere/out.json"}, 1, "nowhere/out.json: cannot be written"},
      {{"generate", kModel, "--prompt", "a", "--kv", "rotate2", "--calibration", folder_ / "junk"}, 2, "junk"},
      {{"generate", kModel, "--prompt", "a", "--load-cache", folder_ / "junk"}, 2, "junk"},
      {{"generate", kModel, "--prompt", "a", "--load-cache", folder_ / "absent"}, 1, "absent"},
      {{"eval", "ppl", kModel, "--kv", "bf16"}, 2, "--text"},
      {{"eval", "ppl", kModel, "--text", folder_ / "absent", "--kv", "bf16"}, 1, "absent"},
      {{"eval", "ppl", kModel, "--text", folder_ / "empty", "--kv", "bf16"}, 2, "the text has 0 tokens"},
      {{"eval", "ppl", kModel, "--text", text, "--kv", "bf16", "--protocol", "odd"}, 2, "--protocol: got 'odd'"},
      {{"eval", "ppl", kModel, "--text", text, "--kv", "bf16,,fp32"}, 2, "bf16,,fp32"},
      {{"eval", "ppl", kModel, "--text", text, "--kv", "bf16", "--window-len", "1"}, 2, "--window-len: got 1"},
      {{"eval", "answers", kModel, "--data", text, "--kv", "bf16"}, 2, "text:1: is not JSON"},
      {{"eval", "choices", kModel, "--data", folder_ / "empty", "--kv", "bf16"}, 2, "holds no line"},
      {{"eval", "gsm8k", kModel, "--data", text, "--kv", "bf16"}, 2, "text:1: is not JSON"},
      {{"calibrate", kModel, "--text", folder_ / "empty", "--out", folder_ / "out"}, 2, "has no tokens"},
      {{"calibrate", kModel, "--text", text, "--out", folder_ / "nowhere/out"}, 1, "nowhere/out: cannot be written"},
      {{"calibrate", kModel, "--text", text, "--out", folder_ / "out", "--formats", "bf16"}, 2, "bf16 has nothing to calibrate"},
      {{"tune", kModel, "--text", text}, 2, "--budget"},
      {{"tune", kModel, "--text", text, "--budget", "1"}, 2, "--budget: got 1 bits, the smallest format, rotunda2, takes"},
      {{"tune", kModel, "--text", text, "--budget", "3.5"}, 2, "the text has 1 windows of"},
      {{"tune", kModel, "--text", text, "--budget", "3.5", "--formats", "rotunda2,odd"}, 2, "'odd' is unknown"},
      {{"info", folder_ / "odd_model"}, 2, "OddForCausalLM"},
      {{"info", kModel, "--kv-len", "-3"}, 2, "--kv-len: got -3"},
  };
  for (const Row& row : rows) {
    std::string line;
    for (const std::string& argument : row.arguments) line += argument + " ";
    SCOPED_TRACE(line);
    const Outcome outcome = run(row.arguments);
    EXPECT_EQ(outcome.exit_code, row.exit_code) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_THAT(outcome.err, AllOf(StartsWith("rotunda: "), HasSubstr(row.message)));
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_FALSE(std::filesystem::exists(folder_ / "out"));
  }
}

#ifndef ROTUNDA_CUDA
TEST_F(CliTest, ABuildWithoutCudaSaysHowToMakeOne) {
  for (const char* device : {"cuda", "cuda:1"}) {
    const Outcome outcome = run({"generate", kModel, "--prompt", "a", "--device", device});
    EXPECT_EQ(outcome.exit_code, 2);
    EXPECT_THAT(outcome.err, HasSubstr("this build has no CUDA half; build one with `make build-cuda`"));
  }
}
#endif

TEST_F(CliTest, GenerateStreamsTextAndWritesJson) {
  const Outcome outcome = run({"generate", kModel, "--prompt", "The river", "--max-new-tokens", "12", "--json", folder_ / "out.json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("prefill"), HasSubstr("bits per element")));
  const json report = read_json("out.json");
  const json& run_part = report.at("run");
  for (const char* key : {"command", "version", "date", "machine", "kv", "seed", "prefill_chunk", "dtype"}) {
    EXPECT_TRUE(run_part.contains(key)) << key;
  }
  EXPECT_EQ(run_part.at("command"), "generate");
  EXPECT_EQ(run_part.at("prefill_chunk"), 512);
  EXPECT_EQ(run_part.at("max_new_tokens"), 12);
  EXPECT_EQ(run_part.at("prompt"), "The river");
  EXPECT_GT(run_part.at("machine").at("memory_bytes"), 0);
  const json& result = report.at("results").at(0);
  EXPECT_EQ(result.at("kv_requested"), "bf16");
  EXPECT_GE(result.at("bits_per_element"), 16.0);
  EXPECT_GT(result.at("cache_bytes"), 0);
  EXPECT_EQ(result.at("finished"), "complete");
  const json& one = result.at("sequences").at(0);
  EXPECT_EQ(one.at("text").get<std::string>() + "\n", outcome.out);
  EXPECT_EQ(one.at("tokens").size(), 12u);
  EXPECT_EQ(one.at("finished"), "length");
}

TEST_F(CliTest, ABatchFromAFileEqualsTheSinglePrompts) {
  const std::vector<std::string> prompts = {"The river", "Question: How many", "In the year 1815 the king"};
  std::string lines, objects;
  for (const std::string& prompt : prompts) {
    lines += prompt + "\r\n\n";
    objects += json{{"prompt", prompt}}.dump() + "\n";
  }
  write_file(folder_ / "lines", lines);
  write_file(folder_ / "objects", objects);
  std::vector<std::string> texts;
  for (const std::string& prompt : prompts) {
    const Outcome outcome = run({"generate", kModel, "--prompt", prompt, "--max-new-tokens", "8"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
    texts.push_back(outcome.out);
  }
  for (const char* file : {"lines", "objects"}) {
    const Outcome outcome =
        run({"generate", kModel, "--prompts-file", folder_ / file, "--max-new-tokens", "8", "--json", folder_ / "out.json"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
    const json sequences = read_json("out.json").at("results").at(0).at("sequences");
    ASSERT_EQ(sequences.size(), prompts.size());
    for (size_t i = 0; i < prompts.size(); ++i) {
      EXPECT_EQ(sequences[i].at("text").get<std::string>() + "\n", texts[i]);
      EXPECT_THAT(outcome.out, HasSubstr(texts[i]));
    }
  }
}

TEST_F(CliTest, CtrlCKeepsWhatThereIs) {
  const Outcome outcome = run_program(
      {"generate", kModel, "--prompt", "The river", "--max-new-tokens", "100000", "--ignore-eos", "--json", folder_ / "out.json"}, folder_,
      [&](pid_t pid) {
        for (int i = 0; i < 600 && read_file(folder_ / "stdout").size() < 20; ++i) {
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
        }
        kill(pid, SIGINT);
      });
  EXPECT_EQ(outcome.exit_code, 130) << outcome.err;
  EXPECT_GT(outcome.out.size(), 20u);
  const json result = read_json("out.json").at("results").at(0);
  EXPECT_EQ(result.at("finished"), "interrupted");
  EXPECT_EQ(result.at("sequences").at(0).at("finished"), "interrupted");
  EXPECT_EQ(result.at("sequences").at(0).at("text").get<std::string>() + "\n", outcome.out);
}

TEST_F(CliTest, PerplexityOfSeveralCachesWithAFreshCalibration) {
  const std::string text = std::string(ROTUNDA_SOURCE_DIR) + "/assets/calibration.txt";
  Outcome outcome = run({"calibrate", kModel, "--text", text, "--out", folder_ / "calibration", "--max-tokens", "600", "--window-len", "300"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  outcome = run({"eval", "ppl", kModel, "--text", text, "--kv", "bf16,rotate4:recent=16,rotate2:recent=0", "--windows", "1", "--window-len",
                 "256", "--calibration", folder_ / "calibration", "--json", folder_ / "out.json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_FALSE(std::filesystem::exists(folder_ / "cache"));
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("ppl"), HasSubstr("rotate4:recent=16"), HasSubstr("rotate2:recent=0")));
  const json results = read_json("out.json").at("results");
  ASSERT_EQ(results.size(), 3u);
  for (const json& result : results) {
    for (const char* key : {"ppl", "ppl_stderr", "mean_kl", "top1_agreement", "bits_per_element", "cache_bytes", "tok_s", "kv_requested",
                            "kv_used"}) {
      EXPECT_TRUE(result.contains(key)) << key;
    }
  }
  EXPECT_EQ(results[0].at("mean_kl"), 0.0);
  EXPECT_LT(results[0].at("ppl"), results[2].at("ppl"));
  EXPECT_LT(results[1].at("mean_kl"), results[2].at("mean_kl"));
  EXPECT_THAT(results[2].at("kv_used").get<std::string>(), AllOf(HasSubstr("clip="), HasSubstr("recent=0")));
}

TEST_F(CliTest, LayersAndSidesHaveFormatsOfTheirOwn) {
  const std::string text = std::string(ROTUNDA_SOURCE_DIR) + "/assets/calibration.txt";
  const Outcome outcome = run({"eval", "ppl", kModel, "--text", text, "--kv", "layers 0,-1 = bf16; rotunda2:recent=0,k=rotunda2,v=rotunda3:recent=0",
                               "--kv", "rotunda2:recent=0", "--windows", "1", "--window-len", "300", "--json", folder_ / "out.json"});
  ASSERT_EQ(outcome.exit_code, 2) << "an option behind the values' format alone";
  const Outcome mixed = run({"eval", "ppl", kModel, "--text", text, "--kv", "layers 0,-1 = bf16; rotunda2:recent=0,k=rotunda2:recent=0,v=rotunda3",
                             "--kv", "rotunda2:recent=0", "--windows", "1", "--window-len", "300", "--json", folder_ / "out.json"});
  ASSERT_EQ(mixed.exit_code, 0) << mixed.err;
  const json results = read_json("out.json").at("results");
  ASSERT_EQ(results.size(), 3u);
  EXPECT_THAT(results[0].at("kv_used").get<std::string>(), AllOf(StartsWith("layers 0,7=bf16;layers 1-6=rotunda2"), HasSubstr("shift=bias")));
  EXPECT_THAT(results[1].at("kv_used").get<std::string>(), HasSubstr("values=3"));
  for (const int finer : {0, 1}) {
    EXPECT_LT(results[finer].at("mean_kl"), results[2].at("mean_kl"));
    EXPECT_GT(results[finer].at("cache_bytes"), results[2].at("cache_bytes"));
  }
}

TEST_F(CliTest, ABadCacheIsWarnedOfBeforeItIsUsed) {
  const auto generate = [&](const std::string& spec, const std::string& mode) {
    const Outcome outcome = run({"generate", kModel, "--prompt", "The river", "--max-new-tokens", "2", "--kv", spec, "--self-check", mode,
                                 "--json", folder_ / "out.json"});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return outcome.err;
  };
  const auto result = [&] { return read_json("out.json").at("results").at(0).at("self_check"); };
  EXPECT_THAT(generate("rotunda2", "auto"), Not(HasSubstr("does badly")));
  EXPECT_TRUE(result().at("good"));
  EXPECT_TRUE(result().at("better").is_null());
  EXPECT_THAT(generate("rotunda2:recent=0,scale=least_squares", "auto"),
              AllOf(HasSubstr("rotunda: warning: --kv rotunda2:recent=0,scale=least_squares does badly"), HasSubstr("--kv rotunda2 was tried")));
  EXPECT_FALSE(result().at("good"));
  EXPECT_GT(result().at("mean_kl"), 0.05);
  EXPECT_EQ(result().at("better").at("kv"), "rotunda2");
  EXPECT_THAT(generate("rotunda2:recent=0,scale=least_squares", "off"), Not(HasSubstr("does badly")));
  EXPECT_TRUE(result().is_null());
}

TEST_F(CliTest, TunePrintsTheSpecToGoOnWith) {
  const std::string text = std::string(ROTUNDA_SOURCE_DIR) + "/assets/calibration.txt";
  const Outcome outcome = run({"tune", kModel, "--text", text, "--budget", "3.6", "--formats", "rotunda2:recent=0,rotunda4:recent=0", "--windows",
                               "1", "--window-len", "300", "--out", folder_ / "out.json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json result = read_json("out.json").at("results").at(0);
  const std::string spec = result.at("kv");
  EXPECT_THAT(spec, AllOf(StartsWith("layers "), HasSubstr("rotunda4:recent=0")));
  EXPECT_THAT(outcome.out, HasSubstr("--kv \"" + spec + "\"\n"));
  EXPECT_LE(result.at("planned_bits_per_element"), 3.6);
  EXPECT_EQ(result.at("layers").size(), 8u);
  EXPECT_EQ(result.at("candidates").at(0).at("layer_kl").size(), 8u);
  EXPECT_LT(result.at("checked").at(0).at("mean_kl"), result.at("checked").at(1).at("mean_kl"));
  const Outcome generated = run({"generate", kModel, "--prompt", "The river", "--max-new-tokens", "4", "--kv", spec});
  EXPECT_EQ(generated.exit_code, 0) << generated.err;
}

TEST_F(CliTest, InfoAndFormatsNameEveryFormat) {
  const Outcome formats = run({"formats"});
  EXPECT_EQ(formats.exit_code, 0);
  const Outcome info = run({"info", kModel, "--json", folder_ / "out.json"});
  EXPECT_EQ(info.exit_code, 0) << info.err;
  EXPECT_THAT(info.out, AllOf(HasSubstr("LlamaForCausalLM"), HasSubstr("2,048")));
  for (const char* name : {"fp32", "bf16", "fp16", "rotate2", "rotate3", "rotate4"}) {
    EXPECT_THAT(formats.out, HasSubstr(std::string(name) + ": "));
    EXPECT_THAT(info.out, HasSubstr(name));
  }
  const json report = read_json("out.json");
  for (const json& result : report.at("results")) EXPECT_GT(result.at("longest_context"), 2048);
}

}  // namespace
}  // namespace rotunda::cli
