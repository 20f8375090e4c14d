#include "kv/page_pool.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace rotunda::kv {

namespace {

constexpr int64_t kAlignment = 64;
// A slab is about this large: few calls to the system, little memory idle in a small cache.
constexpr int64_t kSlabBytes = int64_t{1} << 20;

}  // namespace

PagePool::PagePool(int64_t page_bytes, std::unique_ptr<PageMemory> memory)
    : page_bytes_((page_bytes + kAlignment - 1) / kAlignment * kAlignment), memory_(std::move(memory)) {
  ROTUNDA_ASSERT(page_bytes > 0);
}

void PagePool::reserve(int64_t n_pages) {
  int64_t missing = n_pages - free_pages();
  if (missing <= 0) return;
  const int64_t pages_per_slab = std::max<int64_t>(1, kSlabBytes / page_bytes_);
  missing = (missing + pages_per_slab - 1) / pages_per_slab * pages_per_slab;
  const int64_t wanted = missing * page_bytes_;
  const int64_t available = memory_->available_bytes();
  ROTUNDA_CHECK_WORLD(wanted < available, "kv cache: ", n_pages, " pages more take ", wanted, " bytes, this ", memory_->owner(),
                      " has ", available, " bytes left");
  // Zeros: unwritten tokens then hold finite numbers, which masks rely on.
  std::byte* const bytes = memory_->grow(wanted);
  ROTUNDA_CHECK_WORLD(bytes != nullptr, "kv cache: out of memory, could not get ", wanted, " bytes for ", missing, " pages");
  for (int64_t i = 0; i < missing; ++i) {
    pages_.push_back({bytes + i * page_bytes_, 0});
    free_.push_back(&pages_.back());
  }
}

Page* PagePool::take() {
  reserve(1);
  Page* page = free_.back();
  free_.pop_back();
  page->refs = 1;
  return page;
}

void PagePool::ref(Page* page) { ++page->refs; }

void PagePool::unref(Page* page) {
  ROTUNDA_ASSERT(page->refs > 0, "a page is given back twice");
  if (--page->refs == 0) free_.push_back(page);
}

}  // namespace rotunda::kv
