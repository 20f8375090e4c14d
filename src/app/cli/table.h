#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rotunda::cli {

/// A table of text: the first column to the left, the others to the right.
class Table {
 public:
  explicit Table(std::vector<std::string> headers);
  /// As many cells as there are headers.
  void add_row(std::vector<std::string> cells);
  /// Lines between the cells where `boxed`, else columns two blanks apart under a rule. Ends in a newline.
  std::string to_string(bool boxed) const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the first: headers
};

/// Prints to stdout; boxed where that is a terminal. @throws Error{kWorld} where it cannot be written.
void print(const Table& table);

/// A number with so many digits after the point; "-" where it is NaN.
std::string fixed(double value, int digits);
/// 1234567 as "1.2 MB" (powers of 1000).
std::string human_bytes(int64_t bytes);
/// 1234567 as "1,234,567".
std::string grouped(int64_t value);
/// 0.1234 as "+12.34 %".
std::string signed_percent(double ratio);

}  // namespace rotunda::cli
