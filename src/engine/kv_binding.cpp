#include "engine/kv_binding.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/log.h"
#include "engine/calibration.h"
#include "ops/device.h"

namespace rotunda::engine {

std::unique_ptr<kv::KvCache> KvBinding::make_cache() const {
  return format->make_cache(used, model->info().kv, setup);
}

KvBinding bind_kv(const Session& session, const kv::KvSpec& spec, const std::optional<std::filesystem::path>& calibration_file,
                  const Progress& progress, StopFlag stop) {
  check_specs(*session.formats, {spec}, session.model->info().kv);
  KvBinding binding;
  binding.requested = spec;
  binding.format = &session.formats->get(spec);
  binding.used = binding.format->with_defaults(spec);
  if (calibration_file && binding.format->calibration_use(binding.used) == kv::CalibrationUse::kNone)
    ROTUNDA_LOG_INFO("{} needs no calibration: {} is not read", spec.to_string(), calibration_file->string());
  binding.calibration = find_calibration(session, binding.used, calibration_file, progress, stop);
  binding.used = binding.format->resolved(binding.used, session.model->info().kv, binding.calibration ? &*binding.calibration : nullptr);
  if (binding.calibration) binding.setup = *binding.calibration;
  binding.model = session.model->with_kv_format(*binding.format, binding.used, binding.setup);
  return binding;
}

void require_memory(const KvBinding& binding, const std::vector<int64_t>& kv_lens) {
  const kv::KvModel& model = binding.model->info().kv;
  const int64_t available = ops::available_memory_bytes(model.device, model.device_budget_bytes);
  int64_t planned = 0;
  for (const int64_t kv_len : kv_lens) {
    const int64_t bytes = binding.format->planned_bytes(binding.used, model, kv_len);
    planned = bytes > std::numeric_limits<int64_t>::max() - planned ? std::numeric_limits<int64_t>::max() : planned + bytes;
  }
  const int64_t longest = kv_lens.empty() ? 0 : *std::max_element(kv_lens.begin(), kv_lens.end());
  ROTUNDA_CHECK_WORLD(planned <= available, "not enough memory: ", kv_lens.size(), " sequence", kv_lens.size() == 1 ? "" : "s",
                      " of up to ", longest, " tokens need ", planned, " bytes of ", binding.requested.to_string(),
                      " cache, ", available, " bytes are available",
                      model.device.is_cuda() ? concat(" on ", model.device) : "");
}

int64_t longest_kv_len(const kv::KvFormat& format, const kv::KvSpec& spec, const kv::KvModel& model, int64_t budget_bytes,
                       int64_t limit) {
  int64_t fits = 0;
  int64_t too_long = limit + 1;
  while (too_long - fits > 1) {
    const int64_t middle = fits + (too_long - fits) / 2;
    (format.planned_bytes(spec, model, middle) <= budget_bytes ? fits : too_long) = middle;
  }
  return fits;
}

}  // namespace rotunda::engine
