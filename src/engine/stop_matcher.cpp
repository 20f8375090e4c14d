#include "engine/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace rotunda::engine {

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase(stops_, std::string());
}

std::string StopMatcher::push(std::string_view text) {
  if (stopped_) return "";
  held_ += text;
  size_t found = std::string::npos;
  for (const std::string& stop : stops_) found = std::min(found, held_.find(stop));
  size_t n_certain = held_.size();
  if (found != std::string::npos) {
    stopped_ = true;
    n_certain = found;
  } else {
    for (const std::string& stop : stops_) {
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > 0; --n) {
        if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) {
          n_certain = std::min(n_certain, held_.size() - n);
          break;
        }
      }
    }
  }
  std::string certain = held_.substr(0, n_certain);
  held_.erase(0, stopped_ ? held_.size() : n_certain);
  return certain;
}

std::string StopMatcher::finish() { return std::exchange(held_, ""); }

}  // namespace rotunda::engine
