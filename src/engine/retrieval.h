#pragma once

#include <cstdint>
#include <vector>

#include "engine/answers.h"

namespace rotunda::engine {

/// Items whose answer stands in the prompt, by the length of the prompt and the place of the answer: the grid of a
/// needle-in-a-haystack map.
struct RetrievalGrid {
  static constexpr int kDepths = 5;  ///< columns: fifths of the prompt, the first at its start

  std::vector<int64_t>
      length_from;  ///< rows: prompts of at least so many tokens, and fewer than twice as many; powers of two
  std::vector<std::vector<int64_t>> items;  ///< [row][depth]
};

/// Items without an answer_depth are left out; no rows where there is no other.
RetrievalGrid retrieval_grid(const std::vector<AnswerItem>& items);

/// Right answers in each cell.   @param correct  by item of `items`, those that the grid was made of
std::vector<std::vector<int64_t>> retrieved(const RetrievalGrid& grid, const std::vector<AnswerItem>& items,
                                            const std::vector<bool>& correct);

}  // namespace rotunda::engine
