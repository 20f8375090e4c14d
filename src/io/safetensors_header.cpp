#include "io/safetensors_header.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/check.h"
#include "io/message.h"

namespace rotunda::io {

namespace {

using Entry = SafetensorsFile::Entry;

struct DtypeName {
  std::string_view name;
  at::ScalarType dtype;
};

constexpr std::array<DtypeName, 10> kDtypes{{{"F64", at::kDouble},
                                             {"F32", at::kFloat},
                                             {"F16", at::kHalf},
                                             {"BF16", at::kBFloat16},
                                             {"I64", at::kLong},
                                             {"I32", at::kInt},
                                             {"I16", at::kShort},
                                             {"I8", at::kChar},
                                             {"U8", at::kByte},
                                             {"BOOL", at::kBool}}};

constexpr size_t kMaxDims = 64;  // what LibTorch's operators take

// Far beyond any file, and small enough that sums of a few of them fit int64.
constexpr uint64_t kMaxNumber = uint64_t{1} << 60;

// Bytes of a tensor; nullopt where the product does not fit. Zero sizes count as one in the overflow check, because
// LibTorch computes strides that way even for empty tensors.
std::optional<int64_t> size_bytes(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  int64_t bound = static_cast<int64_t>(c10::elementSize(dtype));
  bool empty = false;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bound, std::max<int64_t>(size, 1), &bound)) return std::nullopt;
    empty = empty || size == 0;
  }
  return empty ? 0 : bound;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  text += ']';
  return text;
}

// Reads the header as it is parsed, without a document in between: a document would keep only the last of two equal
// keys, and grows to gigabytes for a header made of brackets.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderReader(const std::string& origin, SafetensorsHeader& header) : origin_(origin), header_(header) {}

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override { return unexpected(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return unexpected(text); }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::kShape && place_ != Place::kOffsets) return unexpected(std::to_string(value));
    if (value > kMaxNumber) return unexpected(std::to_string(value));
    auto& list = place_ == Place::kShape ? entry_.shape : offsets_;
    const size_t limit = place_ == Place::kShape ? kMaxDims : 2;
    ROTUNDA_CHECK(list.size() < limit, where(), field_, " has more than ", limit, " numbers");
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::kMetadata) {
      ROTUNDA_CHECK(header_.metadata.emplace(key_, value).second, origin_, ": metadata ", printable(key_),
                    ": given twice");
      return true;
    }
    if (place_ != Place::kTensor || field_ != "dtype") return unexpected("a string");
    const auto it = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const DtypeName& d) { return d.name == value; });
    if (it == kDtypes.end()) {
      std::string known;
      for (const DtypeName& d : kDtypes) known.append(" ").append(d.name);
      throw_user_error(concat(where(), "dtype is ", printable(value), ", expected one of", known));
    }
    entry_.dtype = it->dtype;
    return true;
  }

  bool start_object(size_t) override {
    switch (place_) {
      case Place::kStart:
        place_ = Place::kTop;
        return true;
      case Place::kTop:
        place_ = key_ == "__metadata__" ? Place::kMetadata : Place::kTensor;
        return true;
      default:
        return unexpected("an object");
    }
  }

  bool key(string_t& name) override {
    if (place_ == Place::kTop) {
      start_tensor(name);
    } else if (place_ == Place::kMetadata) {
      key_ = name;
    } else {
      ROTUNDA_CHECK(name == "dtype" || name == "shape" || name == "data_offsets", where(), "unknown field ",
                    printable(name), ", expected dtype, shape, data_offsets");
      bool& seen = name == "dtype" ? has_dtype_ : name == "shape" ? has_shape_ : has_offsets_;
      ROTUNDA_CHECK(!seen, where(), name, " is given twice");
      seen = true;
      field_ = name;
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kTensor) finish_tensor();
    place_ = place_ == Place::kTop ? Place::kStart : Place::kTop;
    return true;
  }

  bool start_array(size_t) override {
    if (place_ != Place::kTensor || field_ == "dtype") return unexpected("a list");
    place_ = field_ == "shape" ? Place::kShape : Place::kOffsets;
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& error) override {
    throw_user_error(
        concat(origin_, ": header is not JSON at its byte ", position, ": ", json_error_detail(error.what())));
  }

 private:
  enum class Place { kStart, kTop, kMetadata, kTensor, kShape, kOffsets };

  std::string where() const { return concat(origin_, ": tensor ", printable(key_), ": "); }

  [[noreturn]] bool unexpected(const std::string& got) const {
    switch (place_) {
      case Place::kStart:
        throw_user_error(concat(origin_, ": header is ", got, ", expected an object"));
      case Place::kTop:
        if (key_ == "__metadata__")
          throw_user_error(concat(origin_, ": __metadata__ is ", got, ", expected an object"));
        throw_user_error(concat(where(), "is ", got, ", expected an object"));
      case Place::kMetadata:
        throw_user_error(concat(origin_, ": metadata ", printable(key_), ": is ", got, ", expected a string"));
      case Place::kTensor:
        throw_user_error(
            concat(where(), field_, " is ", got, ", expected ", field_ == "dtype" ? "a string" : "a list"));
      default:
        throw_user_error(concat(where(), field_, " holds ", got, ", expected whole numbers from 0 to ", kMaxNumber));
    }
  }

  void start_tensor(const std::string& name) {
    key_ = name;
    entry_ = Entry{};
    offsets_.clear();
    has_dtype_ = has_shape_ = has_offsets_ = false;
    const bool twice = name == "__metadata__" ? std::exchange(has_metadata_, true) : header_.entries.count(name) != 0;
    ROTUNDA_CHECK(!twice, origin_, ": tensor ", printable(name), ": listed twice");
  }

  void finish_tensor() {
    ROTUNDA_CHECK(has_dtype_ && has_shape_ && has_offsets_, where(),
                  !has_dtype_   ? "dtype"
                  : !has_shape_ ? "shape"
                                : "data_offsets",
                  " is missing");
    ROTUNDA_CHECK(offsets_.size() == 2, where(), "data_offsets has ", offsets_.size(), " numbers, expected 2");
    entry_.begin_byte = offsets_[0];
    entry_.end_byte = offsets_[1];
    ROTUNDA_CHECK(entry_.begin_byte <= entry_.end_byte, where(), "data_offsets begin at ", entry_.begin_byte,
                  ", after their end ", entry_.end_byte);
    const auto bytes = size_bytes(entry_.shape, entry_.dtype);
    const std::string_view dtype = safetensors_dtype_name(entry_.dtype);
    ROTUNDA_CHECK(bytes, where(), "shape ", shape_text(entry_.shape), " of ", dtype, " overflows 64 bits");
    ROTUNDA_CHECK(*bytes == entry_.end_byte - entry_.begin_byte, where(), "shape ", shape_text(entry_.shape), " of ",
                  dtype, " is ", *bytes, " bytes, data_offsets hold ", entry_.end_byte - entry_.begin_byte);
    header_.entries.emplace(key_, entry_);
  }

  const std::string& origin_;
  SafetensorsHeader& header_;
  Place place_ = Place::kStart;
  std::string key_;    // of the tensor or the metadata
  std::string field_;  // of the tensor
  Entry entry_{};
  std::vector<int64_t> offsets_;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  bool has_metadata_ = false;
};

