#include "base/error.h"

#include <gmock/gmock.h>
#include <spdlog/sinks/ostream_sink.h>

#include <sstream>

#include "base/check.h"
#include "base/log.h"

namespace rotunda {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

template <typename Call>
Error thrown_by(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return Error(Fault::kBug, "");
}

// A message must be built only for a check that fails.
struct Counted {
  int* times;
};
std::ostream& operator<<(std::ostream& out, const Counted& counted) {
  ++*counted.times;
  return out << "counted";
}

TEST(Check, UserFault) {
  const int got = 80;
  const Error error =
      thrown_by([&] { ROTUNDA_CHECK(got == 64, "append: head_dim ", got, ", cache was built for ", 64); });
  EXPECT_EQ(error.fault(), Fault::kUser);
  EXPECT_STREQ(error.what(), "append: head_dim 80, cache was built for 64");
}

TEST(Check, WorldFault) {
  const Error error = thrown_by([] { ROTUNDA_CHECK_WORLD(false, "f: ", std::string("cannot open")); });
  EXPECT_EQ(error.fault(), Fault::kWorld);
  EXPECT_STREQ(error.what(), "f: cannot open");
}

TEST(Check, PassesWithoutBuildingTheMessage) {
  int times = 0;
  ROTUNDA_CHECK(true, Counted{&times});
  ROTUNDA_CHECK_WORLD(true, Counted{&times});
  ROTUNDA_ASSERT(true, Counted{&times});
  EXPECT_EQ(times, 0);
  EXPECT_EQ(thrown_by([&] { ROTUNDA_CHECK(false, Counted{&times}); }).what(), std::string("counted"));
  EXPECT_EQ(times, 1);
}

TEST(Check, ConditionIsEvaluatedOnce) {
  int times = 0;
  ROTUNDA_CHECK(++times > 0, "");
  ROTUNDA_CHECK_WORLD(++times > 0, "");
  ROTUNDA_ASSERT(++times > 0);
  EXPECT_EQ(times, 3);
}

TEST(Check, IsOneStatement) {
  bool other = false;
  if (other)
    ROTUNDA_CHECK(false, "must not be reached");
  else
    other = true;
  EXPECT_TRUE(other);
}

class Assert : public ::testing::Test {
 protected:
  Assert() : before_(spdlog::default_logger()) {
    spdlog::set_default_logger(
        std::make_shared<spdlog::logger>("test", std::make_shared<spdlog::sinks::ostream_sink_mt>(log_)));
  }
  ~Assert() override { spdlog::set_default_logger(before_); }

  std::ostringstream log_;
  std::shared_ptr<spdlog::logger> before_;
};

TEST_F(Assert, SaysPlaceConditionAndMessage) {
  const Error error = thrown_by([] { ROTUNDA_ASSERT(1 + 1 == 3, "sum is ", 2); });
  EXPECT_EQ(error.fault(), Fault::kBug);
  EXPECT_THAT(error.what(), StartsWith("bug: "));
  EXPECT_THAT(error.what(), HasSubstr("error_test.cpp:"));
  EXPECT_THAT(error.what(), EndsWith(": 1 + 1 == 3: sum is 2"));
  EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
  EXPECT_FALSE(log_.str().empty());  // the stack
}

TEST_F(Assert, WithoutMessage) {
  EXPECT_THAT(thrown_by([] { ROTUNDA_ASSERT(false); }).what(), EndsWith(": false"));
}

TEST_F(Assert, DebugOnly) {
  int times = 0;
  const auto check = [&] { ROTUNDA_DASSERT(++times < 0, "never"); };
#ifdef NDEBUG
  EXPECT_NO_THROW(check());
  EXPECT_EQ(times, 0);
#else
  EXPECT_EQ(thrown_by(check).fault(), Fault::kBug);
  EXPECT_EQ(times, 1);
#endif
}

TEST(Error, IsAStandardException) {
  EXPECT_THROW(throw_user_error("a"), std::runtime_error);
  EXPECT_EQ(thrown_by([] { throw_world_error("w"); }).fault(), Fault::kWorld);
  EXPECT_EQ(concat("got ", 3, ", ", 2.5, ' ', true), "got 3, 2.5 1");
}

}  // namespace
}  // namespace rotunda
