#include "app/cli/compare_report.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>

#include "base/check.h"

namespace rotunda::cli {

namespace {

constexpr const char* kKind = "rotunda.compare";
constexpr int kVersion = 1;

// Four significant digits: what a picture shows, a fifth of the bytes.
Json for_picture(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.4g", value);
  return std::strtod(text.data(), nullptr);
}

// [rows, columns] fp32 as an array of rows; null where undefined.
Json matrix_json(const at::Tensor& matrix) {
  if (!matrix.defined()) return nullptr;
  Json rows = Json::array();
  const at::Tensor contiguous = matrix.contiguous();
  const float* data = contiguous.const_data_ptr<float>();
  for (int64_t r = 0; r < contiguous.size(0); ++r) {
    Json row = Json::array();
    for (int64_t c = 0; c < contiguous.size(1); ++c) row.push_back(for_picture(data[r * contiguous.size(1) + c]));
    rows.push_back(std::move(row));
  }
  return rows;
}

Json format_json(const engine::CompareRow& row, bool is_reference) {
  Json json = ppl_json(row.quality);
  json["reference"] = is_reference;
  json["decode_tok_s"] = row.decode_tok_s > 0.0 ? Json(row.decode_tok_s) : Json(nullptr);
  json["answers"] = Json::array();
  for (const engine::AccuracyResult& result : row.answers) json["answers"].push_back(accuracy_json(result));
  json["layer_error"] = Json::array();
  for (const double error : row.layer_error) json["layer_error"].push_back(for_picture(error));
  json["retrieved"] = row.retrieved;
  json["keys"] = matrix_json(row.keys);
  json["generated"] = Json::array();
  for (const engine::GeneratedText& text : row.generated) {
    json["generated"].push_back(
        {{"same", text.same},
         {"rest", text.rest},
         {"first_difference", text.first_difference ? Json(*text.first_difference) : Json(nullptr)},
         {"finished", text.finished}});
  }
  return json;
}

// Looks a report over; says what is missing.
class Checker {
 public:
  explicit Checker(const std::string& where) : where_(where) {}

  // The value of `key`, which must be of one of these types ("number/null").
  const Json& get(const Json& object, const std::string& path, const std::string& key, const std::string& types) const {
    const auto it = object.find(key);
    const std::string name = path.empty() ? key : path + "." + key;
    ROTUNDA_CHECK(it != object.end(), where_, ": is no comparison: key '", name, "' is missing");
    ROTUNDA_CHECK(("/" + types + "/").find(concat("/", it->type_name(), "/")) != std::string::npos, where_, ": '", name,
                  "' is ", it->type_name(), ", expected ", types);
    return *it;
  }

  // Throws unless every element of an array is of one of these types.
  void all(const Json& array, const std::string& name, const std::string& types) const {
    for (const Json& element : array) {
      ROTUNDA_CHECK(("/" + types + "/").find(concat("/", element.type_name(), "/")) != std::string::npos, where_, ": '",
                    name, "' holds ", element.type_name(), ", expected ", types);
    }
  }

  // Throws unless it is an array of rows of numbers, all of one length.
  void matrix(const Json& rows, const std::string& name) const {
    all(rows, name, "array");
    for (const Json& row : rows) {
      all(row, name, "number");
      ROTUNDA_CHECK(row.size() == rows[0].size(), where_, ": '", name, "' has rows of ", row.size(), " and of ",
                    rows[0].size(), " numbers");
    }
  }

  void size(const Json& array, const std::string& name, size_t expected) const {
    ROTUNDA_CHECK(array.size() == expected, where_, ": '", name, "' has ", array.size(), " elements, expected ",
                  expected);
  }

