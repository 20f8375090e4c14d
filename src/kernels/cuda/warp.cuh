#pragma once

namespace rotunda::kernels {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffU;

}  // namespace rotunda::kernels
