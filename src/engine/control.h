#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>

namespace rotunda::engine {

/// Called now and then by long work, from the thread that asked for it: what is being done, how much of it, of how much.
using Progress = std::function<void(const std::string& stage, int64_t done, int64_t total)>;

/// Set to true (from a signal handler, another thread) to end long work at the next layer. Null: never.
using StopFlag = const std::atomic<bool>*;

inline bool stop_requested(StopFlag stop) { return stop != nullptr && stop->load(std::memory_order_relaxed); }

/// Thrown inside the engine where a stop was asked for; an evaluation catches it and returns what it has.
class Interrupted : public std::exception {
 public:
  const char* what() const noexcept override { return "interrupted"; }
};

}  // namespace rotunda::engine
