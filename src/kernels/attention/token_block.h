#pragma once

namespace rotunda::kernels {

/// Tokens of one block. Keys are stored "token-lane": for every channel the 16 tokens of a block lie side by side, so a
/// vector register holds one channel of 16 tokens (or 8, or 4, at a time). Rotations across channels, RoPE and scores are
/// then plain vector arithmetic: no shuffle and no horizontal sum, on any instruction set. docs/formats.md has the reasons.
inline constexpr int kTokenBlock = 16;

}  // namespace rotunda::kernels
