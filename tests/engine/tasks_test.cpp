#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine/answers.h"
#include "engine/choices.h"
#include "engine/gsm8k.h"
#include "engine/toy.h"

namespace rotunda::engine {
namespace {

using nlohmann::json;
using testing::HasSubstr;

// What the model itself says after `prompt`, byte by byte, greedy.
std::string own_words(const Session& session, const std::string& prompt, int n) {
  const KvBinding binding = toy::bind(session, "fp32");
  std::vector<int64_t> ids = session.tokenizer->encode(prompt, true);
  std::string out;
  for (int i = 0; i < n; ++i) {
    const at::Tensor hidden = toy::run_whole(binding, ids);
    ids.push_back(binding.model->logits(hidden[-1].unsqueeze(0)).argmax().item<int64_t>());
    const std::string text = session.tokenizer->decode({ids.back()}, false);
    out += text.empty() ? std::string(1, '\0') : text;
  }
  return out;
}

double naive_log_prob(const Session& session, const std::string& context, const std::string& continuation) {
  const KvBinding binding = toy::bind(session, "fp32");
  const auto ids = session.tokenizer->encode(context + continuation, true);
  const at::Tensor log_probs = at::log_softmax(binding.model->logits(toy::run_whole(binding, ids)).to(at::kDouble), -1);
  double sum = 0.0;
  for (size_t i = ids.size() - continuation.size(); i < ids.size(); ++i) {
    sum += log_probs[static_cast<int64_t>(i) - 1][ids[i]].item<double>();
  }
  return sum;
}

std::string bytes_json(const json& object) { return object.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"; }

class TasksTest : public testing::Test {
 protected:
  Session session_ = toy::make_session();
  toy::TemporaryFolder folder_;
  std::filesystem::path data_ = folder_ / "data.jsonl";

  template <typename Options>
  Options options_for(const std::string& content, const std::string& specs = "fp32,bf16") {
    toy::write_file(data_, content);
    Options options;
    options.data = data_;
    options.specs = kv::parse_kv_specs(specs);
    return options;
  }
};

TEST_F(TasksTest, AnswersAreRightWhereEveryTokenIsTheLikeliest) {
  // A random model seldom goes on with a space and a letter: models and prompts are tried until one does. What it says
  // depends on the last byte most.
  std::string prompt, right;
  for (uint64_t seed = 1; seed < 200 && right.empty(); ++seed) {
    session_ = toy::make_session(true, seed);
    const char after_space = own_words(session_, "try ", 1)[0];
    if (after_space <= ' ' || after_space >= 127) continue;
    for (char last = '!'; last < 127 && right.empty(); ++last) {
      prompt = std::string("try") + last;
      const std::string words = own_words(session_, prompt, 2);
      if (words.size() == 2 && words[0] == ' ' && words[1] > ' ' && words[1] < 127) right = words.substr(1);
    }
  }
  ASSERT_FALSE(right.empty());
  const std::string wrong = right == "x" ? "y" : "x";
  const std::string content = bytes_json({{"prompt", prompt}, {"answer", right}}) + bytes_json({{"prompt", prompt}, {"answer", wrong}}) +
                              bytes_json({{"prompt", prompt}, {"solution", right}, {"answer", right}});
  for (const Protocol protocol : {Protocol::kQuantizeAll, Protocol::kDeploy}) {
    auto options = options_for<AnswersOptions>(content);
    options.protocol = protocol;
    const AccuracyReport report = evaluate_answers(session_, options);
    ASSERT_EQ(report.results.size(), 2u);
    EXPECT_DOUBLE_EQ(report.results[0].accuracy, 1.0 / 3.0);
    EXPECT_GT(report.results[0].cache_bytes, report.results[1].cache_bytes);
  }
}

TEST_F(TasksTest, ChoicesTakeTheLargestLogLikelihood) {
  const std::vector<std::string> choices = {"yes", "no way at all", "perhaps", "a"};
  std::string content;
  double right = 0.0, right_norm = 0.0;
  constexpr int kItems = 12;
  for (int i = 0; i < kItems; ++i) {
    const std::string query = concat("Question: is ", i, " a number?");
    const size_t gold = static_cast<size_t>(i) % choices.size();
    content += bytes_json({{"query", query + "\n"}, {"choices", choices}, {"gold", gold}});
    std::vector<double> sums, norms;
    for (const std::string& choice : choices) {
      sums.push_back(naive_log_prob(session_, query + "\nAnswer:", " " + choice));
      norms.push_back(sums.back() / static_cast<double>(choice.size()));
    }
    const auto best = [](const std::vector<double>& v) { return static_cast<size_t>(std::max_element(v.begin(), v.end()) - v.begin()); };
    right += best(sums) == gold ? 1.0 : 0.0;
    right_norm += best(norms) == gold ? 1.0 : 0.0;
  }
  for (const Protocol protocol : {Protocol::kQuantizeAll, Protocol::kDeploy}) {
    auto options = options_for<ChoicesOptions>(content);
    options.protocol = protocol;
    options.prefill_chunk = 7;
    const AccuracyResult result = evaluate_choices(session_, options).results[0];
    EXPECT_DOUBLE_EQ(result.accuracy, right / kItems);
    EXPECT_DOUBLE_EQ(result.accuracy_norm.value(), right_norm / kItems);
    EXPECT_NEAR(result.accuracy_stderr, std::sqrt(result.accuracy * (1 - result.accuracy) / (kItems - 1)), 1e-12);
  }
}

TEST_F(TasksTest, PartialEvaluationScoresTheContinuationAfterEachContext) {
  std::string content;
  double right = 0.0;
  for (int i = 0; i < 10; ++i) {
    const std::vector<std::string> contexts = {concat("Ann met Bob so ", i), concat("Ann met Bob then ", i)};
    const double first = naive_log_prob(session_, contexts[0], " left.");
    const double second = naive_log_prob(session_, contexts[1], " left.");
    right += (i % 2 == 0 ? first > second : second > first) ? 1.0 : 0.0;
    content += bytes_json({{"context_options", contexts}, {"continuation", "left."}, {"gold", i % 2}});
  }
  for (const Protocol protocol : {Protocol::kQuantizeAll, Protocol::kDeploy}) {
    auto options = options_for<ChoicesOptions>(content);
    options.protocol = protocol;
    EXPECT_DOUBLE_EQ(evaluate_choices(session_, options).results[0].accuracy, right / 10.0);
  }
}

TEST_F(TasksTest, WrongLinesAreNamed) {
  const auto choices_error = [&](const std::string& content) {
    const auto options = options_for<ChoicesOptions>(content);
    return toy::error_of([&] { evaluate_choices(session_, options); });
  };
  const std::string good = R"({"query": "q", "choices": ["a", "b"], "gold": 0})" "\n";
  EXPECT_THAT(choices_error(good + R"({"question": "q"})"), HasSubstr("data.jsonl:2: unknown form"));
  EXPECT_THAT(choices_error(R"({"query": "q", "choices": ["a", "b"], "gold": 2})"), HasSubstr(":1: 'gold' is 2, expected 0 to 1"));
  EXPECT_THAT(choices_error(R"({"query": "q", "choices": ["a"], "gold": 0})"), HasSubstr(":1: 1 choices, expected 2 or more"));
  EXPECT_THAT(choices_error(R"({"query": "q", "choices": ["a", ""], "gold": 0})"), HasSubstr(":1: a choice is empty"));
  EXPECT_THAT(choices_error(R"({"query": "q", "choices": "ab", "gold": 0})"), HasSubstr("'choices' is a string, expected an array"));
  EXPECT_THAT(choices_error(R"({"query": "q", "choices": ["a", "b"]})"), HasSubstr("key 'gold' is missing"));
  EXPECT_THAT(choices_error("\n{nonsense"), HasSubstr(":2: is not JSON"));
  EXPECT_THAT(choices_error("[1]"), HasSubstr(":1: is a array, expected an object"));
  EXPECT_THAT(choices_error("\n \n"), HasSubstr("holds no line"));
  AnswersOptions answers = options_for<AnswersOptions>(R"({"prompt": 3, "answer": "x"})");
  EXPECT_THAT(toy::error_of([&] { evaluate_answers(session_, answers); }), HasSubstr("'prompt' is a number, expected a string"));
  answers.data = folder_ / "absent";
  EXPECT_THAT(toy::error_of([&] { evaluate_answers(session_, answers); }), HasSubstr("absent: cannot be opened"));
}

TEST(Gsm8k, ExtractsTheNumberOfAReply) {
  EXPECT_EQ(extract_answer(" 5 + 4 = 9. The answer is 9."), "9");
  EXPECT_EQ(extract_answer("so the answer is $1,234.50 a year, for 3"), "1234.5");
  EXPECT_EQ(extract_answer("She has 18.0 eggs"), "18");
  EXPECT_EQ(extract_answer("first 3 then -7"), "-7");
  EXPECT_EQ(extract_answer("The answer is 3. No: the answer is 70."), "70");
  EXPECT_EQ(extract_answer("none at all"), std::nullopt);
  EXPECT_EQ(extract_answer(""), std::nullopt);
}

TEST_F(TasksTest, Gsm8kRunsInBatchesThatDoNotChangeTheOutcome) {
  std::string content;
  for (int i = 0; i < 5; ++i) content += bytes_json({{"question", concat("How much is ", i, "?")}, {"answer", concat("It is\n#### ", i)}});
  auto options = options_for<Gsm8kOptions>(content, "fp32");
  options.max_new_tokens = 8;
  std::vector<double> accuracies;
  for (const int64_t batch_size : {1, 2, 8}) {
    options.batch_size = batch_size;
    const AccuracyReport report = evaluate_gsm8k(session_, options);
    EXPECT_EQ(report.results[0].items, 5);
    EXPECT_FALSE(report.interrupted);
    accuracies.push_back(report.results[0].accuracy);
  }
  EXPECT_EQ(accuracies[0], accuracies[1]);
  EXPECT_EQ(accuracies[0], accuracies[2]);
  const auto bad = options_for<Gsm8kOptions>(R"({"question": "q", "answer": "12"})");
  EXPECT_THAT(toy::error_of([&] { evaluate_gsm8k(session_, bad); }), HasSubstr(":1: 'answer' has no '####'"));
}

}  // namespace
}  // namespace rotunda::engine