 private:
  const std::string& where_;
};

// "reports/retrieval_2000.jsonl" as "retrieval_2000".
std::string stem(const Json& file) { return std::filesystem::path(file.get<std::string>()).stem().string(); }

double number_or_nan(const Json& value) {
  return value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
}

std::string csv_cell(const Json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  const std::string& text = value.get_ref<const std::string&>();
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

std::string csv_line(const std::vector<Json>& cells) {
  std::string line;
  for (size_t i = 0; i < cells.size(); ++i) line += (i > 0 ? "," : "") + csv_cell(cells[i]);
  return line + "\r\n";
}

const std::vector<std::string>& csv_keys() {
  static const std::vector<std::string> keys = {
      "kv_requested", "kv_used",    "bits_per_element", "cache_bytes",    "ppl",
      "ppl_stderr",   "ppl_change", "mean_kl",          "top1_agreement", "decode_tok_s"};
  return keys;
}

}  // namespace

Json compare_json(const engine::CompareReport& report, const engine::CompareOptions& options,
                  const engine::Session& session, Json run) {
  const model::CausalLmInfo& info = session.model->info();
  Json json = {{"kind", kKind}, {"version", kVersion}};
  json["run"] = std::move(run);
  json["model"] = {{"architecture", info.architecture}, {"n_parameters", info.n_parameters},
                   {"n_layers", info.kv.n_layers},      {"n_heads", info.kv.n_heads},
                   {"n_kv_heads", info.kv.n_kv_heads},  {"head_dim", info.kv.head_dim}};
  json["protocol"] = engine::to_string(options.protocol);
  json["window_len"] = report.window_len;
  json["scored_tokens"] = report.scored_tokens;
  json["decode_len"] = report.decode_len;
  json["data"] = Json::array();
  for (const auto& path : options.data) json["data"].push_back(path.string());
  json["retrieval"] = {{"length_from", report.retrieval.length_from}, {"items", report.retrieval.items}};
  json["attention"] = {{"tokens", report.probe_tokens}, {"shares", matrix_json(report.attention)}};
  json["keys"] = {{"layer", report.key_layer},
                  {"head", report.key_head},
                  {"tokens", report.key_tokens},
                  {"tokens_per_row", report.key_tokens_per_row},
                  {"model", matrix_json(report.keys)}};
  json["prompts"] = report.prompts;
  json["formats"] = Json::array();
  for (size_t i = 0; i < report.rows.size(); ++i)
    json["formats"].push_back(format_json(report.rows[i], i == report.reference));
  return json;
}

void check_compare_json(const Json& report, const std::string& where) {
  const Checker check(where);
  ROTUNDA_CHECK(report.is_object(), where, ": is a JSON ", report.type_name(), ", expected an object");
  ROTUNDA_CHECK(check.get(report, "", "kind", "string") == kKind, where, ": 'kind' is ", report["kind"].dump(),
                ", expected \"", kKind, "\"");
  ROTUNDA_CHECK(check.get(report, "", "version", "number") == kVersion, where, ": 'version' is ",
                report["version"].dump(), ", expected ", kVersion);
  check.get(report, "", "run", "object");
  const Json& model = check.get(report, "", "model", "object");
  check.get(model, "model", "architecture", "string");
  for (const char* key : {"n_parameters", "n_layers", "n_heads", "n_kv_heads", "head_dim"})
    check.get(model, "model", key, "number");
  check.get(report, "", "protocol", "string");
  for (const char* key : {"window_len", "scored_tokens", "decode_len"}) check.get(report, "", key, "number");
  const Json& data = check.get(report, "", "data", "array");
  check.all(data, "data", "string");
  const Json& retrieval = check.get(report, "", "retrieval", "object");
  const Json& lengths = check.get(retrieval, "retrieval", "length_from", "array");
  check.all(lengths, "retrieval.length_from", "number");
  check.matrix(check.get(retrieval, "retrieval", "items", "array"), "retrieval.items");
  check.size(retrieval["items"], "retrieval.items", lengths.size());
  const Json& attention = check.get(report, "", "attention", "object");
  check.all(check.get(attention, "attention", "tokens", "array"), "attention.tokens", "string");
  check.matrix(check.get(attention, "attention", "shares", "array"), "attention.shares");
  const Json& keys = check.get(report, "", "keys", "object");
  for (const char* key : {"layer", "head", "tokens", "tokens_per_row"}) check.get(keys, "keys", key, "number");
  check.matrix(check.get(keys, "keys", "model", "array"), "keys.model");
  const Json& prompts = check.get(report, "", "prompts", "array");
  check.all(prompts, "prompts", "string");
  const Json& formats = check.get(report, "", "formats", "array");
  ROTUNDA_CHECK(!formats.empty(), where, ": 'formats' is empty");
  check.all(formats, "formats", "object");
  for (size_t i = 0; i < formats.size(); ++i) {
    const std::string path = concat("formats.", i);
    const Json& format = formats[i];
    for (const char* key : {"kv_requested", "kv_used"}) check.get(format, path, key, "string");
    check.get(format, path, "reference", "boolean");
    for (const char* key :
         {"bits_per_element", "cache_bytes", "ppl", "ppl_stderr", "ppl_change", "mean_kl", "top1_agreement"})
      check.get(format, path, key, "number");
    check.get(format, path, "decode_tok_s", "number/null");
    const Json& answers = check.get(format, path, "answers", "array");
    check.all(answers, path + ".answers", "object");
    check.size(answers, path + ".answers", data.size());
    for (const Json& answer : answers)
      for (const char* key : {"items", "accuracy", "accuracy_stderr"})
        check.get(answer, path + ".answers", key, "number");
    check.all(check.get(format, path, "layer_error", "array"), path + ".layer_error", "number");
    check.matrix(check.get(format, path, "retrieved", "array"), path + ".retrieved");
    check.size(format["retrieved"], path + ".retrieved", lengths.size());
    if (!check.get(format, path, "keys", "array/null").is_null()) check.matrix(format["keys"], path + ".keys");
    const Json& generated = check.get(format, path, "generated", "array");
    check.all(generated, path + ".generated", "object");
    check.size(generated, path + ".generated", prompts.size());
    for (const Json& text : generated) {
      for (const char* key : {"same", "rest", "finished"}) check.get(text, path + ".generated", key, "string");
      check.get(text, path + ".generated", "first_difference", "number/null");
    }
  }
}

Table compare_table(const Json& report) {
  std::vector<std::string> headers = {"kv", "bits/element", "cache", "ppl", "±", "change", "mean KL", "top-1 same"};
  for (const Json& file : report["data"]) headers.push_back(stem(file));
  if (report["decode_len"] > 0) headers.push_back("decode tokens/s");
  Table table(headers);
  for (const Json& format : report["formats"]) {
    std::vector<std::string> row = {
        format["kv_requested"].get<std::string>() + (format["reference"] ? " (reference)" : ""),
        fixed(format["bits_per_element"], 3),
        human_bytes(format["cache_bytes"]),
        fixed(format["ppl"], 3),
        fixed(format["ppl_stderr"], 3),
        signed_percent(format["ppl_change"]),
        fixed(format["mean_kl"], 4),
        fixed(100.0 * format["top1_agreement"].get<double>(), 2) + " %"};
    for (const Json& answers : format["answers"])
      row.push_back(fixed(100.0 * answers["accuracy"].get<double>(), 1) + " %");
    if (report["decode_len"] > 0) row.push_back(fixed(number_or_nan(format["decode_tok_s"]), 1));
    table.add_row(row);
  }
  return table;
}

std::string compare_csv(const Json& report) {
  std::vector<Json> header(csv_keys().begin(), csv_keys().end());
  for (const Json& file : report["data"]) {
    header.push_back("accuracy:" + stem(file));
    header.push_back("accuracy_stderr:" + stem(file));
  }
  std::string csv = csv_line(header);
  for (const Json& format : report["formats"]) {
    std::vector<Json> cells;
    for (const std::string& key : csv_keys()) cells.push_back(format[key]);
    for (const Json& answers : format["answers"]) {
      cells.push_back(answers["accuracy"]);
      cells.push_back(answers["accuracy_stderr"]);
    }
    csv += csv_line(cells);
  }
  return csv;
}

}  // namespace rotunda::cli
