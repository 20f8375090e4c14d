#include <algorithm>

#include "app/cli/commands.h"
#include "app/cli/output.h"
#include "base/check.h"
#include "kv/kv_registry.h"

namespace rotunda::cli {

namespace {

int run_formats() {
  for (const auto& format : kv::kv_registry().all()) {
    write_stdout(concat(format->name(), ": ", format->summary(), "\n"));
    size_t width = 0;
    for (const kv::KvOption& option : format->options()) {
      width = std::max(width, option.name.size() + 1 + option.default_value.size());
    }
    for (const kv::KvOption& option : format->options()) {
      const std::string setting = option.name + "=" + option.default_value;
      write_stdout(concat("  ", setting, std::string(width - setting.size() + 2, ' '), option.help, "\n"));
    }
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
