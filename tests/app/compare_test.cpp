#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <regex>

#include "app/program.h"

namespace rotunda::cli {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

const std::string kModel = std::string(ROTUNDA_SOURCE_DIR) + "/models/tiny-gqa";
const std::string kText = std::string(ROTUNDA_SOURCE_DIR) + "/assets/wikitext2_test_head.txt";

// Rows of cells by RFC 4180.
std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows(1, {""});
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    std::string& cell = rows.back().back();
    if (quoted && text[i] == '"' && i + 1 < text.size() && text[i + 1] == '"') {
      cell += text[++i];
    } else if (text[i] == '"') {
      quoted = !quoted;
    } else if (!quoted && text[i] == ',') {
      rows.back().emplace_back();
    } else if (!quoted && text[i] == '\r' && i + 1 < text.size() && text[i + 1] == '\n') {
      ++i;
      rows.push_back({""});
    } else {
      cell += text[i];
    }
  }
  EXPECT_FALSE(quoted);
  EXPECT_EQ(rows.back(), std::vector<std::string>{""});  // the last line ends too
  rows.pop_back();
  return rows;
}

// What a browser takes for the contents of the element that opens with `opening`: up to the next closing tag of any script.
std::string script_after(const std::string& page, const std::string& opening) {
  const size_t begin = page.find(opening);
  EXPECT_NE(begin, std::string::npos);
  const size_t end = page.find("</script", begin);
  EXPECT_NE(end, std::string::npos);
  return page.substr(begin + opening.size(), end - begin - opening.size());
}

const std::string kDataOpening = R"(<script type="application/json" id="report">)";

class CompareTest : public testing::Test {
 protected:
  Outcome run(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "compare");
    return run_program(arguments, folder_);
  }
  // The fastest whole comparison; `more` may say anything again.
  Outcome compare(const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {kModel, "--threads",    "1",  "--text",      kText, "--windows",
                                          "1",    "--window-len", "96", "--limit",     "4",   "--max-new-tokens",
                                          "8",    "--decode-len", "64", "--probe-len", "40"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run(arguments);
  }
  std::string out(const std::string& name) { return read_file(folder_ / ("out/" + name)); }
  // A small report as compare writes it.
  static json small_report();

  TemporaryFolder folder_;
};

json CompareTest::small_report() {
  const auto format = [](const std::string& kv, bool reference) {
    return json{{"kv_requested", kv},
                {"kv_used", kv},
                {"bits_per_element", 2.5},
                {"cache_bytes", 1000},
                {"ppl", 12.5},
                {"ppl_stderr", 0.5},
                {"ppl_change", 0.01},
                {"mean_kl", 0.02},
                {"top1_agreement", 0.9},
                {"reference", reference},
                {"decode_tok_s", nullptr},
                {"answers", {{{"items", 4}, {"accuracy", 0.5}, {"accuracy_stderr", 0.1}}}},
                {"layer_error", {0.1, 0.2}},
                {"retrieved", {{1, 0, 0, 0, 0}}},
                {"keys", {{1.0, 2.0}, {3.0, 4.0}}},
                {"generated", {{{"same", "a"}, {"rest", "b"}, {"first_difference", 1}, {"finished", "length"}}}}};
  };
  return {
      {"kind", "rotunda.compare"},
      {"version", 1},
      {"run", {{"model", "m"}}},
      {"model",
       {{"architecture", "A"},
        {"n_parameters", 1000},
        {"n_layers", 2},
        {"n_heads", 2},
        {"n_kv_heads", 1},
        {"head_dim", 2}}},
      {"protocol", "quantize-all"},
      {"window_len", 96},
      {"scored_tokens", 95},
      {"decode_len", 0},
      {"data", {"dir/items.jsonl"}},
      {"retrieval", {{"length_from", {4}}, {"items", {{2, 0, 0, 0, 0}}}}},
      {"attention", {{"tokens", {"a", "b"}}, {"shares", {{0.5, 0.5}, {0.9, 0.1}}}}},
      {"keys", {{"layer", 0}, {"head", 0}, {"tokens", 2}, {"tokens_per_row", 1}, {"model", {{1.0, 2.0}, {3.0, 4.0}}}}},
      {"prompts", {"p"}},
      {"formats", {format("bf16", true), format("rotunda2:recent=0,first=0", false)}}};
}

