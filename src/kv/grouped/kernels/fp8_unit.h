#pragma once

namespace rotunda::kv::grouped {

/// Units of pages in fp8_decode_cuda, for kernels::paged_decode_units: a quarter of a page.
inline constexpr int kFp8UnitTokens = 32;

}  // namespace rotunda::kv::grouped
