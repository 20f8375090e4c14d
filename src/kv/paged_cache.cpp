#include "kv/paged_cache.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <unordered_map>

#include "base/check.h"

namespace rotunda::kv {

namespace {

constexpr int64_t kSavedVersion = 1;

// Bytes of one layer's part of a page.
int64_t padded_page_bytes(int64_t page_bytes) { return PagePool(page_bytes).page_bytes(); }

int64_t pages_of(int64_t n_tokens) { return (n_tokens + kPageTokens - 1) / kPageTokens; }

}  // namespace

PagedCache::PagedCache(KvSpec spec, KvModel model, int64_t page_bytes, int64_t codes_bytes_per_token, int64_t scale_bytes_per_token,
                       std::unique_ptr<PageMemory> memory)
    : spec_(std::move(spec)),
      model_(std::move(model)),
      layer_page_bytes_(padded_page_bytes(page_bytes)),
      pool_(model_.n_layers * layer_page_bytes_, std::move(memory)),
      codes_bytes_per_token_(codes_bytes_per_token),
      scale_bytes_per_token_(scale_bytes_per_token) {}

PagedCache::~PagedCache() = default;

void PagedCache::check_no_step(const char* what) const { ROTUNDA_ASSERT(!step_, what, " while a step is open"); }

const PagedCache::Sequence& PagedCache::sequence(SeqId seq) const {
  const auto it = sequences_.find(seq);
  ROTUNDA_CHECK(it != sequences_.end(), "kv cache: sequence ", seq, " does not exist");
  return it->second;
}

PagedCache::Sequence& PagedCache::own(SeqId seq) { return const_cast<Sequence&>(sequence(seq)); }

SeqId PagedCache::create() {
  check_no_step("create");
  Sequence sequence;
  sequence.extra = make_extra();
  sequences_.emplace(next_seq_, std::move(sequence));
  return next_seq_++;
}

SeqId PagedCache::fork(SeqId seq) {
  check_no_step("fork");
  const Sequence& from = sequence(seq);
  Sequence copy;
  copy.kv_len = from.kv_len;
  copy.stored_len = from.stored_len;
  copy.pages = from.pages;
  if (from.extra) copy.extra = from.extra->clone();
  for (Page* page : copy.pages) pool_.ref(page);
  sequences_.emplace(next_seq_, std::move(copy));
  return next_seq_++;
}

void PagedCache::drop_pages(Sequence& sequence, int64_t keep_tokens) {
  const size_t keep = static_cast<size_t>(pages_of(keep_tokens));
  while (sequence.pages.size() > keep) {
    pool_.unref(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

void PagedCache::truncate(SeqId seq, int64_t kv_len) {
  check_no_step("truncate");
  Sequence& target = own(seq);
  ROTUNDA_CHECK(kv_len >= 0 && kv_len <= target.kv_len, "kv cache: truncate sequence ", seq, " to ", kv_len, " tokens, it has ",
                target.kv_len);
  target.stored_len = on_truncate(seq, target, kv_len);
  if (target.extra) target.extra->truncate(kv_len);
  target.kv_len = kv_len;
  drop_pages(target, target.stored_len);
}

void PagedCache::release(SeqId seq) {
  check_no_step("release");
  drop_pages(own(seq), 0);
  sequences_.erase(seq);
}

int64_t PagedCache::kv_len(SeqId seq) const { return sequence(seq).kv_len; }

// New pages: those beyond the table, and a copy of each page written to where another sequence shares it.
int64_t PagedCache::new_pages_wanted(const Chunk& chunk, int64_t tokens_in_pages) const {
  const std::vector<Page*>& table = chunk.sequence->pages;
  const int64_t have = static_cast<int64_t>(table.size());
  int64_t wanted = std::max<int64_t>(0, pages_of(tokens_in_pages) - have);
  for (int64_t page = chunk.sequence->stored_len / kPageTokens; page < std::min(have, pages_of(tokens_in_pages)); ++page)
    wanted += table[static_cast<size_t>(page)]->refs > 1;
  return wanted;
}

void PagedCache::begin_step(const std::vector<SeqChunk>& chunks, StepKind kind) {
  if (step_) abort_step();
  ROTUNDA_CHECK(!chunks.empty(), "kv cache: a step without sequences");
  auto step = std::make_unique<Step>();
  step->kind = kind;
  int64_t wanted_pages = 0;
  for (const SeqChunk& chunk : chunks) {
    Sequence& target = own(chunk.seq);
    ROTUNDA_CHECK(chunk.n_tokens > 0, "kv cache: sequence ", chunk.seq, " has a chunk of ", chunk.n_tokens, " tokens, expected at least 1");
    for (const Chunk& other : step->chunks)
      ROTUNDA_CHECK(other.seq != chunk.seq, "kv cache: sequence ", chunk.seq, " stands twice in a step");
    ROTUNDA_CHECK(kind == StepKind::kGenerate || target.kv_len == 0, "kv cache: a quantize-all step needs an empty sequence, sequence ",
                  chunk.seq, " has ", target.kv_len, " tokens");
    Chunk made;
    made.sequence = &target;
    made.seq = chunk.seq;
    made.row = step->n_tokens;
    made.n_tokens = chunk.n_tokens;
    made.first = target.kv_len;
    made.kv_len = target.kv_len + chunk.n_tokens;
    made.stored_len = stored_len_after(target, made.kv_len);
    made.rope_len = std::max(chunk.rope_len, made.kv_len);
    made.is_prompt = chunk.is_prompt;
    made.pages_before = target.pages.size();
    wanted_pages += new_pages_wanted(made, kind == StepKind::kQuantizeAll ? made.kv_len : made.stored_len);
    step->n_tokens += chunk.n_tokens;
    step->chunks.push_back(std::move(made));
  }
  pool_.reserve(wanted_pages);

  for (Chunk& chunk : step->chunks) {
    const int64_t tokens_in_pages = kind == StepKind::kQuantizeAll ? chunk.kv_len : chunk.stored_len;
    std::vector<Page*>& table = chunk.sequence->pages;
    for (size_t i = static_cast<size_t>(chunk.sequence->stored_len / kPageTokens); i < table.size(); ++i) {
      if (table[i]->refs == 1) continue;
      Page* copy = pool_.take();
      pool_.memory().copy(copy->bytes, table[i]->bytes, pool_.page_bytes());
      pool_.unref(table[i]);
      table[i] = copy;
    }
    while (static_cast<int64_t>(table.size()) < pages_of(tokens_in_pages)) table.push_back(pool_.take());
  }

  std::vector<int64_t> positions, rope_lens;
  for (const Chunk& chunk : step->chunks) {
    for (int64_t position = chunk.first; position < chunk.kv_len; ++position) {
      positions.push_back(position);
      rope_lens.push_back(chunk.rope_len);
    }
  }
  std::tie(step->cos, step->sin) = angles_at(positions, rope_lens);
  step_ = std::move(step);
  try {
    on_begin_step(*step_);
  } catch (...) {
    abort_step();
    throw;
  }
}

std::pair<at::Tensor, at::Tensor> PagedCache::angles_at(const std::vector<int64_t>& positions, const std::vector<int64_t>& rope_lens) const {
  std::vector<at::Tensor> cos, sin;
  const size_t n = positions.size();
  for (size_t begin = 0; begin < n;) {
    size_t end = n;
    if (model_.rope.depends_on_length()) {
      for (end = begin + 1; end < n && rope_lens[end] == rope_lens[begin];) ++end;
    }
    const at::Tensor part = at::empty({static_cast<int64_t>(end - begin)}, at::kLong);
    std::copy(positions.begin() + static_cast<int64_t>(begin), positions.begin() + static_cast<int64_t>(end), part.mutable_data_ptr<int64_t>());
    const auto [c, s] = model_.rope.cos_sin(part, rope_lens[begin]);
    cos.push_back(c), sin.push_back(s);
    begin = end;
  }
  return cos.size() == 1 ? std::pair{cos[0], sin[0]} : std::pair{at::cat(cos), at::cat(sin)};
}

void PagedCache::check_input(int layer, const AttendInput& in) const {
  ROTUNDA_ASSERT(step_, "a layer without begin_step");
  ROTUNDA_ASSERT(layer >= 0 && layer < model_.n_layers);
  const auto check = [&](const at::Tensor& x, const char* name, int64_t heads) {
    ROTUNDA_CHECK(x.dim() == 3 && x.size(0) == step_->n_tokens && x.size(1) == heads && x.size(2) == model_.head_dim &&
                      x.scalar_type() == model_.dtype,
                  "kv cache: ", name, " of layer ", model_.layer_id(layer), " is ", x.sizes(), " ", x.scalar_type(), ", expected [", step_->n_tokens, ", ",
                  heads, ", ", model_.head_dim, "] ", model_.dtype);
  };
  check(in.q, "q", model_.n_heads);
  check(in.k, "k", model_.n_kv_heads);
  check(in.v, "v", model_.n_kv_heads);
  if (wants_hidden()) {
    ROTUNDA_CHECK(in.hidden.defined() && in.hidden.dim() == 2 && in.hidden.size(0) == step_->n_tokens,
                  "kv cache: layer ", model_.layer_id(layer), " came without the layer's input that ", spec_.format, " chooses sinks by");
  }
}

at::Tensor PagedCache::attend(int layer, const AttendInput& in) {
  check_input(layer, in);
  return attend_layer(layer, *step_, in);
}

at::Tensor PagedCache::keys_to_code(int layer, const AttendInput& in) const {
  check_input(layer, in);
  return layer_keys_to_code(layer, *step_, in);
}

at::Tensor PagedCache::layer_keys_to_code(int, const Step& step, const AttendInput& in) const {
  return ops::apply_rope(in.k.to(at::kFloat), step.cos, step.sin).view({step.n_tokens, model_.kv_channels()});
}

void PagedCache::end_step() {
  ROTUNDA_ASSERT(step_, "end_step without begin_step");
  on_end_step(*step_);
  for (const Chunk& chunk : step_->chunks) {
    chunk.sequence->kv_len = chunk.kv_len;
    chunk.sequence->stored_len = chunk.stored_len;
    drop_pages(*chunk.sequence, chunk.stored_len);  // a quantize-all step had pages for the exact tokens too
  }
  step_.reset();
}

void PagedCache::abort_step() {
  if (!step_) return;
  on_abort_step(*step_);
  for (const Chunk& chunk : step_->chunks) {
    std::vector<Page*>& table = chunk.sequence->pages;
    while (table.size() > chunk.pages_before) {
      pool_.unref(table.back());
      table.pop_back();
    }
  }
  step_.reset();
}

KvUsage PagedCache::usage() const {
  KvUsage usage;
  std::unordered_map<const Page*, int64_t> filled;  // a page that several sequences share counts once, as full as the fullest sees it
  for (const auto& [seq, sequence] : sequences_) {
    usage.elements += 2 * sequence.kv_len * model_.kv_channels() * model_.n_layers;
    for (size_t i = 0; i < sequence.pages.size(); ++i) {
      const int64_t tokens = std::clamp<int64_t>(sequence.stored_len - static_cast<int64_t>(i) * kPageTokens, 0, kPageTokens);
      int64_t& most = filled[sequence.pages[i]];
      most = std::max(most, tokens);
    }
    if (sequence.extra) sequence.extra->add_usage(usage);
  }
  for (const auto& [page, tokens] : filled) {
    usage.codes_bytes += tokens * codes_bytes_per_token_ * model_.n_layers;
    usage.scale_bytes += tokens * scale_bytes_per_token_ * model_.n_layers;
    usage.slack_bytes += pool_.page_bytes() - tokens * (codes_bytes_per_token_ + scale_bytes_per_token_) * model_.n_layers;
  }
  usage.pool_free_bytes = pool_.free_pages() * pool_.page_bytes();
  return usage;
}

std::map<std::string, std::string> PagedCache::saved_header() const {
  auto header = saved_settings();
  header["rotunda.format"] = spec_.format;
  header["rotunda.version"] = std::to_string(kSavedVersion);
  header["rotunda.n_layers"] = std::to_string(model_.n_layers);
  header["rotunda.n_kv_heads"] = std::to_string(model_.n_kv_heads);
  header["rotunda.head_dim"] = std::to_string(model_.head_dim);
  header["rotunda.page_bytes"] = std::to_string(layer_page_bytes_);
  return header;
}

ops::TensorBundle PagedCache::export_sequence(SeqId seq) const {
  check_no_step("export_sequence");
  const Sequence& from = sequence(seq);
  ops::TensorBundle bundle;
  auto& meta = bundle.metadata;
  meta = saved_header();
  meta["rotunda.kv_len"] = std::to_string(from.kv_len);
  meta["rotunda.stored_len"] = std::to_string(from.stored_len);
  const int64_t n_pages = pages_of(from.stored_len);
  at::Tensor pages = at::empty({model_.n_layers, n_pages, layer_page_bytes_}, at::kByte);
  std::vector<uint8_t> whole(static_cast<size_t>(pool_.page_bytes()));
  for (int64_t i = 0; i < n_pages; ++i) {
    pool_.memory().read(whole.data(), from.pages[static_cast<size_t>(i)]->bytes, pool_.page_bytes());
    for (int64_t layer = 0; layer < model_.n_layers; ++layer)
      std::memcpy(pages.data_ptr<uint8_t>() + (layer * n_pages + i) * layer_page_bytes_, whole.data() + layer * layer_page_bytes_,
                  static_cast<size_t>(layer_page_bytes_));
  }
  bundle.tensors["pages"] = pages;
  if (from.extra) from.extra->export_to(bundle);
  return bundle;
}

SeqId PagedCache::import_sequence(const ops::TensorBundle& bundle) {
  check_no_step("import_sequence");
  for (const auto& [key, value] : saved_header())
    ROTUNDA_CHECK(bundle.meta(key) == value, bundle.origin, ": ", key, " is ", bundle.meta(key), ", this cache has ", value);

  Sequence made;
  made.kv_len = bundle.meta_int("rotunda.kv_len");
  made.stored_len = bundle.meta_int("rotunda.stored_len");
  // 2^40 tokens: far beyond any cache, and small enough that no product below overflows.
  ROTUNDA_CHECK(made.kv_len >= 0 && made.kv_len < (int64_t{1} << 40) && made.stored_len >= stored_len_after(Sequence{}, made.kv_len) &&
                    made.stored_len <= made.kv_len,
                bundle.origin, ": rotunda.kv_len ", made.kv_len, " and rotunda.stored_len ", made.stored_len, " cannot be");
  const int64_t n_pages = pages_of(made.stored_len);
  const at::Tensor pages = bundle.get("pages", at::kByte, {model_.n_layers, n_pages, layer_page_bytes_}).contiguous();
  made.extra = make_extra();
  if (made.extra) {
    made.extra->import_from(bundle, made.kv_len);
  } else {
    ROTUNDA_CHECK(made.stored_len == made.kv_len, bundle.origin, ": rotunda.stored_len is ", made.stored_len, ", expected ", made.kv_len);
  }
  pool_.reserve(n_pages);
  std::vector<uint8_t> whole(static_cast<size_t>(pool_.page_bytes()));
  for (int64_t i = 0; i < n_pages; ++i) {
    for (int64_t layer = 0; layer < model_.n_layers; ++layer)
      std::memcpy(whole.data() + layer * layer_page_bytes_, pages.const_data_ptr<uint8_t>() + (layer * n_pages + i) * layer_page_bytes_,
                  static_cast<size_t>(layer_page_bytes_));
    Page* page = pool_.take();
    pool_.memory().write(page->bytes, whole.data(), pool_.page_bytes());
    made.pages.push_back(page);
  }
  sequences_.emplace(next_seq_, std::move(made));
  return next_seq_++;
}

std::vector<uint16_t> block_masks(int64_t n_blocks, int64_t first, int64_t end) {
  std::vector<uint16_t> masks(static_cast<size_t>(n_blocks));
  for (int64_t block = 0; block < n_blocks; ++block) {
    const int64_t low = std::clamp<int64_t>(first - block * kernels::kTokenBlock, 0, kernels::kTokenBlock);
    const int64_t high = std::clamp<int64_t>(end - block * kernels::kTokenBlock, 0, kernels::kTokenBlock);
    if (low < high) masks[block] = static_cast<uint16_t>(((1u << high) - 1u) & ~((1u << low) - 1u));
  }
  return masks;
}

void SplitDecode::run(const std::vector<Item>& items) const {
  struct Part {
    const Item* item;
    int group;
    int64_t page_begin, page_end;
    bool with_extra;
  };
  int64_t total_pages = 0;
  for (const Item& item : items) total_pages += item.n_pages * n_groups;
  // Threads pay from about 10 microseconds of work on; 2^15 elements take about that.
  const bool parallel = total_pages * page_cost > (int64_t{1} << 15) && at::get_num_threads() > 1;
  // Several parts per thread level out uneven ones; below 4 pages the merge costs more than it brings.
  const int64_t pages_per_part = parallel ? std::max<int64_t>(4, total_pages / (4 * at::get_num_threads())) : total_pages + 1;
  std::vector<Part> parts;
  for (const Item& item : items) {
    for (int group = 0; group < n_groups; ++group) {
      const int64_t n_parts = std::max<int64_t>(1, (item.n_pages + pages_per_part - 1) / pages_per_part);
      for (int64_t part = 0; part < n_parts; ++part)
        parts.push_back({&item, group, item.n_pages * part / n_parts, item.n_pages * (part + 1) / n_parts, part == n_parts - 1});
    }
  }

  const int64_t state_floats = int64_t{heads_per_group} * (head_dim + 2);
  std::vector<float> states(parts.size() * static_cast<size_t>(state_floats), 0.0F);
  const auto state_of = [&](size_t index) {
    float* base = states.data() + index * static_cast<size_t>(state_floats);
    return kernels::SoftmaxState{base, base + heads_per_group, base + 2 * heads_per_group};
  };
  const auto run_part = [&](size_t index) {
    const Part& part = parts[index];
    const kernels::SoftmaxState state = state_of(index);
    std::fill_n(state.max, heads_per_group, -std::numeric_limits<float>::infinity());
    if (part.page_begin < part.page_end) part.item->pages(part.group, part.page_begin, part.page_end, state);
    if (part.with_extra && part.item->extra) part.item->extra(part.group, state);
  };
  if (parallel) {
    at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run_part(static_cast<size_t>(i));
    });
  } else {
    for (size_t i = 0; i < parts.size(); ++i) run_part(i);
  }

  // Parts of one (item, group) are neighbours.
  for (size_t first = 0; first < parts.size();) {
    size_t next = first + 1;
    while (next < parts.size() && parts[next].item == parts[first].item && parts[next].group == parts[first].group) {
      kernels::merge_softmax(state_of(first), state_of(next), heads_per_group, head_dim);
      ++next;
    }
    float* out = parts[first].item->out + int64_t{parts[first].group} * heads_per_group * head_dim;
    kernels::finish_softmax(state_of(first), heads_per_group, head_dim, out);
    first = next;
  }
}

}  // namespace rotunda::kv
