// Decode attention on a GPU: ours over 16-bit, fp8 and rotunda pages against LibTorch's scaled dot product attention (every backend, the
// fastest arrangement of each), in one run. Every kernel is checked against fp32 arithmetic first; times are medians of CUDA events, with
// L2 full of clean lines of something else before each. Prints a table; --json FILE writes everything.
//
//   attention_cuda [--repetitions 50] [--json FILE] [--shape NAME]... [--row TEXT]...

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

#include <c10/core/GradMode.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/check.h"
#include "cuda/read_bandwidth.h"
#include "cuda/timer.h"
#include "kernels/attention/plain_decode_cuda.h"
#include "kv/grouped/kernels/fp8_decode_cuda.h"
#include "kv/house/house_codec_cuda.h"
#include "kv/house/kernels/house_decode_cuda.h"
#include "kv/house/kernels/house_page.h"
#include "kv/rotate/kernels/rotate_page.h"
#include "kv/rotate/rotate_codec_cuda.h"

namespace rotunda::bench {
namespace {

using kernels::PagedDecode;
using kernels::PagedDecodeGrid;
using kv::house::HousePageLayout;

struct Shape {
  std::string name;
  int64_t batch, kv_len, n_heads, n_kv_heads, head_dim;
  int64_t rep() const { return n_heads / n_kv_heads; }
};

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {"llama3-8b-8x32k", 8, 32768, 32, 8, 128}, {"llama3-8b-1x128k", 1, 131072, 32, 8, 128}, {"llama3-8b-64x4k", 64, 4096, 32, 8, 128},
      {"llama2-13b-8x4k", 8, 4096, 40, 40, 128}, {"llama3-8b-1x4k", 1, 4096, 32, 8, 128},
  };
  return all;
}

constexpr int64_t kPageTokens = 128;
constexpr int kExactBlocks = 6;  // a window of 64, and sinks

// ---- the cases -------------------------------------------------------------------------------------------------------

/// What all kernels of one shape read: keys and values [batch, n_kv_heads, kv_len, head_dim] bf16, queries with softmax scale.
struct Inputs {
  Shape shape;
  at::Tensor q, k, v;

  explicit Inputs(const Shape& of) : shape(of) {
    at::manual_seed(1);
    q = at::randn({shape.batch, shape.n_heads, 1, shape.head_dim}, on_gpu(at::kFloat));
    k = at::randn({shape.batch, shape.n_kv_heads, shape.kv_len, shape.head_dim}, on_gpu(at::kBFloat16));
    v = at::randn({shape.batch, shape.n_kv_heads, shape.kv_len, shape.head_dim}, on_gpu(at::kBFloat16));
  }
};

/// Attention of the first sequence in fp32. @param k, v [n_kv_heads, T, head_dim] fp32  @param q [n_heads, head_dim], scale in
at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const at::Tensor heads = q.view({k.size(0), -1, k.size(2)});
  return at::bmm(at::bmm(heads, k.transpose(1, 2)).softmax(-1), v).flatten(0, 1);
}

