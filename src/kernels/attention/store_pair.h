#pragma once

#include <cstdint>

namespace rotunda::kernels {

/// Tokens that a GPU packs into two neighbouring blocks of a page (32 tokens: what a warp takes at once, and what shares a word at 3 bits).
struct StorePair {
  int32_t page;     ///< in the pool
  int32_t pair;     ///< within the page: blocks 2 pair and 2 pair + 1
  int32_t row;      ///< of the first of the tokens; the others follow it
  uint32_t tokens;  ///< bit t: token t of the pair is stored; the bits are neighbours. Other tokens keep their codes and scales. 0: nothing to do
};

}  // namespace rotunda::kernels
