#pragma once

/// Like simd_targets.h, for sources that multiply 8-bit integers: with AVX3_DL (AVX-512 of Ice Lake and Zen 4), whose VNNI
/// instruction does in one step what takes AVX3 three. Highway compiles AVX3_DL only if asked. Its successors would give the same
/// instructions once more: x86 targets better than AVX3_DL are bits 0 to 6 (AVX3_ZEN4 and AVX3_SPR from Highway 1.0.7 on; older
/// versions do not have their names). Include this instead of simd_targets.h and before any Highway header.
#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | 0x7fLL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

/// The method by which Highway looks up the machine's instruction set, and which depends on the list above. Where compilers do not inline
/// it (-O0) the linker keeps one copy for all sources, and a source with the other list would find no function under its index: so here it
/// has a name of its own.
#define GetIndex GetIndexDot