/// Ours, ready to launch. Owns what the kernels read.
class Paged {
 public:
  /// @param pool [n_pages, page_bytes] bytes, pages of a sequence one after the other
  Paged(const Inputs& in, at::Tensor pool, int unit_tokens, int exact_blocks) : in_(in), pool_(std::move(pool)) {
    const Shape& s = in.shape;
    const int64_t pages = s.kv_len / kPageTokens;
    // Pages of a sequence lie anywhere in a real pool.
    const at::Tensor order = at::randperm(s.batch * pages, on_gpu(at::kLong));
    at::Tensor shuffled = at::empty_like(pool_);
    shuffled.index_copy_(0, order, pool_);
    pool_ = shuffled;
    table_ = order.to(at::kInt).view({s.batch, pages});
    stored_ = at::full({s.batch}, s.kv_len, on_gpu(at::kInt));
    q_ = (in.q * (1.0 / std::sqrt(static_cast<double>(s.head_dim)))).contiguous();
    exact_ = at::randn({s.batch, 2, s.n_kv_heads, std::max(exact_blocks, 1) * 16 * s.head_dim}, on_gpu(at::kHalf));
    exact_masks_ = at::full({s.batch, std::max(exact_blocks, 1)}, -1, on_gpu(at::kShort));
    units_ = at::arange(s.batch + 1, on_gpu(at::kInt)) * kernels::paged_decode_units(s.kv_len, unit_tokens, exact_blocks);
    out_ = at::full({s.batch, s.n_heads, s.head_dim}, NAN, on_gpu(at::kFloat));
    p_.batch = static_cast<int>(s.batch);
    p_.n_kv_heads = static_cast<int>(s.n_kv_heads);
    p_.n_q = static_cast<int>(s.rep());
    p_.head_dim = static_cast<int>(s.head_dim);
    p_.q_pages = p_.q_exact = q_.const_data_ptr<float>();
    p_.pool = static_cast<const std::byte*>(pool_.const_data_ptr());
    p_.page_bytes = pool_.size(1);
    p_.block_table = table_.const_data_ptr<int32_t>();
    p_.table_stride = static_cast<int>(pages);
    p_.stored_len = stored_.const_data_ptr<int32_t>();
    p_.exact = static_cast<const std::byte*>(exact_.const_data_ptr());
    p_.exact_stride = exact_.stride(0) * 2;
    p_.exact_blocks = exact_blocks;
    p_.exact_masks = reinterpret_cast<const uint16_t*>(exact_masks_.const_data_ptr<int16_t>());
    p_.units_before = units_.const_data_ptr<int32_t>();
    p_.out = out_.mutable_data_ptr<float>();
  }

  PagedDecode& params() { return p_; }
  void allocate_workspace(const PagedDecodeGrid& grid) {
    workspace_ = at::zeros({kernels::paged_decode_workspace_bytes(grid, p_.batch, p_.n_kv_heads, p_.n_q, p_.head_dim)}, on_gpu(at::kByte));
    p_.workspace = static_cast<std::byte*>(workspace_.mutable_data_ptr());
  }
  /// [n_heads, head_dim] of the first sequence.
  at::Tensor first_out() const { return out_[0]; }
  at::Tensor first_q() const { return q_[0].squeeze(1); }
  /// Pages of the first sequence in order, and its exact keys and values [n_kv_heads, tokens, head_dim] fp32.
  at::Tensor first_table() const { return table_[0]; }
  at::Tensor first_pages() const { return pool_.index_select(0, table_[0].to(at::kLong)); }
  std::pair<at::Tensor, at::Tensor> first_exact() const {
    const Shape& s = in_.shape;
    const at::Tensor keys = exact_[0][0].view({s.n_kv_heads, -1, s.head_dim, 16}).transpose(2, 3).reshape({s.n_kv_heads, -1, s.head_dim});
    return {keys.to(at::kFloat), exact_[0][1].view({s.n_kv_heads, -1, s.head_dim}).to(at::kFloat)};
  }
  int64_t bytes() const { return pool_.numel() + p_.batch * int64_t{p_.exact_blocks} * 16 * 2 * 2 * p_.n_kv_heads * p_.head_dim; }

 private:
  const Inputs& in_;
  at::Tensor pool_, table_, stored_, q_, exact_, exact_masks_, units_, out_, workspace_;
  PagedDecode p_;
};

/// Pages as PlainPageLayout has them, of type kBFloat16 or kHalf.
at::Tensor plain_pool(const Inputs& in, at::ScalarType type) {
  const Shape& s = in.shape;
  const int64_t pages = s.kv_len / kPageTokens;
  const at::Tensor k = in.k.view({s.batch, s.n_kv_heads, pages, 8, 16, s.head_dim}).permute({0, 2, 1, 3, 5, 4}).reshape({s.batch * pages, -1});
  const at::Tensor v = in.v.view({s.batch, s.n_kv_heads, pages, kPageTokens, s.head_dim}).permute({0, 2, 1, 3, 4}).reshape({s.batch * pages, -1});
  return at::cat({k, v}, 1).to(type).view(at::kByte);
}

