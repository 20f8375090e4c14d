#pragma once

/// The instruction sets for which Highway sources (*_cpu.cc) are compiled; include this before any Highway header. On x86 these are
/// SCALAR or EMU128 (the compiler's baseline), SSE4, AVX2 and AVX3 (AVX-512 of Skylake-SP); on Arm NEON. Left out: what would
/// give the same instructions once more (SSSE3, AVX3_DL), and SVE, whose vectors have no size that the compiler knows.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