// Tensors must follow one another from the first byte of the data to its last. Turns offsets into places in the file.
void place_in_file(SafetensorsHeader& header, int64_t data_start, int64_t data_bytes, const std::string& origin) {
  std::vector<std::pair<const std::string*, Entry*>> order;
  order.reserve(header.entries.size());
  for (auto& [name, entry] : header.entries) order.emplace_back(&name, &entry);
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin_byte, a.second->end_byte) < std::pair(b.second->begin_byte, b.second->end_byte);
  });
  int64_t next = 0;
  const std::string* previous = nullptr;
  for (const auto& [name, entry] : order) {
    ROTUNDA_CHECK(entry->end_byte <= data_bytes, origin, ": tensor ", printable(*name), ": ends at byte ",
                  data_start + entry->end_byte, ", file has ", data_start + data_bytes);
    ROTUNDA_CHECK(entry->begin_byte >= next, origin, ": tensor ", printable(*name), ": begins at byte ",
                  data_start + entry->begin_byte, ", overlaps tensor ", printable(*previous), ", which ends at byte ",
                  data_start + next);
    ROTUNDA_CHECK(entry->begin_byte == next, origin, ": tensor ", printable(*name), ": begins at byte ",
                  data_start + entry->begin_byte, ", leaves a gap from byte ", data_start + next);
    next = entry->end_byte;
    previous = name;
    entry->begin_byte += data_start;
    entry->end_byte += data_start;
  }
  ROTUNDA_CHECK(next == data_bytes, origin, ": the last tensor ends at byte ", data_start + next, ", file has ",
                data_start + data_bytes);
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view header_json, int64_t data_bytes,
                                           const std::string& origin) {
  ROTUNDA_CHECK(!header_json.empty() && header_json.front() == '{', origin, ": header does not begin with '{'");
  // The parser takes a NUL byte for the end of the input and would not look at what follows.
  const size_t nul = header_json.find('\0');
  ROTUNDA_CHECK(nul == std::string_view::npos, origin, ": header is not JSON at its byte ", nul + 1, ": byte 0");
  SafetensorsHeader header;
  HeaderReader reader(origin, header);
  const bool complete = nlohmann::json::sax_parse(header_json.begin(), header_json.end(), &reader);
  ROTUNDA_ASSERT(complete, "every refusal throws");
  place_in_file(header, kSafetensorsPrefixBytes + static_cast<int64_t>(header_json.size()), data_bytes, origin);
  return header;
}

SafetensorsHeader parse_safetensors(std::string_view file_bytes, const std::string& origin) {
  ROTUNDA_CHECK(file_bytes.size() >= static_cast<size_t>(kSafetensorsPrefixBytes), origin, ": file has ",
                file_bytes.size(), " bytes, expected at least ", kSafetensorsPrefixBytes, " (not a safetensors file)");
  uint64_t header_bytes = 0;
  for (int i = 0; i < kSafetensorsPrefixBytes; ++i)
    header_bytes |= uint64_t{static_cast<uint8_t>(file_bytes[i])} << 8 * i;
  ROTUNDA_CHECK(header_bytes <= static_cast<uint64_t>(kMaxSafetensorsHeaderBytes), origin, ": header length is ",
                header_bytes, ", at most ", kMaxSafetensorsHeaderBytes, " is allowed (not a safetensors file?)");
  const std::string_view rest = file_bytes.substr(kSafetensorsPrefixBytes);
  ROTUNDA_CHECK(header_bytes <= rest.size(), origin, ": header ends at byte ", kSafetensorsPrefixBytes + header_bytes,
                ", file has ", file_bytes.size());
  return parse_safetensors_header(rest.substr(0, header_bytes), static_cast<int64_t>(rest.size() - header_bytes),
                                  origin);
}

std::string_view safetensors_dtype_name(at::ScalarType dtype) {
  const auto it = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const DtypeName& d) { return d.dtype == dtype; });
  return it == kDtypes.end() ? std::string_view() : it->name;
}

}  // namespace rotunda::io
