#include "engine/generate.h"

#include <cstdio>
#include <memory>

#include "app/cli/arguments.h"
#include "app/cli/commands.h"
#include "app/cli/interrupt.h"
#include "app/cli/output.h"
#include "app/cli/report.h"
#include "app/cli/table.h"
#include "base/check.h"
#include "base/log.h"
#include "engine/self_check.h"

namespace rotunda::cli {

namespace {

struct Arguments {
  ModelArguments model;
  std::string prompt;
  bool has_prompt = false;
  std::string prompt_file;
  std::string prompts_file;
  std::string kv = engine::kReferenceKv;
  std::string calibration;
  std::string self_check = "auto";
  std::string save_cache;
  std::string load_cache;
  std::string json;
  engine::GenerateOptions options;
};

// An editor ends a file in a newline that nobody means as part of the prompt.
std::string read_prompt(const std::string& path) {
  std::string text = engine::read_text_file(path);
  if (text.ends_with('\n')) text.pop_back();
  if (text.ends_with('\r')) text.pop_back();
  ROTUNDA_CHECK(!text.empty(), path, ": is empty, expected a prompt");
  return text;
}

std::vector<std::string> gather_prompts(const Arguments& arguments) {
  const int given = (arguments.has_prompt ? 1 : 0) + (arguments.prompt_file.empty() ? 0 : 1) + (arguments.prompts_file.empty() ? 0 : 1);
  ROTUNDA_CHECK(given == 1 || (given == 0 && !arguments.load_cache.empty()), "got ", given,
                " of --prompt, --prompt-file and --prompts-file, expected one of them");
  if (!arguments.prompts_file.empty()) return read_prompts(arguments.prompts_file);
  return {arguments.prompt_file.empty() ? arguments.prompt : read_prompt(arguments.prompt_file)};
}

void print_batch(const engine::GenerateResult& result, const std::vector<std::string>& prompts) {
  for (size_t i = 0; i < prompts.size(); ++i) {
    write_stdout(concat(i > 0 ? "\n" : "", "== prompt ", i + 1, " (", engine::to_string(result.sequences[i].finished), ")\n",
                        result.sequences[i].text, "\n"));
  }
}

void print_statistics(const engine::GenerateResult& result, const engine::KvBinding& binding) {
  std::fprintf(stderr,
               "prompt tokens %s, new tokens %s, first token after %s ms, prefill %s tokens/s, decode %s tokens/s\n"
               "cache %s: %s bits per element, %s bytes\n",
               grouped(result.prompt_tokens).c_str(), grouped(result.new_tokens).c_str(), fixed(result.ttft_ms, 1).c_str(),
               fixed(result.prefill_tok_s, 1).c_str(), fixed(result.decode_tok_s, 1).c_str(), binding.used.to_string().c_str(),
               fixed(result.bits_per_element, 3).c_str(), grouped(result.cache_bytes).c_str());
}

Json quality_json(const engine::CacheQuality& quality) {
  return {{"kv", quality.requested.to_string()},
          {"mean_kl", quality.mean_kl},
          {"top1_agreement", quality.top1_agreement},
          {"good", quality.good()}};
}

Json self_check_json(const std::optional<engine::SelfCheck>& check) {
  if (!check) return nullptr;
  Json json = quality_json(check->quality);
  json["tokens"] = check->tokens;
  json["seconds"] = check->seconds;
  json["better"] = check->better ? quality_json(*check->better) : Json(nullptr);
  return json;
}

Json result_json(const engine::GenerateResult& result, const engine::KvBinding& binding, const std::vector<std::string>& prompts) {
  Json json = {{"kv_requested", binding.requested.to_string()},
               {"kv_used", binding.used.to_string()},
               {"prompt_tokens", result.prompt_tokens},
               {"new_tokens", result.new_tokens},
               {"ttft_ms", result.ttft_ms},
               {"prefill_tok_s", result.prefill_tok_s},
               {"decode_tok_s", result.decode_tok_s},
               {"tok_s", result.decode_tok_s},
               {"bits_per_element", result.bits_per_element},
               {"cache_bytes", result.cache_bytes},
               {"finished", result.interrupted() ? "interrupted" : "complete"},
               {"sequences", Json::array()}};
  for (size_t i = 0; i < result.sequences.size(); ++i) {
    const engine::GeneratedSequence& one = result.sequences[i];
    json["sequences"].push_back({{"prompt", prompts[i]},
                                 {"prompt_tokens", one.prompt_tokens},
                                 {"text", one.text},
                                 {"tokens", one.tokens},
                                 {"finished", engine::to_string(one.finished)},
                                 {"ttft_ms", one.ttft_ms}});
  }
  return json;
}

int run_generate(const Arguments& arguments, const CLI::App& command) {
  const engine::StopFlag stop = catch_interrupt();
  ProgressPrinter progress;
  engine::GenerateRequest request;
  request.prompts = gather_prompts(arguments);
  request.options = arguments.options;
  request.options.progress = progress.callback();
  request.options.stop = stop;
  request.load_cache = optional_path(arguments.load_cache);
  request.save_cache = optional_path(arguments.save_cache);
  for (const std::string& path : {arguments.json, arguments.save_cache}) {
    if (!path.empty()) check_writable(path);
  }
  const engine::SelfCheckMode self_check = engine::parse_self_check(arguments.self_check);
  const kv::KvSpec spec = kv::parse_kv_spec(arguments.kv);
  const engine::Session session = arguments.model.load({spec}, progress);
  const engine::KvBinding binding = engine::bind_kv(session, spec, optional_path(arguments.calibration), progress.callback(), stop);
  const auto checked = engine::self_check(session, binding, self_check, progress.callback(), stop);
  progress.clear();
  if (checked && !checked->quality.good()) ROTUNDA_LOG_WARN("{}", checked->warning());

  const bool streamed = request.prompts.size() == 1;
  if (streamed) {
    request.options.on_text = [&](size_t, const std::string& text) {
      progress.clear();
      write_stdout(text);
    };
  }
  const engine::GenerateResult result = engine::generate(session, binding, request);
  progress.clear();
  if (streamed) {
    write_stdout("\n");
  } else {
    print_batch(result, request.prompts);
  }
  print_statistics(result, binding);
  Json json = result_json(result, binding, request.prompts);
  json["self_check"] = self_check_json(checked);
  write_report(arguments.json, run_json(command), Json::array({json}));
  return result.interrupted() ? kExitInterrupted : 0;
}

}  // namespace

void add_generate(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("generate", "Continue a prompt, or a batch of prompts");
  const auto arguments = std::make_shared<Arguments>();
  engine::GenerateOptions& options = arguments->options;
  arguments->model.add_to(*command);
  CLI::Option* prompt = command->add_option("--prompt", arguments->prompt, "The text to continue");
  command->add_option("--prompt-file", arguments->prompt_file, "File whose whole text is the prompt (one newline at its end left out)");
  command->add_option("--prompts-file", arguments->prompts_file, "File of prompts, one per line or JSONL {\"prompt\": ...}; run together");
  command->add_option("--kv", arguments->kv, "Cache: NAME[:KEY=VALUE,...], or a mix: layers N,N-M,...=NAME...;NAME...; see `rotunda formats`")->type_name("SPEC")->capture_default_str();
  command->add_option("--calibration", arguments->calibration, "Calibration file, as `rotunda calibrate` writes it");
  command
      ->add_option("--self-check", arguments->self_check,
                   "Try the cache on a few hundred tokens first and warn where it does badly: on, off, or auto (below 4 bits)")
      ->capture_default_str();
  command->add_option("--max-new-tokens", options.max_new_tokens, "Tokens to generate at most, each prompt")->capture_default_str();
  command->add_option("--temperature", options.sampling.temperature, "0: always the likeliest token")->capture_default_str();
  command->add_option("--top-k", options.sampling.top_k, "Sample among the k likeliest tokens; 0: all")->capture_default_str();
  command->add_option("--top-p", options.sampling.top_p, "Sample among the likeliest tokens that hold this probability")
      ->capture_default_str();
  command->add_option("--seed", options.sampling.seed, "Of the sampling; prompt i of a batch has its own stream")->capture_default_str();
  command->add_option("--stop", options.stops, "End where this text comes up; may be given several times")->allow_extra_args(false);
  command->add_option("--prefill-chunk", options.prefill_chunk, "Most tokens of a prompt in one step")->capture_default_str();
  command->add_flag("--ignore-eos", options.ignore_eos, "Go on after the end-of-text token");
  command->add_option("--save-cache", arguments->save_cache, "Keep the sequence's cache in this file at the end");
  command->add_option("--load-cache", arguments->load_cache, "Go on after the sequence that this file holds (same model and --kv)");
  command->add_option("--json", arguments->json, "Write options, machine and results to this file");
  command->footer(
      "Text goes to stdout as it comes, statistics to stderr.\n"
      "Examples:\n"
      "  rotunda generate models/tiny-gqa --prompt 'The river' --kv rotunda2 --max-new-tokens 64\n"
      "  rotunda generate models/tiny-gqa --prompt-file book.txt --kv rotunda2:recent=128 --save-cache book.cache\n"
      "  rotunda generate models/tiny-gqa --prompts-file prompts.jsonl --temperature 0.8 --top-p 0.95 --seed 7");
  command->callback([arguments, command, prompt, &run] {
    arguments->has_prompt = prompt->count() > 0;
    run = [=] { return run_generate(*arguments, *command); };
  });
}

}  // namespace rotunda::cli
