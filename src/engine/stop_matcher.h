#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace rotunda::engine {

/// Finds stop texts in a stream: holds back what may become one, and lets the rest pass.
class StopMatcher {
 public:
  /// Empty stop texts are ignored.
  explicit StopMatcher(std::vector<std::string> stops);
  /// @return text that is certainly before any stop text
  std::string push(std::string_view text);
  /// @return what was held back and did not become a stop text; nothing where one was found
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace rotunda::engine
