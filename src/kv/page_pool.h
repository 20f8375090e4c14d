#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "kv/page_memory.h"

namespace rotunda::kv {

/// A fixed-size piece of cache memory (perhaps a GPU's), 64-byte aligned, with a count of the sequences that refer to it.
struct Page {
  std::byte* bytes = nullptr;
  int32_t refs = 0;
};

/// Pages of one size, taken from the system in slabs and never moved. Not thread-safe.
class PagePool {
 public:
  /// @param page_bytes > 0; rounded up to a multiple of 64
  explicit PagePool(int64_t page_bytes, std::unique_ptr<PageMemory> memory = host_page_memory());

  int64_t page_bytes() const { return page_bytes_; }
  PageMemory& memory() { return *memory_; }
  const PageMemory& memory() const { return *memory_; }

  /// Makes sure that `n_pages` can be taken without asking the system. @throws Error{kWorld} naming the bytes wanted and those
  /// available; then nothing has changed.
  void reserve(int64_t n_pages);
  /// A page with refs = 1; its bytes are zero when it first comes from the system, unspecified later. @throws as reserve().
  Page* take();
  void ref(Page* page);
  /// Gives the page back when nobody refers to it any more.
  void unref(Page* page);

  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  int64_t used_pages() const { return static_cast<int64_t>(pages_.size()) - free_pages(); }

 private:
  int64_t page_bytes_;
  std::unique_ptr<PageMemory> memory_;
  std::deque<Page> pages_;
  std::vector<Page*> free_;
};

}  // namespace rotunda::kv
