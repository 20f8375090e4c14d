#include "model/weight_loader.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <thread>

#include "base/check.h"

namespace rotunda::model {

namespace {

// True where any of the n values has all exponent bits set: NaN or Inf. No early exit, so that it vectorizes.
template <typename Bits>
bool any_non_finite(const Bits* values, int64_t n, Bits exponent_mask) {
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<Bits>((values[i] & exponent_mask) == exponent_mask);
  return found != 0;
}

bool any_non_finite(const at::Tensor& chunk) {
  const int64_t n = chunk.numel();
  switch (chunk.scalar_type()) {
    case at::kBFloat16:
      return any_non_finite<uint16_t>(static_cast<const uint16_t*>(chunk.const_data_ptr()), n, 0x7f80u);
    case at::kHalf:
      return any_non_finite<uint16_t>(static_cast<const uint16_t*>(chunk.const_data_ptr()), n, 0x7c00u);
    case at::kFloat:
      return any_non_finite<uint32_t>(static_cast<const uint32_t*>(chunk.const_data_ptr()), n, 0x7f800000u);
    default:
      ROTUNDA_ASSERT(false, "weights of dtype ", chunk.scalar_type());
  }
}

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % static_cast<uintptr_t>(tensor.element_size()) == 0;
}

}  // namespace

WeightLoader::WeightLoader(const io::CheckpointIndex& index, at::ScalarType dtype, at::Device device)
    : index_(index), dtype_(dtype), device_(device) {}

at::Tensor WeightLoader::source(const std::string& name, at::IntArrayRef sizes) const {
  const io::SafetensorsFile::Entry& entry = index_.entry(name);
  const std::string where = concat(index_.model_dir().string(), ": tensor ", name);
  ROTUNDA_CHECK(at::IntArrayRef(entry.shape) == sizes, where, " has shape ", at::IntArrayRef(entry.shape),
                ", expected ", sizes, " by config.json");
  ROTUNDA_CHECK(entry.dtype == at::kFloat || entry.dtype == at::kHalf || entry.dtype == at::kBFloat16, where, " is ",
                entry.dtype, ", expected Float, Half or BFloat16");
  const at::Tensor tensor = index_.tensor(name);
  // A header of odd length shifts the data; then an aligned copy of the bytes is read instead.
  if (is_aligned(tensor)) return tensor;
  at::Tensor copy = at::empty(sizes, at::TensorOptions().dtype(entry.dtype));
  std::memcpy(copy.mutable_data_ptr(), tensor.const_data_ptr(), copy.nbytes());
  return copy;
}

bool WeightLoader::is_mappable(const std::string& name) const {
  return device_.is_cpu() && index_.entry(name).dtype == dtype_;
}

at::Tensor WeightLoader::take(const std::string& name, at::IntArrayRef sizes) {
  Item item{name, source(name, sizes), {}};
  if (!is_mappable(name)) item.target = at::empty(sizes, at::TensorOptions().dtype(dtype_).device(device_));
  items_.push_back(item);
  return item.target.defined() ? item.target : item.source;
}

at::Tensor WeightLoader::take_stacked(const std::vector<std::string>& names,
                                      const std::vector<std::vector<int64_t>>& sizes) {
  std::vector<int64_t> stacked_sizes = sizes.at(0);
  for (size_t i = 1; i < sizes.size(); ++i) stacked_sizes[0] += sizes[i][0];
  const at::Tensor stacked = at::empty(stacked_sizes, at::TensorOptions().dtype(dtype_).device(device_));
  int64_t row = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    items_.push_back({names[i], source(names[i], sizes[i]), stacked.narrow(0, row, sizes[i][0])});
    row += sizes[i][0];
  }
  return stacked;
}

void WeightLoader::run(const std::function<void(int64_t, int64_t)>& progress) {
  // Pieces of like size rather than whole tensors: an embedding can be a third of a small model.
  constexpr int64_t kPieceElements = int64_t{1} << 20;
  struct Piece {
    size_t item;
    int64_t begin, n;  // elements
  };
  std::vector<Piece> pieces;
  int64_t total_bytes = 0;
  for (size_t i = 0; i < items_.size(); ++i) {
    const int64_t numel = items_[i].source.numel();
    for (int64_t begin = 0; begin < numel; begin += kPieceElements)
      pieces.push_back({i, begin, std::min(kPieceElements, numel - begin)});
    total_bytes += static_cast<int64_t>(items_[i].source.nbytes());
  }

  std::vector<std::atomic<bool>> bad(items_.size());
  std::atomic<size_t> next{0};
  std::atomic<int64_t> done_bytes{0};
  const std::thread::id caller = std::this_thread::get_id();
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t p = next++; p < pieces.size(); p = next++) {
      const Piece& piece = pieces[p];
      const Item& item = items_[piece.item];
      const at::Tensor chunk = item.source.view({-1}).narrow(0, piece.begin, piece.n);
      if (any_non_finite(chunk)) bad[piece.item] = true;
      if (item.target.defined()) item.target.view({-1}).narrow(0, piece.begin, piece.n).copy_(chunk);
      done_bytes += static_cast<int64_t>(chunk.nbytes());
      if (progress && std::this_thread::get_id() == caller) progress(done_bytes, total_bytes);
    }
  });
  if (progress) progress(total_bytes, total_bytes);
  for (size_t i = 0; i < items_.size(); ++i)
    ROTUNDA_CHECK(!bad[i], index_.model_dir().string(), ": tensor ", items_[i].name,
                  " holds NaN or Inf, expected finite weights");
  items_.clear();
}

}  // namespace rotunda::model
