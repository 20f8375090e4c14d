#include "engine/calibration.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/check.h"
#include "base/env.h"
#include "base/log.h"
#include "engine/cache_decorator.h"
#include "engine/step.h"
#include "io/safetensors.h"

namespace rotunda::engine {

namespace {

constexpr const char* kKind = "calibration";
constexpr int64_t kVersion = 1;
constexpr int64_t kDefaultWindowLen = 2048;
// Enough for statistics of a few hundred channels to settle, and seconds rather than minutes on two cores.
constexpr int64_t kBuiltinMaxTokens = 16384;

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ",") + part;
  return text;
}

// BOS and the next window_len - 1 tokens; without BOS window_len tokens.
std::vector<std::vector<int64_t>> cut_windows(const std::vector<int64_t>& tokens, int64_t window_len, std::optional<int64_t> bos) {
  std::vector<std::vector<int64_t>> windows;
  const size_t step = static_cast<size_t>(bos ? window_len - 1 : window_len);
  for (size_t begin = 0; begin < tokens.size(); begin += step) {
    std::vector<int64_t> window;
    if (bos) window.push_back(*bos);
    window.insert(window.end(), tokens.begin() + static_cast<int64_t>(begin),
                  tokens.begin() + static_cast<int64_t>(std::min(tokens.size(), begin + step)));
    windows.push_back(std::move(window));
  }
  return windows;
}

}  // namespace

ops::TensorBundle calibrate(const Session& session, std::string_view text, const CalibrateOptions& options) {
  const kv::KvModel& kv_model = session.model->info().kv;
  const int64_t trained = session.model->info().max_position_embeddings;
  const int64_t window_len = options.window_len > 0 ? options.window_len : std::min(kDefaultWindowLen, trained);
  ROTUNDA_CHECK(options.window_len >= 0 && window_len >= 2, "--window-len: got ", options.window_len, ", expected 2 or more");
  ROTUNDA_CHECK(options.max_tokens > 0, "--max-tokens: got ", options.max_tokens, ", expected 1 or more");

  std::vector<std::string> formats = options.formats;
  const bool all = formats.empty();
  if (all) {
    for (const auto& format : session.formats->all()) formats.push_back(format->name());
  }
  std::vector<std::string> names;
  std::vector<std::unique_ptr<kv::KvCalibrator>> calibrators;
  for (const std::string& name : formats) {
    const kv::KvFormat& format = session.formats->get(name);
    if (all && format.unsupported_reason(kv::KvSpec{.format = name, .options = {}, .parts = {}}, kv_model)) continue;
    auto calibrator = format.make_calibrator(kv_model);
    ROTUNDA_CHECK(calibrator || all, "format ", name, " has nothing to calibrate");
    if (!calibrator || std::find(names.begin(), names.end(), format.calibration_name()) != names.end()) continue;
    names.push_back(format.calibration_name());
    calibrators.push_back(std::move(calibrator));
  }
  ROTUNDA_CHECK(!names.empty(), "no format to calibrate for this model");
  std::vector<int64_t> tokens = session.tokenizer->encode(text, /*add_special=*/false);
  ROTUNDA_CHECK(!tokens.empty(), "the calibration text has no tokens");
  if (static_cast<int64_t>(tokens.size()) > options.max_tokens) tokens.resize(static_cast<size_t>(options.max_tokens));

  const kv::KvSpec reference = kv::parse_kv_spec(kReferenceKv);
  const auto cache = session.formats->get(reference).make_cache(reference, kv_model, {});
  ObservingCache observing(*cache, [&](int layer, const kv::AttendInput& in) {
    for (const auto& calibrator : calibrators) calibrator->observe(layer, in);
  });
  int64_t done = 0;
  for (const auto& window : cut_windows(tokens, window_len, session.bos_id())) {
    const SequenceGuard seq(observing, observing.create());
    // One step for the window: keys and values of a token then depend on exact ones only.
    const kv::SeqChunk chunk{.seq = seq.id(), .n_tokens = static_cast<int64_t>(window.size()), .is_prompt = true, .rope_len = 0};
    run_step(*session.model, observing, {chunk}, window, kv::StepKind::kGenerate, options.stop);
    done += static_cast<int64_t>(window.size()) - (session.bos_id() ? 1 : 0);
    if (options.progress) options.progress("calibrating", done, static_cast<int64_t>(tokens.size()));
  }

  ops::TensorBundle file;
  for (size_t i = 0; i < names.size(); ++i) {
    file.add(names[i] + "/", calibrators[i]->finish());
  }
  file.metadata["rotunda.kind"] = kKind;
  file.metadata["rotunda.version"] = std::to_string(kVersion);
  file.metadata["rotunda.formats"] = join(names);
  file.metadata["rotunda.weights_hash"] = session.model->weights_hash();
  file.metadata["rotunda.tokens"] = std::to_string(tokens.size());
  file.metadata["rotunda.window_len"] = std::to_string(window_len);
  file.metadata["rotunda.architecture"] = session.model->info().architecture;
  return file;
}