/// Keys or values as fp8 has them: e4m3 codes, and one scale per token and head.
struct Fp8Side {
  at::Tensor codes;  ///< [batch, n_kv_heads, kv_len, head_dim] kFloat8_e4m3fn
  at::Tensor scale;  ///< [batch, n_kv_heads, kv_len, 1] kHalf

  explicit Fp8Side(const at::Tensor& x) : scale((x.to(at::kFloat).abs().amax(3, /*keepdim=*/true) / 448.0).to(at::kHalf)) {
    codes = (x.to(at::kFloat) / scale.to(at::kFloat)).to(at::kFloat8_e4m3fn);
  }
  /// Of the first sequence, fp32.
  at::Tensor first() const { return codes[0].to(at::kFloat) * scale[0].to(at::kFloat); }
};

/// Pages as GroupedPageLayout has them with 8 bits and a scale a head.
at::Tensor fp8_pool(const Shape& s, const Fp8Side& k, const Fp8Side& v) {
  const int64_t pages = s.kv_len / kPageTokens;
  const auto by_page = [&](const at::Tensor& x, at::IntArrayRef rest, at::IntArrayRef order) {  // [batch, pages, n_kv_heads, bytes]
    std::vector<int64_t> sizes = {s.batch, s.n_kv_heads, pages}, dims = {0, 2, 1};
    sizes.insert(sizes.end(), rest.begin(), rest.end());
    for (const int64_t dim : order) dims.push_back(3 + dim);
    return x.view(sizes).permute(dims).reshape({s.batch, pages, s.n_kv_heads, -1}).contiguous().view(at::kByte);
  };
  // A word of keys: four channels of a token; of values: four tokens of a channel.
  return at::cat({by_page(k.codes.view(at::kByte), {8, 16, s.head_dim / 4, 4}, {0, 2, 1, 3}), by_page(v.codes.view(at::kByte), {32, 4, s.head_dim}, {0, 2, 1}),
                  by_page(k.scale, {kPageTokens}, {0}), by_page(v.scale, {kPageTokens}, {0})},
                 3)
      .view({s.batch * pages, -1});
}

HousePageLayout house_layout(const Shape& s, int bits) {
  return {bits, bits, static_cast<int>(s.n_kv_heads), static_cast<int>(s.head_dim), static_cast<int>(kPageTokens / 16)};
}

/// Pages of any codes with scales as a cache of normal numbers has them.
at::Tensor house_pool(const Shape& s, int bits) {
  const HousePageLayout l = house_layout(s, bits);
  at::Tensor pool = at::randint(0, 256, {s.batch * s.kv_len / kPageTokens, s.n_kv_heads, l.head_bytes()}, on_gpu(at::kByte));
  const int64_t codes = l.key_codes_bytes() + l.value_codes_bytes();
  const double step = bits == 2 ? 0.5 : bits == 3 ? 0.28 : 0.16;
  const at::Tensor scales = (at::rand({pool.size(0), s.n_kv_heads, 2 * kPageTokens}, on_gpu(at::kFloat)) * 0.2 + 0.9) * step;
  pool.slice(2, codes, codes + 4 * kPageTokens).copy_(scales.to(at::kHalf).view(at::kByte));
  return pool.view({pool.size(0), -1});
}

