#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/control.h"
#include "engine/session.h"
#include "ops/tensor_bundle.h"

namespace rotunda::engine {

struct CalibrateOptions {
  std::vector<std::string> formats;  ///< empty: every format that calibrates
  int64_t max_tokens = 65536;        ///< of the text; the rest is left out
  int64_t window_len = 0;            ///< tokens a window, BOS included; 0: 2048, or the trained context where that is shorter
  Progress progress;
  StopFlag stop = nullptr;
};

/// Runs the text through the model and lets every format's calibrator watch, all in one pass.
/// @return one bundle for all formats: tensors and metadata are named "<KvFormat::calibration_name>/...", and the metadata
///   `rotunda.*` tells kind, version, settings and the hash of the weights.
/// @throws Error{kUser} for a text without tokens, a format that has nothing to calibrate; Interrupted.
ops::TensorBundle calibrate(const Session& session, std::string_view text, const CalibrateOptions& options);

/// What one format gets of a calibration file.
/// @throws Error{kUser} naming the file where it is no calibration, was made for other weights, or lacks the format.
ops::TensorBundle calibration_for(const ops::TensorBundle& file, const kv::KvFormat& format, const std::string& weights_hash);

/// All that the formats of a spec get of a calibration: of `file`, or, without one, built-in where a format cannot do without. Of a mix
/// each format's under "<KvFormat::calibration_name>/". Nothing where no format gets any.
/// @param spec with nothing left to defaults   @throws as calibration_for and builtin_calibration
std::optional<ops::TensorBundle> find_calibration(const Session& session, const kv::KvSpec& spec,
                                                  const std::optional<std::filesystem::path>& file, const Progress& progress, StopFlag stop);

/// A file for the format, made on first use from the text that the product ships and kept in the user's cache folder; a
/// log line says so. One that is damaged or does not fit is made anew. Where the folder cannot be written, a warning says
/// that the result was not kept.
/// @throws Error{kUser} where the format refuses the fresh calibration, Interrupted.
ops::TensorBundle builtin_calibration(const Session& session, const kv::KvSpec& spec, const Progress& progress, StopFlag stop);

/// Where builtin_calibration keeps its result. @param name KvFormat::calibration_name
std::filesystem::path builtin_calibration_path(const std::string& weights_hash, const std::string& name);

/// The text of assets/calibration.txt.
std::string_view builtin_calibration_text();

/// A short hash (16 hex digits) of all that a bundle holds but its origin; tells one calibration from another.
std::string fingerprint(const ops::TensorBundle& bundle);

}  // namespace rotunda::engine