TEST_F(CompareTest, OneRunWritesPageJsonAndCsv) {
  write_file(folder_ / "retrieval.jsonl",
             R"({"prompt": "The code is 4711. What is the code?\nThe code is", "answer": "4711"})"
             "\n"
             R"({"prompt": "The river", "answer": "xyz"})"
             "\n");
  const std::string nasty =
      "</script><script>alert(1)</script> \"quoted\" 'single' & <b> Caf\xc3\xa9 \xe6\xbc\xa2 \xff\xfe end";
  write_file(folder_ / "prompts", "The river\n" + nasty + "\n");
  const Outcome outcome = compare({"--kv", "rotunda4,rotunda2:recent=0,first=0", "--data", folder_ / "retrieval.jsonl",
                                   "--prompts", folder_ / "prompts", "--out", folder_ / "out"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("bf16 (reference)"), HasSubstr("rotunda2:first=0,recent=0"),
                                 HasSubstr("decode tokens/s"), HasSubstr("retrieval")));

  const json report = json::parse(out("report.json"));
  EXPECT_EQ(report.at("run").at("command"), "compare");
  EXPECT_EQ(report.at("run").at("windows"), 1);
  EXPECT_GT(report.at("run").at("machine").at("memory_bytes"), 0);
  EXPECT_EQ(report.at("window_len"), 96);
  const json& formats = report.at("formats");
  ASSERT_EQ(formats.size(), 3u);
  EXPECT_TRUE(formats[0].at("reference").get<bool>());
  EXPECT_EQ(formats[0].at("mean_kl"), 0.0);
  EXPECT_LT(formats[1].at("mean_kl"), formats[2].at("mean_kl"));
  EXPECT_LT(formats[2].at("bits_per_element"), formats[1].at("bits_per_element"));
  for (const json& format : formats) {
    EXPECT_GT(format.at("decode_tok_s"), 0.0);
    EXPECT_EQ(format.at("layer_error").size(), 8u);
    EXPECT_EQ(format.at("keys").size(), 40u);
    EXPECT_EQ(format.at("keys")[0].size(), 64u);
    EXPECT_EQ(format.at("answers")[0].at("items"), 2);
    EXPECT_EQ(format.at("generated").size(), 2u);
  }
  EXPECT_EQ(report.at("retrieval").at("items"), (json{{0, 1, 0, 0, 0}}));
  EXPECT_EQ(report.at("attention").at("shares").size(), 8u);
  EXPECT_EQ(report.at("prompts")[1],
            "</script><script>alert(1)</script> \"quoted\" 'single' & <b> Caf\xc3\xa9 \xe6\xbc\xa2 "
            "\xef\xbf\xbd\xef\xbf\xbd end");

  const auto csv = parse_csv(out("report.csv"));
  ASSERT_EQ(csv.size(), 4u);
  for (const auto& row : csv) EXPECT_EQ(row.size(), 12u);
  EXPECT_EQ(csv[0][10], "accuracy:retrieval");
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(csv[i + 1][0], formats[i].at("kv_requested"));
    EXPECT_EQ(csv[i + 1][1], formats[i].at("kv_used"));
    EXPECT_EQ(json::parse(csv[i + 1][4]), formats[i].at("ppl"));
  }

  // The page holds the whole report, as nothing but data.
  const std::string page = out("report.html");
  EXPECT_EQ(json::parse(script_after(page, kDataOpening)), report);
  EXPECT_THAT(page, Not(HasSubstr("alert(1)</script>")));

  // Drawn again from the JSON alone: the same bytes.
  const Outcome again = run({"--from", folder_ / "out/report.json", "--out", folder_ / "again/"});
  ASSERT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(again.out, outcome.out);
  for (const char* name : {"report.json", "report.csv", "report.html"}) {
    EXPECT_EQ(read_file(folder_ / (std::string("again/") + name)), out(name)) << name;
  }
}

TEST_F(CompareTest, ThePageAsksTheNetworkForNothing) {
  write_file(folder_ / "report.json", small_report().dump());
  ASSERT_EQ(run({"--from", folder_ / "report.json", "--out", folder_ / "out"}).exit_code, 0);
  const std::string page = out("report.html");
  EXPECT_THAT(page, HasSubstr("default-src 'none'"));
  EXPECT_THAT(page, HasSubstr("Licensed to the Apache Software Foundation"));
  // URLs stand in the library's licence and as names of XML's namespaces; nothing outside of it has one, and no attribute loads one.
  std::string own = page;
  const std::string library = script_after(page, "<script>");
  own.erase(own.find(library), library.size());
  EXPECT_THAT(own, Not(HasSubstr("://")));
  for (const char* loads : {"src=", "<link", "@import", "url(", "fetch(", "XMLHttpRequest", "import("})
    EXPECT_THAT(own, Not(HasSubstr(loads))) << loads;
  EXPECT_FALSE(std::regex_search(own, std::regex("href\\s*=")));
}

