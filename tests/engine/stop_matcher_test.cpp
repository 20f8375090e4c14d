#include "engine/stop_matcher.h"

#include <gtest/gtest.h>

namespace rotunda::engine {
namespace {

// The text pushed in pieces of `n` bytes, and what passed.
std::string pass(const std::vector<std::string>& stops, const std::string& text, size_t n, bool* stopped = nullptr) {
  StopMatcher matcher(stops);
  std::string out;
  for (size_t i = 0; i < text.size(); i += n) out += matcher.push(text.substr(i, n));
  if (stopped != nullptr) *stopped = matcher.stopped();
  return out + matcher.finish();
}

TEST(StopMatcher, CutsAtTheFirstStopHoweverTheTextArrives) {
  for (size_t n = 1; n < 12; ++n) {
    bool stopped = false;
    EXPECT_EQ(pass({"Question:", "Q:"}, "18. Q: next Question:", n, &stopped), "18. ") << n;
    EXPECT_TRUE(stopped);
    EXPECT_EQ(pass({"aab"}, "aaaab", n, &stopped), "aa") << n;
    EXPECT_TRUE(stopped);
    EXPECT_EQ(pass({"abc"}, "ababd ab", n, &stopped), "ababd ab") << n;
    EXPECT_FALSE(stopped);
  }
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher matcher({"\n\n"});
  EXPECT_EQ(matcher.push("one\n"), "one");
  EXPECT_EQ(matcher.push("two"), "\ntwo");
  EXPECT_EQ(matcher.push("\n\nthree"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.push("more"), "");
  EXPECT_EQ(matcher.finish(), "");
}

TEST(StopMatcher, WithoutStopsEverythingPasses) {
  EXPECT_EQ(pass({}, "abc", 1), "abc");
  EXPECT_EQ(pass({""}, "abc", 2), "abc");
}

}  // namespace
}  // namespace rotunda::engine
