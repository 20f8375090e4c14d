#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "io/checkpoint_index.h"

namespace rotunda::model {

/// Turns a checkpoint's tensors into the model's dtype, all together and in parallel. Ask for the tensors first, then run().
/// A tensor that has the wanted dtype already is a view of the mapped file and costs no memory; on a GPU all are copies, made piece by
/// piece out of the mapped file.
class WeightLoader {
 public:
  WeightLoader(const io::CheckpointIndex& index, at::ScalarType dtype, at::Device device = at::kCPU);

  /// Whether the tensor can be used as it lies in the file.
  bool is_mappable(const std::string& name) const;
  /// The tensor in the wanted dtype; its content is there after run(). Do not write to it.
  /// @throws Error{kUser} naming folder and tensor where it is absent, no float, or of another shape (got, expected).
  at::Tensor take(const std::string& name, at::IntArrayRef sizes);
  /// Tensors of shapes [rows_i, ...] one below the other: [sum of rows_i, ...].
  at::Tensor take_stacked(const std::vector<std::string>& names, const std::vector<std::vector<int64_t>>& sizes);

  /// Converts and checks all that was taken. `progress` is called from this thread, in bytes of the checkpoint; may be empty.
  /// @throws Error{kUser} naming the first tensor that holds NaN or Inf.
  void run(const std::function<void(int64_t done_bytes, int64_t total_bytes)>& progress);

 private:
  struct Item {
    std::string name;
    at::Tensor source;
    at::Tensor target;  // undefined: the source is used as it is
  };
  at::Tensor source(const std::string& name, at::IntArrayRef sizes) const;

  const io::CheckpointIndex& index_;
  at::ScalarType dtype_;
  at::Device device_;
  std::vector<Item> items_;
};

}  // namespace rotunda::model