/// Keys or values [n_kv_heads, T, head_dim] fp32 of one sequence's 2-bit pages.
at::Tensor house_decoded(const at::Tensor& pages, const Shape& s, bool keys) {
  const HousePageLayout l = house_layout(s, 2);
  const at::Tensor heads = pages.view({pages.size(0), s.n_kv_heads, l.head_bytes()});
  const int64_t at = keys ? 0 : l.key_codes_bytes();
  // Bytes of words: byte i of a word has elements 4 j + i at bits 2 j.
  const at::Tensor bytes = heads.slice(2, at, at + l.key_codes_bytes()).reshape({pages.size(0), s.n_kv_heads, 8, -1, 4}).to(at::kInt);
  std::vector<at::Tensor> groups;
  for (int j = 0; j < 4; ++j) groups.push_back(at::bitwise_and(at::bitwise_right_shift(bytes, 2 * j), 3) * 2 - 3);
  const at::Tensor elements = at::stack(groups, 4).flatten(4);  // [pages, heads, blocks, words, 16]
  const at::Tensor tokens =
      keys ? elements.view({pages.size(0), s.n_kv_heads, 8, -1, 16, 16}).permute({0, 1, 2, 4, 3, 5}).reshape({pages.size(0), s.n_kv_heads, kPageTokens, -1})
           : elements.permute({0, 1, 2, 4, 3}).reshape({pages.size(0), s.n_kv_heads, kPageTokens, -1});
  const int64_t scale_at = l.key_codes_bytes() + l.value_codes_bytes() + (keys ? 0 : 2 * kPageTokens);
  const at::Tensor scale = heads.slice(2, scale_at, scale_at + 2 * kPageTokens).contiguous().view(at::kHalf).to(at::kFloat);
  return (tokens.to(at::kFloat) * scale.unsqueeze(3)).transpose(0, 1).reshape({s.n_kv_heads, -1, s.head_dim});
}

kv::KvModel rotate_model(const Shape& s) {
  kv::KvModel model;
  model.n_layers = 1;
  model.n_heads = static_cast<int>(s.n_heads);
  model.n_kv_heads = static_cast<int>(s.n_kv_heads);
  model.head_dim = static_cast<int>(s.head_dim);
  ops::RopeSpec rope;
  rope.head_dim = model.head_dim;
  model.rope = ops::Rope(rope);
  return model;
}

/// Pages of any codes with scales and zero points as a cache of normal numbers has them.
at::Tensor rotate_pool(const kv::rotate::RotatePageLayout& l, int64_t n_pages) {
  at::Tensor pool = at::randint(0, 256, {n_pages, l.page_bytes()}, on_gpu(at::kByte));
  const std::pair<int64_t, int64_t> sides[] = {{l.key_scale_offset(), l.key_zero_offset()}, {l.value_scale_offset(), l.value_zero_offset()}};
  for (const auto& [scale_at, zero_at] : sides) {
    const at::Tensor scales = (at::rand({n_pages, l.scale_bytes() / 2}, on_gpu(at::kFloat)) * 0.2 + 0.9) * 0.9;
    pool.slice(1, scale_at, scale_at + l.scale_bytes()).copy_(scales.to(at::kHalf).view(at::kByte));
    pool.slice(1, zero_at, zero_at + l.zeros_bytes()).copy_(at::randint(1, 3, {n_pages, l.zeros_bytes()}, on_gpu(at::kByte)));
  }
  return pool;
}

