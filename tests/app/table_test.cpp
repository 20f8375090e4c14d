#include "app/cli/table.h"

#include <gtest/gtest.h>

#include <cmath>

namespace rotunda::cli {
namespace {

TEST(Table, AlignsColumnsWithAndWithoutBoxes) {
  Table table({"kv", "±", "ppl"});
  table.add_row({"bf16", "0.1", "56.81"});
  table.add_row({"é", "10.25", "7"});
  EXPECT_EQ(table.to_string(false),
            "kv        ±    ppl\n"
            "----  -----  -----\n"
            "bf16    0.1  56.81\n"
            "é     10.25      7\n");
  EXPECT_EQ(table.to_string(true),
            "┌──────┬───────┬───────┐\n"
            "│ kv   │     ± │   ppl │\n"
            "├──────┼───────┼───────┤\n"
            "│ bf16 │   0.1 │ 56.81 │\n"
            "│ é    │ 10.25 │     7 │\n"
            "└──────┴───────┴───────┘\n");
}

TEST(Table, Numbers) {
  EXPECT_EQ(fixed(1.005, 1), "1.0");
  EXPECT_EQ(fixed(NAN, 2), "-");
  EXPECT_EQ(signed_percent(0.0437), "+4.37 %");
  EXPECT_EQ(signed_percent(-0.5), "-50.00 %");
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(999), "999 B");
  EXPECT_EQ(human_bytes(999'960), "1.0 MB");
  EXPECT_EQ(human_bytes(31'457'280), "31.5 MB");
  EXPECT_EQ(grouped(7), "7");
  EXPECT_EQ(grouped(1234567), "1,234,567");
  EXPECT_EQ(grouped(-123), "-123");
  EXPECT_EQ(grouped(-1234), "-1,234");
}

}  // namespace
}  // namespace rotunda::cli
