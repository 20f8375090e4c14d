// Holds the line of the rooms: reads every source below src/. The tests after the first prove that it catches what it should.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "layers/source_rules.h"

namespace rotunda::layers {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(LayersTest, OurSourcesKeepTheRules) {
  const Report report = check_sources(fs::path(ROTUNDA_SOURCE_DIR) / "src");
  for (const std::string& violation : report.violations) ADD_FAILURE() << violation;
  // Guards against a walk that sees nothing.
  EXPECT_GE(report.n_files, 15);
  EXPECT_GE(report.n_room_includes, 15);
}

// A source tree of its own, gone when the test is.
class FakeTreeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "rotunda_layers_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) const {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  std::vector<std::string> violations_of(const std::string& path, const std::string& text) const {
    write(path, text);
    return check_sources(root_).violations;
  }

  fs::path root_;
};

TEST_F(FakeTreeTest, CleanTreePasses) {
  write("base/check.h", "// About it.\n\n#pragma once\n#include <string>\n");
  write("base/env.cpp", "#include \"base/env.h\"\n#include <cstdlib>\nauto* p = std::getenv(\"HOME\");\n");
  write("kernels/pack/pack.h", "/* About\n   it. */\n#pragma once\n#include \"base/half.h\"\n#include \"kernels/pack/pack_params.h\"\n");
  write("kernels/pack/pack_cpu.cc", "#include \"hwy/foreach_target.h\"\n#include \"kernels/pack/pack-inl.h\"\n");
  write("kernels/pack/pack-inl.h", "#if defined(PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)\n#endif\n");
  write("ops/pack.cpp", "#include <ATen/core/Tensor.h>\n\n#include \"kernels/pack/pack.h\"\nint n = 1'000'000; char c = '\"';\n");
  write("kv/rotate/kernels/page.h", "#pragma once\n#include \"kernels/pack/pack.h\"\n#include \"kv/rotate/kernels/codec.h\"\n");
  write("kv/rotate/rotate.cpp", "#include \"kv/rotate/kernels/page.h\"\n#include \"ops/pack.h\"\n#include \"registrations.inc\"\n");
  write("engine/run.cpp", "#include \"kv/kv_cache.h\"\n// std::cout << getenv(\"X\")\nauto s = \"printf(x)\";\nsnprintf(b, 1, s);\n");
  write("app/cli/main.cpp", "#include <iostream>\n#include \"engine/run.h\"\nint main() { std::cout << 1; }\n");
  const Report report = check_sources(root_);
  EXPECT_THAT(report.violations, IsEmpty());
  EXPECT_EQ(report.n_files, 10);
  EXPECT_EQ(report.n_room_includes, 11);
}

TEST_F(FakeTreeTest, TorchInKernelsIsCaught) {
  EXPECT_THAT(violations_of("kernels/pack/pack.h", "#pragma once\n\n\n\n\n\n#include <torch/types.h>\n"),
              ElementsAre("kernels/pack/pack.h:7 includes torch/types.h; allowed: base"));
}

TEST_F(FakeTreeTest, TorchInBaseIsCaughtInAnySpelling) {
  EXPECT_THAT(violations_of("base/x.cpp", "#include \"c10/core/Device.h\"\n  #  include <ATen/ATen.h>\n"),
              ElementsAre("base/x.cpp:1 includes c10/core/Device.h; allowed: nothing", "base/x.cpp:2 includes ATen/ATen.h; allowed: nothing"));
}

TEST_F(FakeTreeTest, KernelsOfAFormatFollowTheRulesOfKernels) {
  EXPECT_THAT(violations_of("kv/rotate/kernels/page.cc",
                            "#include <ATen/ATen.h>\n#include \"ops/rope.h\"\n#include \"kv/kv_cache.h\"\n#include \"base/half.h\"\n"),
              ElementsAre("kv/rotate/kernels/page.cc:1 includes ATen/ATen.h; allowed: kv/rotate/kernels, kernels, base",
                          "kv/rotate/kernels/page.cc:2 includes ops/rope.h; allowed: kv/rotate/kernels, kernels, base",
                          "kv/rotate/kernels/page.cc:3 includes kv/kv_cache.h; allowed: kv/rotate/kernels, kernels, base"));
}

TEST_F(FakeTreeTest, RoomsOfOneLayerDoNotMeet) {
  const std::vector<std::string> rooms = {"io", "kv", "quant", "diffusion"};
  for (const std::string& from : rooms) {
    for (const std::string& to : rooms) {
      if (from == to) continue;
      SCOPED_TRACE(from + " -> " + to);
      EXPECT_THAT(violations_of(from + "/x.cpp", "#include \"" + to + "/y.h\"\n"),
                  ElementsAre(from + "/x.cpp:1 includes " + to + "/y.h; allowed: ops, kernels, base"));
      fs::remove_all(root_ / from);
    }
  }
}