/// A shift of eight RoPE pairs of every kv head, as keys with biases have it; owns what PagedShift points to.
class Shift {
 public:
  explicit Shift(const Shape& s) {
    constexpr int kPairs = 8;
    const int64_t half = s.head_dim / 2;
    const at::Tensor frequency = at::pow(5e5, at::arange(half, on_gpu(at::kDouble)) * (-1.0 / static_cast<double>(half)));
    const auto turns = [&](const at::Tensor& position) {  // [half, positions, 2]
      const at::Tensor angle = frequency.unsqueeze(1) * position.to(at::kDouble);
      return at::stack({angle.cos(), angle.sin()}, 2).to(at::kFloat);
    };
    page_table_ = turns(at::arange(s.kv_len / kPageTokens, on_gpu(at::kLong)) * kPageTokens).transpose(0, 1).contiguous();
    // Of the slow pairs, where the constants of models lie.
    const at::Tensor pairs = half - 1 - at::arange(kPairs, on_gpu(at::kLong)) * 3;
    pairs_ = pairs.to(at::kShort).repeat({s.n_kv_heads, 1});
    n_pairs_ = at::full({s.n_kv_heads}, kPairs, on_gpu(at::kInt));
    mu_ = at::zeros({s.n_kv_heads, 2, half}, on_gpu(at::kFloat));
    mu_.index_copy_(2, pairs, at::randn({s.n_kv_heads, 2, kPairs}, on_gpu(at::kFloat)));
    turns_ = kv::house::shift_operands(turns(at::arange(kPageTokens, on_gpu(at::kLong))).index_select(0, pairs.repeat({s.n_kv_heads})), 1);
    pages_ = static_cast<int>(s.kv_len / kPageTokens);
    operands_ = at::empty({s.batch * s.n_kv_heads * pages_ * (s.rep() <= 4 ? 1 : 2), 32, 2}, on_gpu(at::kInt));
    norm_ = at::empty({s.batch, s.n_heads}, on_gpu(at::kFloat));
    turn_ = turns(at::arange(s.kv_len, on_gpu(at::kLong)));
  }

  /// What was taken off the keys [n_kv_heads, T, head_dim].
  at::Tensor of_keys() const {
    const at::Tensor cos = turn_.select(2, 0).t(), sin = turn_.select(2, 1).t();
    const at::Tensor x = mu_.select(1, 0).unsqueeze(1), y = mu_.select(1, 1).unsqueeze(1);
    return at::cat({x * cos - y * sin, y * cos + x * sin}, 2);
  }
  kv::house::ShiftQueries of_queries(const PagedDecode& p) const {
    kv::house::ShiftQueries queries;
    queries.batch = p.batch;
    queries.n_kv_heads = p.n_kv_heads;
    queries.n_q = p.n_q;
    queries.head_dim = p.head_dim;
    queries.q = p.q_exact;
    queries.n_steps = 1;
    queries.shift = mu_.const_data_ptr<float>();
    queries.pairs = reinterpret_cast<const uint16_t*>(pairs_.const_data_ptr<int16_t>());
    queries.n_pairs = n_pairs_.const_data_ptr<int32_t>();
    queries.page_table = static_cast<const float2*>(page_table_.const_data_ptr());
    queries.stored_len = p.stored_len;
    queries.pages = pages_;
    queries.queries = reinterpret_cast<uint2*>(operands_.mutable_data_ptr<int32_t>());
    queries.norm = norm_.mutable_data_ptr<float>();
    return queries;
  }
  kernels::PagedShift params(const PagedDecode& p) const {
    const auto queries = of_queries(p);
    return {queries.n_steps, static_cast<const uint4*>(turns_.const_data_ptr()), queries.queries, queries.pages, queries.norm};
  }

 private:
  at::Tensor turns_, page_table_, pairs_, n_pairs_, mu_, operands_, norm_, turn_;
  int pages_ = 0;
};

double relative_error(const at::Tensor& out, const at::Tensor& expected) { return ((out - expected).norm() / expected.norm()).item<double>(); }

// ---- LibTorch --------------------------------------------------------------------------------------------------------

struct Backend {
  const char* name;
  bool flash, cudnn, efficient;
};

void choose(const Backend& backend) {
  at::globalContext().setSDPUseFlash(backend.flash);
  at::globalContext().setSDPUseCuDNN(backend.cudnn);
  at::globalContext().setSDPUseMemEfficient(backend.efficient);
  at::globalContext().setSDPUseMath(false);
}

// ---- the run ---------------------------------------------------------------------------------------------------------

