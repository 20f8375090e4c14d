#include "app/cli/interrupt.h"

#include <csignal>

namespace rotunda::cli {

namespace {

// A signal handler can reach nothing but a global.
std::atomic<bool> stop_flag{false};
static_assert(std::atomic<bool>::is_always_lock_free);

extern "C" void set_stop_flag(int) { stop_flag.store(true, std::memory_order_relaxed); }

}  // namespace

engine::StopFlag catch_interrupt() {
  struct sigaction action = {};
  action.sa_handler = &set_stop_flag;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigaction(SIGINT, &action, nullptr);
  return &stop_flag;
}

}  // namespace rotunda::cli
