#include "app/cli/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "app/cli/table.h"

namespace rotunda::cli {

namespace {

constexpr int kBarCells = 24;
constexpr double kRedrawSeconds = 0.1;
constexpr double kLineSeconds = 10.0;

}  // namespace

ProgressPrinter::ProgressPrinter() : terminal_(isatty(STDERR_FILENO) == 1) {}

ProgressPrinter::~ProgressPrinter() { clear(); }

void ProgressPrinter::update(const std::string& stage, int64_t done, int64_t total) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Clock::time_point now = Clock::now();
  if (stage != stage_) {
    // Evaluations name the cache at work in the stage; what is counted goes on then, and so does the clock.
    if (stage_.substr(0, stage_.find(',')) != stage.substr(0, stage.find(','))) stage_start_ = last_output_ = now;
    stage_ = stage;
  }
  const double share = total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0.0;
  const double elapsed = std::chrono::duration<double>(now - stage_start_).count();
  const double since_output = std::chrono::duration<double>(now - last_output_).count();
  const std::string left = share > 0.0 && share < 1.0 ? ", " + fixed(elapsed * (1.0 - share) / share, 0) + " s left" : "";
  if (terminal_) {
    if (done >= total) {
      if (drawn_) std::fputs("\r\033[K", stderr);
      drawn_ = false;
      return;
    }
    if (since_output < kRedrawSeconds) return;
    const int full = static_cast<int>(share * kBarCells);
    std::string bar;
    for (int i = 0; i < kBarCells; ++i) bar += i < full ? "█" : "░";
    std::fprintf(stderr, "\r\033[K%s %s %3.0f %%%s", stage.c_str(), bar.c_str(), 100.0 * share, left.c_str());
    std::fflush(stderr);
    drawn_ = true;
  } else {
    if (since_output < kLineSeconds) return;
    std::fprintf(stderr, "%s: %.0f %%%s\n", stage.c_str(), 100.0 * share, left.c_str());
  }
  last_output_ = now;
}

void ProgressPrinter::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

engine::Progress ProgressPrinter::callback() {
  return [this](const std::string& stage, int64_t done, int64_t total) { update(stage, done, total); };
}

}  // namespace rotunda::cli