class Bench {
 public:
  /// @param rows parts of the names of the rows that are wanted; none: all
  Bench(int repetitions, std::vector<std::string> rows) : timer_(repetitions), rows_(std::move(rows)) {
    const auto* properties = at::cuda::getCurrentDeviceProperties();
    report_["device"] = properties->name;
    report_["repetitions"] = repetitions;
    const at::Tensor data = at::empty({int64_t{2} << 30}, on_gpu(at::kByte)).random_();
    at::Tensor scratch = at::zeros({1}, on_gpu(at::kInt));
    const Time time = timer_([&] {
      check(read_bytes(data.const_data_ptr(), data.numel(), reinterpret_cast<uint32_t*>(scratch.mutable_data_ptr<int32_t>()),
                       properties->multiProcessorCount, at::cuda::getCurrentCUDAStream()),
            "read");
    });
    read_gb_s_ = static_cast<double>(data.numel()) / time.median_ms * 1e-6;
    report_["plain_read_gb_s"] = read_gb_s_;
    std::printf("%s, plain read %.0f GB/s\n", properties->name, read_gb_s_);
  }

  void run(const Shape& shape) {
    std::printf("\n%s\n%-34s %9s %17s %8s %6s %9s\n", shape.name.c_str(), "", "ms", "(10 to 90 %)", "GB/s", "share", "error");
    const Inputs in(shape);
    torch_rows(in);
    row_plain(in, "bf16", at::kBFloat16, kernels::ElementType::kBf16);
    row_plain(in, "fp16", at::kHalf, kernels::ElementType::kFp16);
    row_fp8(in);
    row_house(in, 2, false);
    row_house(in, 2, true);
    for (const int bits : {3, 4}) row_house(in, bits, false);
    if (wanted("ours rotate2")) row_rotate(in);
  }

  const nlohmann::json& report() const { return report_; }

 private:
  bool wanted(const std::string& name) const {
    const auto contains = [&](const std::string& row) { return name.find(row) != std::string::npos; };
    return rows_.empty() || std::any_of(rows_.begin(), rows_.end(), contains);
  }

  void add(const Inputs& in, const std::string& name, int64_t bytes, double error, const std::function<void()>& launch) {
    const Time time = timer_(launch);
    const double gb_s = static_cast<double>(bytes) / time.median_ms * 1e-6;
    std::printf("%-34s %9.4f (%7.4f %7.4f) %8.0f %5.0f%% %9.1e\n", name.c_str(), time.median_ms, time.low_ms, time.high_ms, gb_s,
                100 * gb_s / read_gb_s_, error);
    report_["rows"].push_back({{"shape", in.shape.name}, {"kernel", name}, {"median_ms", time.median_ms}, {"low_ms", time.low_ms},
                               {"high_ms", time.high_ms}, {"gb_s", gb_s}, {"share_of_plain_read", gb_s / read_gb_s_},
                               {"relative_error", error}});
  }

  void torch_rows(const Inputs& in) {
    const Shape& s = in.shape;
    const at::Tensor q = in.q.to(at::kBFloat16);
    const at::Tensor packed_q = q.view({s.batch, s.n_kv_heads, s.rep(), s.head_dim});
    const at::Tensor k_token_major = in.k.transpose(1, 2).contiguous().transpose(1, 2);
    const at::Tensor v_token_major = in.v.transpose(1, 2).contiguous().transpose(1, 2);
    const at::Tensor expected =
        exact_attention(q[0].squeeze(1).to(at::kFloat) / std::sqrt(static_cast<double>(s.head_dim)), in.k[0].to(at::kFloat), in.v[0].to(at::kFloat));
    const int64_t bytes = 2 * in.k.numel() * 2;
    for (const Backend& backend : {Backend{"flash", true, false, false}, {"cudnn", false, true, false}, {"efficient", false, false, true}}) {
      choose(backend);
      for (const bool packed : {true, false}) {
        if (packed && s.rep() == 1) continue;
        for (const bool token_major : {false, true}) {
          const at::Tensor& k = token_major ? k_token_major : in.k;
          const at::Tensor& v = token_major ? v_token_major : in.v;
          const std::string name = std::string("sdpa ") + backend.name + (packed ? " heads as queries" : " gqa") + (token_major ? ", token-major" : "");
          if (!wanted(name)) continue;
          at::Tensor out;
          const auto launch = [&] {
            out = at::scaled_dot_product_attention(packed ? packed_q : q, k, v, {}, 0.0, false, std::nullopt, !packed && s.rep() > 1);
          };
          try {
            launch();
          } catch (const c10::Error& error) {
            std::printf("%-34s refused\n", name.c_str());
            report_["rows"].push_back({{"shape", s.name}, {"kernel", name}, {"refused", error.what_without_backtrace()}});
            continue;
          }
          add(in, name, bytes, relative_error(out[0].reshape({s.n_heads, s.head_dim}).to(at::kFloat), expected), launch);
        }
      }
    }
  }