TEST_F(CompareTest, TextsAreNeverMarkup) {
  json report = small_report();
  const std::string nasty =
      "</script><!--<script>]]>&lt; \"'`\\ \xe2\x80\xa8 /*ROTUNDA:REPORT*/ /*ROTUNDA:ECHARTS*/ =1+1";
  report["prompts"][0] = nasty;
  report["run"]["model"] = nasty;
  report["attention"]["tokens"][0] = nasty;
  report["formats"][1]["kv_requested"] = nasty;
  report["formats"][1]["generated"][0]["rest"] = nasty;
  write_file(folder_ / "report.json", report.dump());
  const Outcome outcome = run({"--from", folder_ / "report.json", "--out", folder_ / "out"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const std::string page = out("report.html");
  const std::string data = script_after(page, kDataOpening);
  EXPECT_EQ(json::parse(data), report);
  EXPECT_EQ(data.find_first_of("<>&"), std::string::npos);
  EXPECT_TRUE(std::all_of(data.begin(), data.end(), [](char c) { return c >= 32 && c < 127; }));
  EXPECT_EQ(parse_csv(out("report.csv"))[2][0], nasty);
}

TEST_F(CompareTest, WrongInputGivesOneLineBeforeAnyWork) {
  std::filesystem::create_directories(folder_ / "full");
  write_file(folder_ / "full/file", "x");
  write_file(folder_ / "odd", "no JSON");
  write_file(folder_ / "deep", std::string(100000, '['));
  const auto report_with = [&](const std::string& name, const std::function<void(json&)>& change) {
    json report = small_report();
    change(report);
    write_file(folder_ / name, report.dump());
    return folder_ / name;
  };
  const std::string out = folder_ / "out";
  struct Row {
    std::vector<std::string> arguments;
    int exit_code;
    std::string message;
  };
  const std::vector<Row> rows = {
      {{kModel, "--text", kText}, 2, "--out"},
      {{"--out", out}, 2, "expected MODEL and --text FILE"},
      {{kModel, "--text", kText, "--out", out, "--kv", "bf16,nonsense"}, 2, "nonsense"},
      {{kModel, "--text", kText, "--out", out, "--kv", "rotunda2:values=9"}, 2, "values=9"},
      {{kModel, "--text", folder_ / "absent", "--out", out}, 1, "absent"},
      {{kModel, "--text", kText, "--out", out, "--data", folder_ / "absent"}, 1, "absent"},
      {{kModel, "--text", kText, "--out", out, "--data", folder_ / "odd"}, 2, "odd:1: is not JSON"},
      {{kModel, "--text", kText, "--out", out, "--prompts", folder_ / "absent"}, 1, "absent"},
      {{kModel, "--text", kText, "--out", out, "--key-layer", "8"}, 2, "--key-layer: got 8"},
      {{kModel, "--text", kText, "--out", folder_ / "full"}, 2, "full: is not empty"},
      {{kModel, "--text", kText, "--out", folder_ / "odd"}, 1, "odd: is a file"},
      {{kModel, "--text", kText, "--out", folder_ / "nowhere/out"}, 1, "nowhere/out: cannot be written"},
      {{"--from", folder_ / "absent", "--out", out}, 1, "absent"},
      {{"--from", folder_ / "odd", "--out", out}, 2, "odd: is not JSON"},
      {{"--from", folder_ / "deep", "--out", out}, 2, "deep: is nested more than 64 deep"},
      {{"--from", folder_ / "odd", "--text", kText, "--out", out}, 2, "--from: draws a report that is there"},
      {{"--from", report_with("kind", [](json& r) { r["kind"] = "other"; }), "--out", out}, 2, "'kind' is \"other\""},
      {{"--from", report_with("version", [](json& r) { r["version"] = 2; }), "--out", out},
       2,
       "'version' is 2, expected 1"},
      {{"--from", report_with("ppl", [](json& r) { r["formats"][1]["ppl"] = "low"; }), "--out", out},
       2,
       "'formats.1.ppl' is string, expected number"},
      {{"--from", report_with("prompt", [](json& r) { r["prompts"].push_back("q"); }), "--out", out},
       2,
       "'formats.0.generated' has 1 elements, expected 2"},
      {{"--from", report_with("keys", [](json& r) { r["formats"][0]["keys"][1].push_back(1); }), "--out", out},
       2,
       "'formats.0.keys' has rows of 3 and of 2"},
      {{"--from", report_with("none", [](json& r) { r.erase("attention"); }), "--out", out},
       2,
       "key 'attention' is missing"},
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
  EXPECT_EQ(read_file(folder_ / "full/file"), "x");
}

TEST_F(CompareTest, ForceWritesBesideWhatIsThere) {
  std::filesystem::create_directories(folder_ / "out");
  write_file(folder_ / "out/other", "x");
  write_file(folder_ / "report.json", small_report().dump());
  const Outcome outcome = run({"--from", folder_ / "report.json", "--out", folder_ / "out", "--force"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(out("other"), "x");
  EXPECT_EQ(json::parse(out("report.json")), small_report());
}

// Whether the process has a handler for SIGINT by now.
bool catches_interrupt(pid_t pid) {
  const std::string status = read_file("/proc/" + std::to_string(pid) + "/status");
  const size_t at = status.find("SigCgt:");
  return at != std::string::npos && (std::stoull(status.substr(at + 7), nullptr, 16) >> (SIGINT - 1) & 1) == 1;
}

TEST_F(CompareTest, CtrlCWritesNothing) {
  const std::vector<std::string> arguments = {"compare", kModel,          "--threads", "1",
                                              "--text",  kText,           "--windows", "0",
                                              "--kv",    "bf16,rotunda2", "--out",     folder_ / "out"};
  const Outcome outcome = run_program(arguments, folder_, [](pid_t pid) {
    for (int i = 0; i < 600 && !catches_interrupt(pid); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::this_thread::sleep_for(std::chrono::seconds(1));
    kill(pid, SIGINT);
  });
  EXPECT_EQ(outcome.exit_code, 130) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("interrupted"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out"));
}

}  // namespace
}  // namespace rotunda::cli
