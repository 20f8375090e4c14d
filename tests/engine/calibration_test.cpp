#include "engine/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "engine/toy.h"
#include "io/safetensors.h"

namespace rotunda::engine {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class CalibrationTest : public testing::Test {
 protected:
  void SetUp() override { setenv("ROTUNDA_CACHE_DIR", folder_.path().c_str(), 1); }
  void TearDown() override { unsetenv("ROTUNDA_CACHE_DIR"); }

  toy::TemporaryFolder folder_;
  Session session_ = toy::make_session();
  const std::string text_ = std::string(builtin_calibration_text().substr(0, 3000));
};

TEST_F(CalibrationTest, OnePassServesEveryFormatAndTheFileComesBack) {
  CalibrateOptions options;
  options.window_len = 500;
  int64_t told = 0;
  options.progress = [&](const std::string&, int64_t done, int64_t total) {
    told = done;
    EXPECT_EQ(total, 3000);
  };
  const ops::TensorBundle file = calibrate(session_, text_, options);
  EXPECT_EQ(told, 3000);
  EXPECT_EQ(file.meta("rotunda.weights_hash"), session_.model->weights_hash());
  EXPECT_EQ(file.meta_int("rotunda.tokens"), 3000);
  io::write_bundle(folder_ / "file", file);
  for (const auto& format : session_.formats->all()) {
    if (!format->make_calibrator(session_.model->info().kv)) continue;
    EXPECT_THAT(file.meta("rotunda.formats"), HasSubstr(format->calibration_name()));
    const kv::KvSpec spec{.format = format->name(), .options = {}, .parts = {}};
    if (format->calibration_use(format->with_defaults(spec)) == kv::CalibrationUse::kNone) continue;
    const KvBinding binding = bind_kv(session_, spec, folder_ / "file", {}, nullptr);
    EXPECT_NE(binding.make_cache(), nullptr);
    EXPECT_EQ(fingerprint(*binding.calibration), fingerprint(calibration_for(file, *format, session_.model->weights_hash())));
  }
  EXPECT_FALSE(std::filesystem::exists(folder_ / "calibrations")) << "a given file needs no kept one";
}

TEST_F(CalibrationTest, WindowsDoNotMatterForWhatIsLeftOut) {
  CalibrateOptions options;
  options.formats = {"rotate2"};
  options.max_tokens = 1000;
  const std::string first = fingerprint(calibrate(session_, text_, options));
  EXPECT_EQ(first, fingerprint(calibrate(session_, text_.substr(0, 1000), options)));
  EXPECT_NE(first, fingerprint(calibrate(session_, text_.substr(1000), options)));
}

TEST_F(CalibrationTest, WrongFilesAreRefused) {
  CalibrateOptions options;
  options.formats = {"rotate2"};
  ops::TensorBundle file = calibrate(session_, text_, options);
  file.origin = "some.file";
  const std::string hash = session_.model->weights_hash();
  const kv::KvFormat& rotate2 = session_.formats->get("rotate2");
  const kv::KvFormat& rotate3 = session_.formats->get("rotate3");
  EXPECT_THAT(toy::error_of([&] { calibration_for(file, rotate2, "0123"); }), HasSubstr("some.file: made for other weights"));
  EXPECT_THAT(toy::error_of([&] { calibration_for(file, rotate3, hash); }), HasSubstr("no calibration for rotate3"));
  file.metadata["rotunda.version"] = "9";
  EXPECT_THAT(toy::error_of([&] { calibration_for(file, rotate2, hash); }), HasSubstr("calibration version 9, expected 1"));
  file.metadata["rotunda.kind"] = "kv_cache";
  EXPECT_THAT(toy::error_of([&] { calibration_for(file, rotate2, hash); }), HasSubstr("holds a kv_cache, expected a calibration"));
  file.metadata.clear();
  EXPECT_THAT(toy::error_of([&] { calibration_for(file, rotate2, hash); }), HasSubstr("some.file: metadata rotunda.kind is missing"));
  EXPECT_THAT(toy::error_of([&] { calibrate(session_, "", options); }), HasSubstr("has no tokens"));
  options.formats = {"bf16"};
  EXPECT_THAT(toy::error_of([&] { calibrate(session_, text_, options); }), HasSubstr("bf16 has nothing to calibrate"));
  options.formats = {"nonsense"};
  EXPECT_THAT(toy::error_of([&] { calibrate(session_, text_, options); }), HasSubstr("nonsense"));
}

TEST_F(CalibrationTest, AFormatThatNeedsNoneTakesOneWhereItIsGiven) {
  CalibrateOptions options;
  options.formats = {"rotunda3", "rotunda2"};  // of one mind: one part of the file
  const ops::TensorBundle file = calibrate(session_, text_, options);
  EXPECT_EQ(file.meta("rotunda.formats"), "rotunda");
  io::write_bundle(folder_ / "file", file);
  options.formats = {"rotate2"};
  io::write_bundle(folder_ / "other", calibrate(session_, text_, options));

  const kv::KvSpec spec = kv::parse_kv_spec("rotunda2");
  const KvBinding free = bind_kv(session_, spec, std::nullopt, {}, nullptr);
  EXPECT_FALSE(free.calibration.has_value());
  EXPECT_THAT(free.used.to_string(), AllOf(HasSubstr("balance=weights"), HasSubstr("shift=bias"), HasSubstr("feedback=weights")));
  const KvBinding calibrated = bind_kv(session_, spec, folder_ / "file", {}, nullptr);
  EXPECT_THAT(calibrated.used.to_string(), AllOf(HasSubstr("balance=calibrated"), HasSubstr("shift=mean"), HasSubstr("feedback=calibrated")));
  EXPECT_NE(calibrated.make_cache(), nullptr);
  EXPECT_THAT(toy::error_of([&] { bind_kv(session_, spec, folder_ / "other", {}, nullptr); }),
              HasSubstr("has no calibration for rotunda2, it was made for: rotate2"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "calibrations")) << "made without being asked for";
  // Asked for by name, one is made.
  const KvBinding built_in = bind_kv(session_, kv::parse_kv_spec("rotunda2:shift=mean"), std::nullopt, {}, nullptr);
  EXPECT_TRUE(built_in.calibration.has_value());
  EXPECT_TRUE(std::filesystem::exists(builtin_calibration_path(session_.model->weights_hash(), "rotunda")));
}

TEST_F(CalibrationTest, AMixTakesWhatItsFormatsWant) {
  CalibrateOptions options;
  options.formats = {"rotate2", "rotunda2"};
  io::write_bundle(folder_ / "file", calibrate(session_, text_, options));
  const kv::KvSpec spec = kv::parse_kv_spec("layers 0=rotate2;rotunda3");
  const KvBinding given = bind_kv(session_, spec, folder_ / "file", {}, nullptr);
  EXPECT_THAT(given.used.to_string(), AllOf(HasSubstr("layers 0=rotate2"), HasSubstr("layers 1=rotunda3"), HasSubstr("shift=mean")));
  EXPECT_NE(given.make_cache(), nullptr);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "calibrations"));
  // Without a file each format has what it has alone: the one must, the other may go without.
  const KvBinding built_in = bind_kv(session_, spec, std::nullopt, {}, nullptr);
  EXPECT_THAT(built_in.used.to_string(), HasSubstr("shift=bias"));
  EXPECT_NE(built_in.make_cache(), nullptr);
  EXPECT_TRUE(std::filesystem::exists(builtin_calibration_path(session_.model->weights_hash(), "rotate2")));
  EXPECT_FALSE(std::filesystem::exists(builtin_calibration_path(session_.model->weights_hash(), "rotunda")));
  options.formats = {"rotate2"};
  io::write_bundle(folder_ / "half", calibrate(session_, text_, options));
  EXPECT_THAT(toy::error_of([&] { bind_kv(session_, spec, folder_ / "half", {}, nullptr); }), HasSubstr("has no calibration for rotunda3"));
}

