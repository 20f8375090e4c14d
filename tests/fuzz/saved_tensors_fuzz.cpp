// Any bytes as a safetensors file that claims to be a calibration or a saved sequence: refused with an Error, or taken and usable.

#include <ATen/ATen.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/error.h"
#include "io/safetensors_header.h"
#include "kv/kv_registry.h"

namespace {

rotunda::kv::KvModel tiny_model() {
  rotunda::kv::KvModel model;
  model.n_layers = 1;
  model.n_heads = 2;
  model.n_kv_heads = 1;
  model.head_dim = 16;
  model.hidden_size = 8;
  model.softmax_scale = 0.25;
  rotunda::ops::RopeSpec rope;
  rope.head_dim = 16;
  model.rope = rotunda::ops::Rope(rope);
  return model;
}

rotunda::kv::ProjectionWeights tiny_projections(const rotunda::kv::KvModel& model) {
  const auto ramp = [&](int64_t rows, int64_t columns) { return at::linspace(-1.0, 1.0, rows * columns).view({rows, columns}); };
  rotunda::kv::ProjectionWeights weights;
  weights.q_weight = ramp(int64_t{model.n_heads} * model.head_dim, model.hidden_size);
  weights.k_weight = ramp(model.kv_channels(), model.hidden_size);
  weights.v_weight = ramp(model.kv_channels(), model.hidden_size);
  weights.o_weight = ramp(model.hidden_size, int64_t{model.n_heads} * model.head_dim);
  weights.input_gain = at::ones({model.hidden_size});
  return weights;
}

template <typename Body>
void expect_error_or_success(const Body& body) {
  try {
    body();
  } catch (const rotunda::Error& error) {
    if (error.fault() == rotunda::Fault::kBug) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rotunda;
  ops::TensorBundle bundle;
  try {
    const io::SafetensorsHeader header = io::parse_safetensors({reinterpret_cast<const char*>(data), size}, "input");
    bundle.metadata = header.metadata;
    for (const auto& [name, entry] : header.entries) {
      const at::Tensor tensor = at::empty(entry.shape, entry.dtype);
      if (tensor.nbytes() > 0) std::memcpy(tensor.data_ptr(), data + entry.begin_byte, tensor.nbytes());
      bundle.tensors[name] = tensor;
    }
  } catch (const Error& error) {
    if (error.fault() == Fault::kBug) std::abort();
    return 0;
  }
  const kv::KvModel model = tiny_model();
  for (const char* name : {"bf16", "rotate2", "rotunda2"}) {
    const kv::KvFormat& format = kv::kv_registry().get(name);
    expect_error_or_success([&] { format.make_cache({name, {}, {}}, model, bundle); });
    expect_error_or_success([&] { format.check_calibration({name, {}, {}}, model, bundle); });
    expect_error_or_success([&] {
      kv::KvSpec spec{name, {}, {}};
      if (format.calibration_use(spec) == kv::CalibrationUse::kRequired) spec.options["reorder"] = "none";
      ops::TensorBundle setup;
      kv::ProjectionWeights weights = tiny_projections(model);
      format.fuse(spec, model, 0, weights, setup);
      const auto cache = format.make_cache(spec, model, setup);
      cache->release(cache->import_sequence(bundle));
    });
  }
  return 0;
}
