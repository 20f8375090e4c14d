#include "engine/session.h"

#include <ATen/Parallel.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "base/check.h"
#include "ops/device.h"

namespace rotunda::engine {

std::set<int64_t> Session::eos_ids() const {
  std::set<int64_t> ids(model->info().eos_token_ids.begin(), model->info().eos_token_ids.end());
  if (const auto id = tokenizer->eos_id()) ids.insert(*id);
  return ids;
}

Session load_session(const SessionOptions& options) {
  ROTUNDA_CHECK(options.threads >= 0, "--threads: got ", options.threads, ", expected 0 (all) or more");
  std::error_code ignored;
  ROTUNDA_CHECK(std::filesystem::is_directory(options.model_dir, ignored), options.model_dir.string(),
                ": no such folder; expected a Hugging Face model folder with config.json");
  if (options.threads > 0) at::set_num_threads(options.threads);

  Session session;
  session.formats = &kv::kv_registry();
  model::CausalLmOptions load;
  load.dtype = options.dtype;
  load.device = options.device;
  load.device_budget_bytes = options.device_budget_bytes;
  const model::CausalLmInfo info = model::read_causal_lm_info(options.model_dir.string(), load);
  ops::require_device(options.device);
  check_specs(*session.formats, options.specs, info.kv);
  session.tokenizer = io::load_tokenizer(options.model_dir);
  if (options.device.is_cuda()) {  // on the CPU weights may be views of the file
    const int64_t available = ops::available_memory_bytes(options.device, options.device_budget_bytes);
    ROTUNDA_CHECK_WORLD(info.weights_bytes() <= available, options.model_dir.string(), ": not enough memory on ", options.device,
                        ": the weights need ", info.weights_bytes(), " bytes, ", available, " bytes are available");
  }
  if (options.progress) {
    load.progress = [&](int64_t done, int64_t total) { options.progress("loading weights", done, total); };
  }
  session.model = model::load_causal_lm(options.model_dir.string(), load);
  ROTUNDA_CHECK(session.tokenizer->vocab_size() <= session.model->info().vocab_size, options.model_dir.string(),
                ": the tokenizer has ids up to ", session.tokenizer->vocab_size() - 1, ", the model's vocabulary is ",
                session.model->info().vocab_size);
  return session;
}

void check_specs(const kv::KvRegistry& formats, const std::vector<kv::KvSpec>& specs, const kv::KvModel& model) {
  for (const kv::KvSpec& spec : specs) {
    const kv::KvFormat& format = formats.get(spec);
    format.validate(spec);
    const auto reason = format.unsupported_reason(spec, model);
    ROTUNDA_CHECK(!reason, "--kv ", spec.to_string(), ": ", reason.value_or(""));
  }
}

std::string read_text_file(const std::filesystem::path& path) {
  std::error_code ignored;
  ROTUNDA_CHECK_WORLD(!std::filesystem::is_directory(path, ignored), path.string(), ": is a folder, expected a text file");
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  ROTUNDA_CHECK_WORLD(in.good(), path.string(), ": cannot be opened: ", std::strerror(errno));
  std::ostringstream text;
  text << in.rdbuf();
  ROTUNDA_CHECK_WORLD(!in.bad() && !text.bad(), path.string(), ": cannot be read: ", std::strerror(errno));
  return std::move(text).str();
}

}  // namespace rotunda::engine
