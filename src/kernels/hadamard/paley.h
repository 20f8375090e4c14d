#pragma once

namespace rotunda::kernels {

/// Entry of the Hadamard matrix of order m = 1, 12, 20 (Paley I) or 28 (Paley II), +-1. Slow: tables are made of it.
int paley_entry(int m, int i, int j);

}  // namespace rotunda::kernels