  void row_plain(const Inputs& in, const std::string& format, at::ScalarType of_torch, kernels::ElementType type) {
    const std::string name = "ours " + format;
    if (!wanted(name)) return;
    Paged paged(in, plain_pool(in, of_torch), kernels::kPlainUnitTokens, 0);
    PagedDecodeGrid grid;
    check(kernels::plain_decode_grid(paged.params(), type, &grid), "plain_decode_grid");
    paged.allocate_workspace(grid);
    const auto launch = [&] {
      check(kernels::plain_decode_cuda(paged.params(), type, grid, at::cuda::getCurrentCUDAStream()), "plain_decode");
    };
    launch();
    const auto as_stored = [&](const at::Tensor& x) { return x[0].to(of_torch).to(at::kFloat); };
    const double error = relative_error(paged.first_out(), exact_attention(paged.first_q(), as_stored(in.k), as_stored(in.v)));
    ROTUNDA_CHECK(error < 1e-4, format, ": relative error ", error, ", expected less than 1e-4");
    add(in, name, paged.bytes(), error, launch);
  }

  void row_fp8(const Inputs& in) {
    if (!wanted("ours fp8")) return;
    const Fp8Side k(in.k), v(in.v);
    Paged paged(in, fp8_pool(in.shape, k, v), kv::grouped::kFp8UnitTokens, 0);
    PagedDecodeGrid grid;
    check(kv::grouped::fp8_decode_grid(paged.params(), &grid), "fp8_decode_grid");
    paged.allocate_workspace(grid);
    const auto launch = [&] { check(kv::grouped::fp8_decode_cuda(paged.params(), grid, at::cuda::getCurrentCUDAStream()), "fp8_decode"); };
    launch();
    const double error = relative_error(paged.first_out(), exact_attention(paged.first_q(), k.first(), v.first()));
    ROTUNDA_CHECK(error < 1e-4, "fp8: relative error ", error, ", expected less than 1e-4");
    add(in, "ours fp8", paged.bytes(), error, launch);
  }

  void row_house(const Inputs& in, int bits, bool shifted) {
    const std::string name = "ours rotunda" + std::to_string(bits) + (shifted ? " + shift" : "");
    if (!wanted(name)) return;
    Paged paged(in, house_pool(in.shape, bits), kv::house::kHouseUnitTokens, kExactBlocks);
    PagedDecodeGrid grid;
    check(kv::house::house_decode_grid(paged.params(), bits, bits, &grid), "house_decode_grid");
    paged.allocate_workspace(grid);
    const Shift shift(in.shape);
    if (shifted) paged.params().shift = shift.params(paged.params());
    const auto launch = [&] {
      if (shifted) check(kv::house::shift_query_cuda(shift.of_queries(paged.params()), at::cuda::getCurrentCUDAStream()), "shift_query");
      check(kv::house::house_decode_cuda(paged.params(), bits, bits, grid, at::cuda::getCurrentCUDAStream()), "house_decode");
    };
    launch();
    double error = std::nan("");  // 3 and 4 bits: by the unit tests alone
    if (bits == 2) {
      const auto [exact_k, exact_v] = paged.first_exact();
      const at::Tensor pages = paged.first_pages();
      at::Tensor keys = house_decoded(pages, in.shape, true);
      if (shifted) keys += shift.of_keys();
      error = relative_error(paged.first_out(), exact_attention(paged.first_q(), at::cat({keys, exact_k}, 1),
                                                                at::cat({house_decoded(pages, in.shape, false), exact_v}, 1)));
      ROTUNDA_CHECK(error < 2e-3, "rotunda2: relative error ", error, ", expected less than 2e-3");
    }
    add(in, name, paged.bytes(), error, launch);
  }

