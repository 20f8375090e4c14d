#pragma once

#include <cstdint>
#include <memory>

#include "kv/page_memory.h"

namespace rotunda::kv {

/// Memory of the current GPU that grows without moving and without gaps: addresses are reserved once, memory comes in as it is asked for.
class PageMemoryCuda : public PageMemory {
 public:
  /// Where the first byte lies; what grow() gives follows it.
  virtual std::byte* base() const = 0;
};

/// @param budget_bytes never more than this, all else on the GPU counted; 0: as much as it has
/// @throws Error{kWorld} where the driver refuses
std::unique_ptr<PageMemoryCuda> cuda_page_memory(int64_t budget_bytes);

}  // namespace rotunda::kv
