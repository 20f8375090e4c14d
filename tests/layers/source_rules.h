#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace rotunda::layers {

/// What the rules found in a source tree.
struct Report {
  int n_files = 0;
  int n_room_includes = 0;              ///< includes of one file of the tree by another
  std::vector<std::string> violations;  ///< "kernels/pack/pack.h:7 includes torch/types.h; allowed: base", sorted by file and line
};

/// Reads every .h, .cpp and .cc below `src` and checks that
///  - includes go right only: app -> engine -> model -> { kv, quant, diffusion, io } -> ops -> kernels -> base, with no include
///    between kv, quant, diffusion and io;
///  - base, kernels and every kernels/ folder of a format know no LibTorch;
///  - rooms above kv name no format: they include kv/<file>, never kv/<folder>/<file> (likewise quant);
///  - includes of our own files start at src/ (no "../x.h", no "sibling.h");
///  - headers start with #pragma once, comments apart (or, `*-inl.h` of Highway, with its per-target guard);
///  - below app/ nothing writes to stdout or stderr; the environment is touched in base/env.cpp only.
/// Comments and string literals do not count, but for the paths of includes.
Report check_sources(const std::filesystem::path& src);

/// `text` with comments, string and character literals blanked out, line ends kept. Include lines keep their paths.
std::string strip_comments_and_literals(std::string_view text);

}  // namespace rotunda::layers