ops::TensorBundle calibration_for(const ops::TensorBundle& file, const kv::KvFormat& format, const std::string& weights_hash) {
  ROTUNDA_CHECK(file.meta("rotunda.kind") == kKind, file.origin, ": holds a ", file.meta("rotunda.kind"), ", expected a ", kKind);
  ROTUNDA_CHECK(file.meta_int("rotunda.version") == kVersion, file.origin, ": calibration version ",
                file.meta("rotunda.version"), ", expected ", kVersion);
  ROTUNDA_CHECK(file.meta("rotunda.weights_hash") == weights_hash, file.origin, ": made for other weights: hash ",
                file.meta("rotunda.weights_hash").substr(0, 12), "..., this model has ", weights_hash.substr(0, 12), "...");
  ops::TensorBundle part = file.part(format.calibration_name() + "/");
  ROTUNDA_CHECK(!part.tensors.empty() || !part.metadata.empty(), file.origin, ": has no calibration for ", format.name(),
                ", it was made for: ", file.meta("rotunda.formats"));
  return part;
}

std::filesystem::path builtin_calibration_path(const std::string& weights_hash, const std::string& name) {
  return env::user_cache_dir() / "calibrations" / (weights_hash + "-" + name + ".safetensors");
}

ops::TensorBundle builtin_calibration(const Session& session, const kv::KvSpec& spec, const Progress& progress, StopFlag stop) {
  const std::string& hash = session.model->weights_hash();
  const kv::KvFormat& format = session.formats->get(spec);
  const std::filesystem::path path = builtin_calibration_path(hash, format.calibration_name());
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored)) {
    try {
      ops::TensorBundle part = calibration_for(io::read_bundle(path), format, hash);
      format.check_calibration(spec, session.model->info().kv, part);  // only the format can tell whether its part is whole
      return part;
    } catch (const Error& error) {
      if (error.fault() == Fault::kBug) throw;
      ROTUNDA_LOG_WARN("the kept calibration is of no use and is made anew: {}", error.what());
    }
  }
  ROTUNDA_LOG_INFO("{} needs a calibration: making one on the built-in text, once for these weights", spec.format);
  CalibrateOptions options;
  options.formats = {spec.format};
  options.max_tokens = kBuiltinMaxTokens;
  options.progress = progress;
  options.stop = stop;
  const ops::TensorBundle file = calibrate(session, builtin_calibration_text(), options);
  try {
    std::filesystem::create_directories(path.parent_path());
    io::write_bundle(path, file);
    ROTUNDA_LOG_INFO("calibration kept in {}", path.string());
  } catch (const std::filesystem::filesystem_error& error) {
    ROTUNDA_LOG_WARN("the calibration is not kept: {}", error.what());
  } catch (const Error& error) {
    if (error.fault() != Fault::kWorld) throw;
    ROTUNDA_LOG_WARN("the calibration is not kept: {}", error.what());
  }
  return calibration_for(file, format, hash);
}

std::optional<ops::TensorBundle> find_calibration(const Session& session, const kv::KvSpec& spec,
                                                  const std::optional<std::filesystem::path>& file, const Progress& progress, StopFlag stop) {
  std::optional<ops::TensorBundle> read;
  const auto of_one = [&](const kv::KvSpec& one) -> std::optional<ops::TensorBundle> {
    const kv::KvFormat& format = session.formats->get(one);
    const kv::CalibrationUse use = format.calibration_use(one);
    if (use != kv::CalibrationUse::kNone && file) {
      if (!read) read = io::read_bundle(*file);
      return calibration_for(*read, format, session.model->weights_hash());
    }
    if (use == kv::CalibrationUse::kRequired) return builtin_calibration(session, one, progress, stop);
    return std::nullopt;
  };
  if (spec.parts.empty()) return of_one(spec);
  std::optional<ops::TensorBundle> all;
  for (const kv::KvSpecPart& part : spec.parts) {
    const auto found = of_one(part.spec);
    if (!found) continue;
    if (!all) all.emplace().origin = found->origin;
    all->add(session.formats->get(part.spec).calibration_name() + "/", *found);
  }
  return all;
}

std::string fingerprint(const ops::TensorBundle& bundle) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, 64 bits
  const auto add = [&hash](const void* data, size_t n) {
    for (size_t i = 0; i < n; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3u;
  };
  for (const auto& [name, tensor] : bundle.tensors) {
    const at::Tensor bytes = tensor.contiguous();
    add(name.data(), name.size() + 1);
    add(bytes.const_data_ptr(), bytes.nbytes());
  }
  for (const auto& [key, value] : bundle.metadata) {
    add(key.data(), key.size() + 1);
    add(value.data(), value.size() + 1);
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace rotunda::engine
