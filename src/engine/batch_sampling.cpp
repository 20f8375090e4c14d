#include "engine/batch_sampling.h"

#include <ATen/ATen.h>

#include <utility>

#include "base/check.h"

namespace rotunda::engine {

namespace {

// How an id tells of a fault: no logit is finite, or the logit of token i is NaN: kNaN - i.
constexpr int64_t kNoneFinite = -1;
constexpr int64_t kNaN = -2;

// The place among sorted weights [N, n] (fp64) that each draw falls on, [N, 1].
at::Tensor draw_places(const at::Tensor& weights, double top_p, const at::Tensor& draws) {
  const at::Tensor sums = weights.cumsum(1);
  at::Tensor total = sums.narrow(1, sums.size(1) - 1, 1);  // [N, 1]
  at::Tensor last = at::full_like(total, sums.size(1) - 1, at::kLong);
  if (top_p < 1.0) {
    // Kept is what has less than top_p before it.
    const at::Tensor before = at::constant_pad_nd(sums.narrow(1, 0, sums.size(1) - 1), {1, 0});
    last = before.lt(total.mul(top_p)).sum(1, /*keepdim=*/true).sub(1).clamp_min(0);
    total = sums.gather(1, last);
  }
  const at::Tensor place = sums.le(draws.unsqueeze(1).mul(total)).sum(1, /*keepdim=*/true);
  return at::minimum(place, last);
}

// The first of the largest of each row [N, V], NaN before all: value and place, [N, 1] each. A GPU gives a row to one block of threads, so
// long rows go in pieces.
std::pair<at::Tensor, at::Tensor> largest(const at::Tensor& rows) {
  int64_t piece = 256;
  while (piece > 1 && rows.size(1) % piece != 0) piece /= 2;
  if (!rows.is_cuda() || piece < 16) {
    const at::Tensor place = rows.argmax(1, /*keepdim=*/true);
    return {rows.gather(1, place), place};
  }
  const auto [values, places] = rows.contiguous().view({rows.size(0), -1, piece}).max(2);  // of pieces
  const at::Tensor which = values.argmax(1, /*keepdim=*/true);
  return {values.gather(1, which), places.gather(1, which).add(which, piece)};
}

}  // namespace

at::Tensor sample_rows(const at::Tensor& logits, const SamplingOptions& options, const at::Tensor& draws) {
  ROTUNDA_ASSERT(logits.dim() == 2 && logits.scalar_type() == at::kFloat, "logits ", logits.sizes(), " ", logits.scalar_type());
  const auto [max, best] = largest(logits);  // [N, 1] each
  at::Tensor ids = best;
  if (options.temperature > 0.0) {
    ROTUNDA_ASSERT(draws.dim() == 1 && draws.size(0) == logits.size(0) && draws.scalar_type() == at::kDouble, "draws ", draws.sizes());
    auto [values, order] = logits.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
    if (options.top_k > 0 && options.top_k < logits.size(1)) {
      values = values.narrow(1, 0, options.top_k);
      order = order.narrow(1, 0, options.top_k);
    }
    const at::Tensor weights = values.to(at::kDouble).sub(max).div(options.temperature).exp();
    ids = order.gather(1, draw_places(weights, options.top_p, draws));
  }
  ids = at::where(max.isfinite(), ids, at::full_like(ids, kNoneFinite));
  return at::where(max.isnan(), kNaN - best, ids).squeeze(1);
}

std::vector<int64_t> checked_ids(const at::Tensor& ids) {
  const at::Tensor on_host = ids.to(at::kCPU).contiguous();
  const int64_t* data = on_host.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < on_host.numel(); ++row) {
    ROTUNDA_CHECK(data[row] > kNaN, "sampling: the logit of token ", kNaN - data[row], " is NaN, expected a number");
    ROTUNDA_CHECK(data[row] != kNoneFinite, "sampling: no logit is finite");
  }
  return {data, data + on_host.numel()};
}

}  // namespace rotunda::engine
