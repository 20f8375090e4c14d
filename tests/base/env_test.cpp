#include "base/env.h"

#include <gmock/gmock.h>
#include <unistd.h>

#include <cstdlib>
#include <map>

#include "base/error.h"

namespace rotunda {
namespace {

constexpr const char* kNames[] = {"ROTUNDA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"};

// Starts every test with none of the variables set, and puts them back after it.
class Env : public ::testing::Test {
 protected:
  Env() {
    for (const char* name : kNames) {
      if (const char* value = std::getenv(name)) before_[name] = value;
      ::unsetenv(name);
    }
  }
  ~Env() override {
    for (const char* name : kNames) ::unsetenv(name);
    for (const auto& [name, value] : before_) ::setenv(name.c_str(), value.c_str(), 1);
  }

  std::map<std::string, std::string> before_;
};

TEST_F(Env, EmptyCountsAsUnset) {
  EXPECT_EQ(env::get("ROTUNDA_CACHE_DIR"), std::nullopt);
  ::setenv("ROTUNDA_CACHE_DIR", "", 1);
  EXPECT_EQ(env::get("ROTUNDA_CACHE_DIR"), std::nullopt);
  ::setenv("ROTUNDA_CACHE_DIR", " ", 1);
  EXPECT_EQ(env::get("ROTUNDA_CACHE_DIR"), " ");
}

TEST_F(Env, CacheFolderPrecedence) {
  ::setenv("HOME", "/home/user", 1);
  EXPECT_EQ(env::user_cache_dir(), "/home/user/.cache/rotunda");
  ::setenv("XDG_CACHE_HOME", "/xdg", 1);
  EXPECT_EQ(env::user_cache_dir(), "/xdg/rotunda");
  ::setenv("ROTUNDA_CACHE_DIR", "/own", 1);
  EXPECT_EQ(env::user_cache_dir(), "/own");
  ::setenv("ROTUNDA_CACHE_DIR", "", 1);
  EXPECT_EQ(env::user_cache_dir(), "/xdg/rotunda");
  ::setenv("XDG_CACHE_HOME", "", 1);
  EXPECT_EQ(env::user_cache_dir(), "/home/user/.cache/rotunda");
}

TEST_F(Env, NoCacheFolderIsTheWorldsFault) {
  try {
    env::user_cache_dir();
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kWorld);
    for (const char* name : kNames) EXPECT_THAT(error.what(), ::testing::HasSubstr(name));
  }
}

TEST(AvailableMemory, IsBetweenNothingAndTheMachine) {
  const int64_t total_bytes = int64_t{::sysconf(_SC_PHYS_PAGES)} * ::sysconf(_SC_PAGESIZE);
  EXPECT_GE(env::available_memory_bytes(), 0);
  EXPECT_LE(env::available_memory_bytes(), total_bytes);
}

}  // namespace
}  // namespace rotunda
