#include <algorithm>
#include <string>
#include <vector>

#include "app/cli/commands.h"
#include "app/cli/output.h"
#include "base/check.h"
#include "kv/kv_registry.h"

namespace rotunda::cli {

namespace {

// The lines that say what options there are.
std::string option_lines(const kv::KvFormat& format) {
  const std::vector<kv::KvOption> options = format.options();
  size_t width = 0;
  for (const kv::KvOption& option : options) width = std::max(width, option.name.size() + 1 + option.default_value.size());
  std::string text;
  for (const kv::KvOption& option : options) {
    const std::string setting = option.name + "=" + option.default_value;
    text += concat("  ", setting, std::string(width - setting.size() + 2, ' '), option.help, "\n");
  }
  return text;
}

// Formats to take come first; neighbours with the same options have them listed once.
int run_formats() {
  std::vector<const kv::KvFormat*> formats;
  for (const auto& format : kv::kv_registry().all()) formats.push_back(format.get());
  std::stable_partition(formats.begin(), formats.end(), [](const kv::KvFormat* format) { return format->recommended(); });
  for (size_t i = 0; i < formats.size(); ++i) {
    write_stdout(concat(formats[i]->name(), ": ", formats[i]->summary(), "\n"));
    const std::string options = option_lines(*formats[i]);
    if (i + 1 == formats.size() || option_lines(*formats[i + 1]) != options) write_stdout(options + "\n");
  }
  return 0;
}

}  // namespace

void add_formats(CLI::App& parent, Run& run) {
  CLI::App* command = parent.add_subcommand("formats", "Every cache format with its options and their defaults");
  command->footer("Examples of a SPEC:\n  --kv rotunda2:recent=128,values=3\n  --kv k=rotunda3,v=rotunda2\n  --kv 'layers 0,1,-1 = bf16; rotunda2'");
  command->callback([&run] { run = &run_formats; });
}

}  // namespace rotunda::cli