  /// With what is around its kernel: queries padded where there are fewer than it takes.
  void row_rotate(const Inputs& in) {
    const Shape& s = in.shape;
    const kv::KvModel model = rotate_model(s);
    const kv::rotate::RotatePageLayout layout = kv::rotate::rotate_layout({}, model);
    std::vector<uint16_t> key_group;  // channels of a group lie anywhere, as a calibrated order leaves them
    const at::Tensor order = at::randperm(model.kv_channels(), at::kLong);
    for (int64_t i = 0; i < order.numel(); ++i)
      key_group.push_back(static_cast<uint16_t>(order.const_data_ptr<int64_t>()[i] / layout.group_size));
    const auto codec = kv::rotate::make_rotate_codec_cuda(model, {}, {key_group});
    if (!codec->has_decode()) {
      std::printf("%-34s no kernel\n", "ours rotate2");
      return;
    }
    Paged paged(in, rotate_pool(layout, s.batch * s.kv_len / kPageTokens), codec->unit_tokens(), kExactBlocks);
    const PagedDecodeGrid grid = codec->decode_grid(paged.params());
    const auto launch = [&] { codec->decode(0, paged.params(), grid); };
    launch();
    const auto [exact_k, exact_v] = paged.first_exact();
    const auto [cos, sin] = model.rope.cos_sin(at::arange(s.kv_len, at::kLong), s.kv_len);
    const kv::PagesCuda pages{const_cast<std::byte*>(paged.params().pool), paged.params().page_bytes};
    const auto [k, v] = codec->load(0, pages, paged.first_table(), cos.to(at::kCUDA), sin.to(at::kCUDA), at::arange(s.kv_len, on_gpu(at::kLong)), at::kFloat);
    const double error =
        relative_error(paged.first_out(), exact_attention(paged.first_q(), at::cat({k, exact_k}, 1), at::cat({v, exact_v}, 1)));
    ROTUNDA_CHECK(error < 2e-3, "rotate2: relative error ", error, ", expected less than 2e-3");
    add(in, "ours rotate2", paged.bytes(), error, launch);
  }

  Timer timer_;
  std::vector<std::string> rows_;
  double read_gb_s_ = 0;
  nlohmann::json report_;
};

int run(int argc, char** argv) {
  CLI::App app("Decode attention on a GPU against LibTorch's");
  int repetitions = 50;
  std::string json;
  std::vector<std::string> names, rows;
  app.add_option("--repetitions", repetitions)->check(CLI::Range(10, 10000));
  app.add_option("--json", json, "file for the results");
  app.add_option("--shape", names, "only these");
  app.add_option("--row", rows, "only rows whose names contain one of these");
  CLI11_PARSE(app, argc, argv);
  for (const std::string& name : names)
    ROTUNDA_CHECK(std::any_of(shapes().begin(), shapes().end(), [&](const Shape& s) { return s.name == name; }), "--shape ", name, " is unknown");
  const c10::NoGradGuard no_grad;
  Bench bench(repetitions, rows);
  for (const Shape& shape : shapes())
    if (names.empty() || std::find(names.begin(), names.end(), shape.name) != names.end()) bench.run(shape);
  if (!json.empty()) std::ofstream(json) << bench.report().dump(2) << "\n";
  return 0;
}

}  // namespace
}  // namespace rotunda::bench

int main(int argc, char** argv) {
  try {
    return rotunda::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_cuda: %s\n", error.what());
    return 1;
  }
}
