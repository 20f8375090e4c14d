#include "app/cli/table.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "app/cli/output.h"
#include "base/check.h"

namespace rotunda::cli {

namespace {

// Columns that a text takes on the screen, every character counted as one wide.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

std::string repeat(const std::string& text, size_t n) {
  std::string out;
  for (size_t i = 0; i < n; ++i) out += text;
  return out;
}

std::string format(const char* pattern, int digits, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), pattern, digits, value);
  return text.data();
}

}  // namespace

Table::Table(std::vector<std::string> headers) { rows_.push_back(std::move(headers)); }

void Table::add_row(std::vector<std::string> cells) {
  ROTUNDA_ASSERT(cells.size() == rows_[0].size(), "a row of ", cells.size(), " cells, the table has ", rows_[0].size());
  rows_.push_back(std::move(cells));
}

std::string Table::to_string(bool boxed) const {
  std::vector<size_t> widths(rows_[0].size(), 0);
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], width_of(row[c]));
  }
  const auto rule = [&](const char* left, const char* line, const char* cross, const char* right) {
    std::string out = left;
    for (size_t c = 0; c < widths.size(); ++c) out += (c > 0 ? cross : "") + repeat(line, widths[c] + (boxed ? 2 : 0));
    return out + right + "\n";
  };
  std::string out = boxed ? rule("┌", "─", "┬", "┐") : "";
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line = boxed ? "│ " : "";
    for (size_t c = 0; c < widths.size(); ++c) {
      if (c > 0) line += boxed ? " │ " : "  ";
      const std::string pad(widths[c] - width_of(rows_[r][c]), ' ');
      line += c == 0 ? rows_[r][c] + pad : pad + rows_[r][c];
    }
    if (boxed) line += " │";
    if (!boxed) line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
    if (r == 0) out += boxed ? rule("├", "─", "┼", "┤") : rule("", "-", "  ", "");
  }
  return out + (boxed ? rule("└", "─", "┴", "┘") : "");
}

void print(const Table& table) { write_stdout(table.to_string(isatty(STDOUT_FILENO) == 1)); }

std::string fixed(double value, int digits) { return std::isnan(value) ? "-" : format("%.*f", digits, value); }

std::string human_bytes(int64_t bytes) {
  static constexpr std::array<const char*, 6> kUnits = {"B", "kB", "MB", "GB", "TB", "PB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 999.95 && unit + 1 < kUnits.size()) {
    value /= 1000.0;
    ++unit;
  }
  return fixed(value, unit == 0 ? 0 : 1) + " " + kUnits[unit];
}

std::string grouped(int64_t value) {
  std::string digits = std::to_string(value);
  const int64_t first = value < 0 ? 1 : 0;
  for (int64_t place = static_cast<int64_t>(digits.size()) - 3; place > first; place -= 3) {
    digits.insert(static_cast<size_t>(place), ",");
  }
  return digits;
}

std::string signed_percent(double ratio) {
  return std::isnan(ratio) ? "-" : format("%+.*f %%", 2, 100.0 * ratio);
}

}  // namespace rotunda::cli
