#pragma once

// Runs the body of a CUDA kernel on the CPU, one thread block at a time, so that its indexing and its arithmetic are tested where there
// is no GPU. A CUDA thread is a fiber; fibers of a warp run in turn from one warp-wide operation to the next, where they exchange what
// they hold. What it is for: layouts, fragments, masks, work splitting, waits that came too early (a copy in the background arrives when
// it is waited for, not before). What it cannot find: races between warps, and anything about speed.
//
// A test puts this folder in front of src/ on the include path: cuda_runtime.h and kernels/cuda/ptx.cuh are then the ones here.

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace rotunda::emulation {

inline constexpr unsigned kWarp = 32;
inline constexpr size_t kMaxWords = 4;  ///< that a thread gives to one exchange

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

/// One CUDA thread.
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;  ///< not filled: most of it is never touched
  unsigned index = 0;
  bool done = false;
  bool at_barrier = false;
  bool odd = false;  ///< which of the warp's two exchange buffers comes next
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
};

/// One thread block while it runs.
class Block {
 public:
  Block(unsigned n_threads, std::function<void()> body) : body_(std::move(body)), threads_(n_threads), exchanges_(n_threads / kWarp) {
    for (unsigned i = 0; i < n_threads; ++i) {
      Thread& thread = threads_[i];
      thread.index = i;
      thread.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
    }
  }

  void run(const std::function<void(unsigned)>& on_switch) {
    current_block() = this;
    on_switch_ = on_switch;
    for (;;) {
      bool ran = false;
      for (size_t first = 0; first < threads_.size(); first += kWarp) ran = run_warp(first) || ran;
      bool done = true;
      for (const Thread& thread : threads_) done = done && thread.done;
      if (done) break;
      if (!ran) throw std::logic_error("cuda emulation: deadlock");
      // All that have not ended stand at __syncthreads.
      for (Thread& thread : threads_) thread.at_barrier = false;
    }
    current_block() = nullptr;
  }

  static Block& current() { return *current_block(); }
  Thread& thread() { return *running_; }
  unsigned lane() const { return running_->index % kWarp; }

  /// Gives control to the next thread.
  void yield() { leave(); }

  /// Waits for the warp; returns word `w` of lane `l` as [w][l].
  using Words = std::array<std::array<uint64_t, kWarp>, kMaxWords>;
  const Words& exchange(std::initializer_list<uint64_t> words) {
    Thread& thread = *running_;
    Words& buffer = exchanges_[thread.index / kWarp][thread.odd ? 1 : 0];
    thread.odd = !thread.odd;
    size_t w = 0;
    for (const uint64_t word : words) buffer[w++][lane()] = word;
    yield();
    return buffer;
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;

  static Block*& current_block() {
    static thread_local Block* block = nullptr;
    return block;
  }

  /// Every thread of the warp goes on to its next exchange, until all have ended or stand at the barrier.
  bool run_warp(size_t first) {
    bool ran = false;
    for (bool again = true; again;) {
      again = false;
      for (size_t i = first; i < first + kWarp; ++i) {
        Thread& thread = threads_[i];
        if (thread.done || thread.at_barrier) continue;
        running_ = &thread;
        on_switch_(thread.index);
        resume(thread);
        ran = again = true;
      }
    }
    return ran;
  }

  static void enter() {
    Block& block = current();
    block.arrived(nullptr);
    block.body_();
    block.running_->done = true;
    block.leave();
  }

#if defined(__SANITIZE_ADDRESS__)
  void resume(Thread& thread) {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, thread.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &thread.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }
  void leave() {
    void* fake = nullptr;
    Thread& thread = *running_;
    __sanitizer_start_switch_fiber(thread.done ? nullptr : &fake, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&thread.context, &scheduler_);
    arrived(fake);
  }
  void arrived(void* fake) { __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_stack_bytes_); }
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#else
  void resume(Thread& thread) { swapcontext(&scheduler_, &thread.context); }
  void leave() { swapcontext(&running_->context, &scheduler_); }
  void arrived(void*) {}
#endif

  std::function<void()> body_;
  std::function<void(unsigned)> on_switch_;
  std::vector<Thread> threads_;
  std::vector<std::array<Words, 2>> exchanges_;  // [warp]: a thread may reach the next exchange before all have read this one
  Thread* running_ = nullptr;
  ucontext_t scheduler_;
};

}  // namespace rotunda::emulation
