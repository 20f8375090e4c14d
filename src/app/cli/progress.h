#pragma once

#include <chrono>
#include <mutex>
#include <string>

#include "engine/control.h"

namespace rotunda::cli {

/// Progress on stderr: a bar where that is a terminal, elsewhere a line every ten seconds. Thread-safe.
class ProgressPrinter {
 public:
  ProgressPrinter();
  ~ProgressPrinter();
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;

  void update(const std::string& stage, int64_t done, int64_t total);
  /// Takes the bar off the screen, so that other output can follow.
  void clear();
  /// Refers to this printer, which must outlive it.
  engine::Progress callback();

 private:
  using Clock = std::chrono::steady_clock;

  std::mutex mutex_;
  const bool terminal_;
  bool drawn_ = false;
  std::string stage_;
  Clock::time_point stage_start_;
  Clock::time_point last_output_;
};

}  // namespace rotunda::cli