TEST_F(FakeTreeTest, IncludesToTheLeftAreCaught) {
  const std::vector<std::string> upwards = {"base", "kernels", "ops", "kv", "model", "engine", "app"};
  for (size_t from = 0; from < upwards.size(); ++from) {
    for (size_t to = 0; to < upwards.size(); ++to) {
      if (from == to) continue;
      SCOPED_TRACE(upwards[from] + " -> " + upwards[to]);
      EXPECT_EQ(violations_of(upwards[from] + "/x.cpp", "#include \"" + upwards[to] + "/y.h\"\n").size(), from < to ? 1u : 0u);
      fs::remove_all(root_ / upwards[from]);
    }
  }
}

TEST_F(FakeTreeTest, FormatsStayBehindTheInterface) {
  EXPECT_THAT(violations_of("engine/run.cpp", "#include \"kv/rotate/rotate.h\"\n"),
              ElementsAre("engine/run.cpp:1 includes kv/rotate/rotate.h; a format's own files stay behind the interface: allowed: kv/*.h"));
}

TEST_F(FakeTreeTest, PathsStartAtSrc) {
  write("kv/b.h", "#pragma once\n");
  EXPECT_THAT(violations_of("kv/a.cpp", "#include \"../io/x.h\"\n#include \"b.h\"\n"),
              ElementsAre("kv/a.cpp:1 includes ../io/x.h; expected a path from src/",
                          "kv/a.cpp:2 includes b.h; expected a path from src/: kv/b.h"));
}

TEST_F(FakeTreeTest, HeadersWithoutPragmaOnceAreCaught) {
  write("kv/a.h", "#ifndef A_H\n#define A_H\n#endif\n");
  write("kv/b.h", "");
  write("kv/c-inl.h", "int x;\n");
  write("kv/d.h", "// #pragma once\nint x;\n#pragma once\n");
  EXPECT_THAT(check_sources(root_).violations,
              ElementsAre("kv/a.h:1 does not start with #pragma once", "kv/b.h:1 does not start with #pragma once",
                          "kv/c-inl.h:1 does not start with #pragma once", "kv/d.h:2 does not start with #pragma once"));
}

TEST_F(FakeTreeTest, StreamsAndTheEnvironmentAreCaught) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"printf(\"x\");", "printf"},
      {"std::printf (\"x\");", "printf"},
      {"fprintf( stderr, \"x\");", "fprintf( stderr"},
      {"std::cout << 1;", "std::cout"},
      {"std::cerr << 1;", "std::cerr"},
      {"#include <iostream>", "#include <iostream>"},
      {"puts(s);", "puts"},
      {"/* then */ fputs(s, stderr);", "fputs(s, stderr"},
  };
  for (const auto& [code, word] : cases) {
    SCOPED_TRACE(code);
    EXPECT_THAT(violations_of("model/a.cpp", "\n" + code + "\n"),
                ElementsAre("model/a.cpp:2 writes to a stream (" + word + "); only app/ prints, the rest logs, returns or throws"));
  }
  EXPECT_THAT(violations_of("model/a.cpp", "auto* home = std::getenv(\"HOME\");\n"),
              ElementsAre("model/a.cpp:1 touches the environment (getenv); allowed in base/env.cpp only"));
  fs::remove_all(root_ / "model");
  // app/ prints, but it asks base/env.h too.
  EXPECT_THAT(violations_of("app/cli/a.cpp", "std::cout << ::setenv(\"A\", \"b\", 1);\n"),
              ElementsAre("app/cli/a.cpp:1 touches the environment (setenv); allowed in base/env.cpp only"));
}

TEST_F(FakeTreeTest, UnknownRoomsAndStrayFilesAreCaught) {
  write("utils/a.cpp", "");
  write("main.cpp", "");
  EXPECT_THAT(check_sources(root_).violations,
              ElementsAre("main.cpp stands in no room; expected a folder of src/", "utils/a.cpp is in unknown room utils"));
}

TEST(StripTest, LiteralsAndCommentsGoLinesStay) {
  EXPECT_EQ(strip_comments_and_literals("a // b\nc /* d\n e */ f"), "a     \nc     \n      f");
  EXPECT_EQ(strip_comments_and_literals("x = \"//\\\"\"; y"), "x = \"    \"; y");
  EXPECT_EQ(strip_comments_and_literals("x = R\"q(\" )\" /*)q\"; y"), "x = R\"           \"; y");
  EXPECT_EQ(strip_comments_and_literals("c = '\"'; s = \"'\";"), "c = ' '; s = \" \";");
  EXPECT_EQ(strip_comments_and_literals("#include \"kv/a.h\"  // why"), "#include \"kv/a.h\"        ");
  EXPECT_EQ(strip_comments_and_literals("n = 1'000'000; // x"), "n = 1'000'000;     ");
}

}  // namespace
}  // namespace rotunda::layers