TEST_F(CalibrationTest, TheBuiltInOneIsKeptAndMadeAnewWhereDamaged) {
  const kv::KvSpec spec = kv::parse_kv_spec("rotate2");
  const auto path = builtin_calibration_path(session_.model->weights_hash(), "rotate2");
  EXPECT_EQ(path.parent_path(), folder_ / "calibrations");
  int calls = 0;
  const Progress count = [&](const std::string&, int64_t, int64_t) { ++calls; };
  const std::string fresh = fingerprint(builtin_calibration(session_, spec, count, nullptr));
  EXPECT_GT(calls, 0);
  EXPECT_TRUE(std::filesystem::exists(path));
  calls = 0;
  EXPECT_EQ(fingerprint(builtin_calibration(session_, spec, count, nullptr)), fresh);
  EXPECT_EQ(calls, 0) << "the second time it is read";
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  EXPECT_EQ(fingerprint(builtin_calibration(session_, spec, count, nullptr)), fresh);
  EXPECT_GT(calls, 0) << "a damaged one is made anew";
  calls = 0;
  EXPECT_EQ(fingerprint(builtin_calibration(session_, spec, count, nullptr)), fresh);
  EXPECT_EQ(calls, 0) << "and kept again";
}

TEST_F(CalibrationTest, AStopLeavesNothingBehind) {
  std::atomic<bool> stop{true};
  EXPECT_THROW(builtin_calibration(session_, kv::parse_kv_spec("rotate2"), {}, &stop), Interrupted);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "calibrations"));
}

}  // namespace
}  // namespace rotunda::engine
