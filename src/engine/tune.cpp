#include "engine/tune.h"

#include <algorithm>
#include <map>

#include "base/check.h"

namespace rotunda::engine {

namespace {

// Layer `layer` in one format, the others as they are in the reference.
kv::KvSpec with_one_layer(const kv::KvSpec& spec, int layer) {
  kv::KvSpec mix{.format = kv::kMixFormat, .options = {}, .parts = {}};
  mix.parts.push_back({.layers = {{layer, layer}}, .spec = spec});
  mix.parts.push_back({.layers = {}, .spec = kv::parse_kv_spec(kReferenceKv)});
  return mix;
}

// @param round of `n_rounds` evaluations that are one stage to the user
EvalOptions evaluation(const TuneOptions& options, std::vector<kv::KvSpec> specs, const char* stage, size_t round,
                       size_t n_rounds) {
  EvalOptions made;
  made.specs = std::move(specs);
  made.calibration_file = options.calibration_file;
  made.limit = options.windows;
  made.stop = options.stop;
  if (options.progress) {
    made.progress = [=, &options](const std::string&, int64_t done, int64_t total) {
      options.progress(stage, static_cast<int64_t>(round) * total + done, static_cast<int64_t>(n_rounds) * total);
    };
  }
  return made;
}

// Bytes of a cache of `kv_len` tokens in one of the model's layers.
int64_t layer_bytes(const Session& session, const kv::KvSpec& spec, int64_t kv_len) {
  const kv::KvFormat& format = session.formats->get(spec);
  kv::KvModel one = session.model->info().kv;
  one.n_layers = 1;
  return format.planned_bytes(format.with_defaults(spec), one, kv_len);
}

}  // namespace

std::vector<size_t> choose_within(const std::vector<std::vector<int64_t>>& bytes,
                                  const std::vector<std::vector<double>>& cost, int64_t budget_bytes) {
  struct State {
    double cost = 0.0;
    std::vector<size_t> choice;
  };
  // By bytes, and only what is cheaper than everything smaller.
  std::map<int64_t, State> states{{0, {}}};
  for (size_t layer = 0; layer < bytes.size(); ++layer) {
    std::map<int64_t, State> next;
    for (const auto& [sum, state] : states) {
      for (size_t c = 0; c < bytes[layer].size(); ++c) {
        if (sum + bytes[layer][c] > budget_bytes) continue;
        const double total = state.cost + cost[layer][c];
        const auto [place, added] = next.try_emplace(sum + bytes[layer][c], State{total, {}});
        if (!added && place->second.cost <= total) continue;
        place->second = {total, state.choice};
        place->second.choice.push_back(c);
      }
    }
    states.clear();
    for (auto& [sum, state] : next)
      if (states.empty() || state.cost < states.rbegin()->second.cost) states.emplace(sum, std::move(state));
  }
  return states.empty() ? std::vector<size_t>() : states.rbegin()->second.choice;
}

kv::KvSpec spec_of_layers(const std::vector<kv::KvSpec>& candidates, const std::vector<size_t>& choice) {
  const auto count = [&](size_t c) { return std::count(choice.begin(), choice.end(), c); };
  size_t commonest = 0;
  for (size_t c = 1; c < candidates.size(); ++c)
    if (count(c) > count(commonest)) commonest = c;
  if (count(commonest) == static_cast<int64_t>(choice.size())) return candidates[commonest];
  kv::KvSpec mix{.format = kv::kMixFormat, .options = {}, .parts = {}};
  for (size_t c = 0; c < candidates.size(); ++c) {
    if (c == commonest || count(c) == 0) continue;
    kv::KvSpecPart& part = mix.parts.emplace_back(kv::KvSpecPart{.layers = {}, .spec = candidates[c]});
    for (size_t layer = 0; layer < choice.size(); ++layer)
      if (choice[layer] == c) part.layers.push_back({static_cast<int>(layer), static_cast<int>(layer)});
  }
  mix.parts.push_back({.layers = {}, .spec = candidates[commonest]});
  return mix;
}

TuneReport tune(const Session& session, std::string_view text, const TuneOptions& options) {
  const model::CausalLmInfo& info = session.model->info();
  ROTUNDA_CHECK(options.windows > 0, "--windows: got ", options.windows, ", expected 1 or more");
  ROTUNDA_CHECK(options.kv_len >= 0, "--kv-len: got ", options.kv_len, ", expected 1 or more");
  ROTUNDA_CHECK(options.candidates.size() >= 2, "--formats: got ", options.candidates.size(),
                ", expected two or more to choose from");
  for (const kv::KvSpec& spec : options.candidates)
    ROTUNDA_CHECK(spec.parts.empty(), "--formats: got the mix ", spec.to_string(),
                  ", expected formats for single layers");
  TuneReport report;
  report.kv_len = options.kv_len > 0 ? options.kv_len : info.max_position_embeddings;

  // What can be wrong with the budget is said before anything is measured.
  const size_t n_layers = static_cast<size_t>(info.kv.n_layers);
  const double layer_elements = 2.0 * info.kv.kv_channels() * static_cast<double>(report.kv_len);
  std::vector<int64_t> bytes;
  for (const kv::KvSpec& spec : options.candidates) {
    bytes.push_back(layer_bytes(session, spec, report.kv_len));
    report.candidates.push_back(
        {.spec = spec, .bits_per_element = 8.0 * static_cast<double>(bytes.back()) / layer_elements, .layer_kl = {}});
  }
  const auto smallest = std::min_element(bytes.begin(), bytes.end()) - bytes.begin();
  const double least = report.candidates[static_cast<size_t>(smallest)].bits_per_element;
  ROTUNDA_CHECK(options.budget >= least, "--budget: got ", options.budget, " bits, the smallest format, ",
                report.candidates[static_cast<size_t>(smallest)].spec.to_string(), ", takes ", least, " at ",
                report.kv_len, " tokens");
  const auto budget_bytes =
      static_cast<int64_t>(std::min(options.budget * layer_elements * static_cast<double>(n_layers) / 8.0, 9e18));

  const TextWindows windows = cut_text(session, text, options.window_len);
  ROTUNDA_CHECK(windows.n_windows >= 2 * options.windows, "the text has ", windows.n_windows, " windows of ",
                windows.window_len, " tokens, expected ", 2 * options.windows,
                ": --windows to measure on and as many to check on");
  // One candidate after the other: the models of one round share all but what their one layer fuses.
  std::vector<std::vector<double>> cost(n_layers);
  for (size_t c = 0; c < report.candidates.size(); ++c) {
    std::vector<kv::KvSpec> mixes;
    for (int layer = 0; layer < info.kv.n_layers; ++layer)
      mixes.push_back(with_one_layer(options.candidates[c], layer));
    const EvalOptions measuring =
        evaluation(options, std::move(mixes), "measuring layers", c, report.candidates.size());
    const PerplexityReport measured = evaluate_perplexity(session, windows, bind_all(session, measuring), measuring);
    if (measured.interrupted) throw Interrupted();
    for (size_t layer = 0; layer < n_layers; ++layer) {
      cost[layer].push_back(measured.results[layer].mean_kl);
      report.candidates[c].layer_kl.push_back(cost[layer].back());
    }
  }

  report.choice = choose_within(std::vector(n_layers, bytes), cost, budget_bytes);
  ROTUNDA_ASSERT(report.choice.size() == n_layers);
  int64_t sum_bytes = 0;
  for (size_t layer = 0; layer < n_layers; ++layer) {
    sum_bytes += bytes[report.choice[layer]];
    report.predicted_kl += cost[layer][report.choice[layer]];
  }
  report.bits_per_element = 8.0 * static_cast<double>(sum_bytes) / (layer_elements * static_cast<double>(n_layers));
  report.spec = spec_of_layers(options.candidates, report.choice);

  std::vector<kv::KvSpec> specs = {report.spec};
  specs.insert(specs.end(), options.candidates.begin(), options.candidates.end());
  const EvalOptions checking = evaluation(options, std::move(specs), "checking the choice", 0, 1);
  report.check = evaluate_perplexity(session, windows, bind_all(session, checking), checking, options.windows);
  if (report.check.interrupted) throw Interrupted();
  return report;
}

}  // namespace rotunda::engine
