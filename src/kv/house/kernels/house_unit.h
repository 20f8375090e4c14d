#pragma once

namespace rotunda::kv::house {

/// Units of pages in house_decode_cuda, for kernels::paged_decode_units: half a page.
inline constexpr int kHouseUnitTokens = 64;

}  // namespace rotunda::kv::house
