#include "engine/retrieval.h"

#include <algorithm>
#include <bit>
#include <set>

#include "base/check.h"

namespace rotunda::engine {

namespace {

int64_t length_from(const AnswerItem& item) { return static_cast<int64_t>(std::bit_floor(item.prompt_len)); }

size_t depth_column(const AnswerItem& item) {
  return std::min(static_cast<size_t>(*item.answer_depth * RetrievalGrid::kDepths),
                  static_cast<size_t>(RetrievalGrid::kDepths - 1));
}

}  // namespace

RetrievalGrid retrieval_grid(const std::vector<AnswerItem>& items) {
  std::set<int64_t> lengths;
  for (const AnswerItem& item : items) {
    if (item.answer_depth) lengths.insert(length_from(item));
  }
  RetrievalGrid grid;
  grid.length_from.assign(lengths.begin(), lengths.end());
  grid.items = retrieved(grid, items, std::vector<bool>(items.size(), true));
  return grid;
}

std::vector<std::vector<int64_t>> retrieved(const RetrievalGrid& grid, const std::vector<AnswerItem>& items,
                                            const std::vector<bool>& correct) {
  ROTUNDA_ASSERT(items.size() == correct.size(), items.size(), " items, ", correct.size(), " verdicts");
  std::vector<std::vector<int64_t>> counts(grid.length_from.size(), std::vector<int64_t>(RetrievalGrid::kDepths));
  for (size_t i = 0; i < items.size(); ++i) {
    if (!items[i].answer_depth || !correct[i]) continue;
    const auto row =
        std::find(grid.length_from.begin(), grid.length_from.end(), length_from(items[i])) - grid.length_from.begin();
    ++counts[static_cast<size_t>(row)][depth_column(items[i])];
  }
  return counts;
}

}  // namespace rotunda::engine
