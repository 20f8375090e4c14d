#pragma once

// src/kernels/cuda/ptx.cuh for the CPU, from the fragments of the PTX manual; see warps.h.

#include "cuda_runtime.h"

namespace rotunda::kernels::ptx {

namespace emulated {

inline emulation::Block& block() { return emulation::Block::current(); }

/// A product's operands as the lanes hold them: k elements of `bits` bits a register, two registers in a word.
inline const emulation::Block::Words& exchange(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  return block().exchange({a[0] | uint64_t{a[1]} << 32, a[2] | uint64_t{a[3]} << 32, b0 | uint64_t{b1} << 32});
}
/// Element (row, k) of the left operand, (k, column) of the right one. K: 32 bytes or 16 halves.
template <int kK>
uint32_t left(const emulation::Block::Words& words, int row, int k) {
  constexpr int kPerRegister = kK / 8;
  const uint64_t word = words[k / (kK / 2)][row % 8 * 4 + k % (kK / 2) / kPerRegister];
  return static_cast<uint32_t>(row >= 8 ? word >> 32 : word) >> (k % kPerRegister * (32 / kPerRegister));
}
template <int kK>
uint32_t right(const emulation::Block::Words& words, int k, int column) {
  constexpr int kPerRegister = kK / 8;
  const uint64_t word = words[2][column * 4 + k % (kK / 2) / kPerRegister];
  return static_cast<uint32_t>(k >= kK / 2 ? word >> 32 : word) >> (k % kPerRegister * (32 / kPerRegister));
}

inline float to_float(uint32_t bits, __half) { return __half2float({static_cast<uint16_t>(bits)}); }
inline float to_float(uint32_t bits, __nv_bfloat16) { return __bfloat162float({static_cast<uint16_t>(bits)}); }

/// Calls f(i, row, column) for the lane's elements of a product.
template <typename F>
void for_each_of_lane(const F& f) {
  const int lane = static_cast<int>(block().lane());
  for (int i = 0; i < 4; ++i) f(i, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
}

}  // namespace emulated

inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool accumulate) {
  const auto& words = emulated::exchange(a, b0, b1);
  emulated::for_each_of_lane([&](int i, int row, int column) {
    if (!accumulate) d[i] = 0;
    for (int k = 0; k < 32; ++k)
      d[i] += static_cast<int>(static_cast<uint8_t>(emulated::left<32>(words, row, k))) *
              static_cast<int>(static_cast<int8_t>(emulated::right<32>(words, k, column)));
  });
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  const auto& words = emulated::exchange(a, b0, b1);
  emulated::for_each_of_lane([&](int i, int row, int column) {
    for (int k = 0; k < 16; ++k)
      d[i] += emulated::to_float(emulated::left<16>(words, row, k), type) * emulated::to_float(emulated::right<16>(words, k, column), type);
  });
}

inline void mma_half(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float sums[4] = {};
  mma(sums, a, b0, b1, __half());
  for (int i = 0; i < 2; ++i) d[i] = to_half(sums[2 * i]).bits | uint32_t{to_half(sums[2 * i + 1]).bits} << 16;
}

namespace emulated {
/// f on the halves of up to three registers; in double, so that a product and a sum are rounded once.
template <typename F>
uint32_t on_halves(uint32_t x, uint32_t y, uint32_t z, const F& f) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    const auto half = [i](uint32_t both) { return double{rotunda::to_float(Half{static_cast<uint16_t>(both >> 16 * i)})}; };
    d |= uint32_t{to_half(static_cast<float>(f(half(x), half(y), half(z)))).bits} << 16 * i;
  }
  return d;
}
}  // namespace emulated

inline uint32_t add_halves(uint32_t x, uint32_t y) {
  return emulated::on_halves(x, y, 0, [](double a, double b, double) { return a + b; });
}
inline uint32_t sub_halves(uint32_t x, uint32_t y) {
  return emulated::on_halves(x, y, 0, [](double a, double b, double) { return a - b; });
}
inline uint32_t mul_halves(uint32_t x, uint32_t y) {
  return emulated::on_halves(x, y, 0, [](double a, double b, double) { return a * b; });
}
inline uint32_t fma_halves(uint32_t x, uint32_t y, uint32_t z) {
  return emulated::on_halves(x, y, z, [](double a, double b, double c) { return a * b + c; });
}
inline uint32_t negative_fma_halves(uint32_t x, uint32_t y, uint32_t z) {
  return emulated::on_halves(x, y, z, [](double a, double b, double c) { return c - a * b; });
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto& words = emulated::block().exchange({reinterpret_cast<uintptr_t>(row)});
  const unsigned lane = emulated::block().lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto at = [&](unsigned from) { return uint32_t{reinterpret_cast<const uint16_t*>(words[0][8 * i + from])[lane / 4]}; };
    r[i] = at(lane % 4 * 2) | at(lane % 4 * 2 + 1) << 16;
  }
}

inline uint32_t transpose_matrix(uint32_t x) {
  const auto& words = emulated::block().exchange({x});
  const unsigned lane = emulated::block().lane();
  const unsigned column = lane / 4;
  const auto at = [&](unsigned row) { return static_cast<uint32_t>(words[0][row * 4 + column / 2] >> (16 * (column % 2)) & 0xffff); };
  return at(lane % 4 * 2) | at(lane % 4 * 2 + 1) << 16;
}

namespace emulated {
/// Until it is waited for, the place holds bytes that no test expects.
inline void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    throw std::logic_error("cuda emulation: asynchronous copy of unaligned bytes");
  std::memset(to, 0xcd, bytes);
  block().thread().open_copies.push_back({to, from, bytes});
}
}  // namespace emulated
inline void copy_16_async(void* to, const void* from) { emulated::copy_async(to, from, 16); }
inline void copy_8_async(void* to, const void* from) { emulated::copy_async(to, from, 8); }
inline void commit_copies() {
  emulation::Thread& thread = emulated::block().thread();
  thread.copies.push_back(std::exchange(thread.open_copies, {}));
}
template <int kPending>
void wait_copies() {
  emulation::Thread& thread = emulated::block().thread();
  while (thread.copies.size() > kPending) {
    for (const auto& copy : thread.copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    thread.copies.pop_front();
  }
}

inline int add(int* counter, int more) { return std::exchange(*counter, *counter + more); }

template <typename T>
T load_shared_by_all(const T* from) {
  return *from;
}

inline void wait_for_launches_before() {}

inline float reciprocal_approximate(float x) { return 1.0F / x; }

inline float exp2_approximate(float x) { return std::exp2(x); }

}  // namespace rotunda::kernels::ptx
