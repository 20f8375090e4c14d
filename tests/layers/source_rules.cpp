#include "layers/source_rules.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>

namespace rotunda::layers {

namespace fs = std::filesystem;

namespace {

// Each room with the rooms that it may include besides itself, nearest first.
const std::map<std::string, std::vector<std::string>>& allowed_rooms() {
  static const std::map<std::string, std::vector<std::string>> allowed = {
      {"base", {}},
      {"kernels", {"base"}},
      {"ops", {"kernels", "base"}},
      {"io", {"ops", "kernels", "base"}},
      {"kv", {"ops", "kernels", "base"}},
      {"quant", {"ops", "kernels", "base"}},
      {"diffusion", {"ops", "kernels", "base"}},
      {"model", {"kv", "quant", "diffusion", "io", "ops", "kernels", "base"}},
      {"engine", {"model", "kv", "quant", "diffusion", "io", "ops", "kernels", "base"}},
      {"app", {"engine", "model", "kv", "quant", "diffusion", "io", "ops", "kernels", "base"}},
  };
  return allowed;
}

// Rooms whose folders are formats or methods, behind an interface and a registry.
const std::set<std::string>& rooms_of_formats() {
  static const std::set<std::string> rooms = {"kv", "quant"};
  return rooms;
}

std::string read_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::vector<std::string> split_lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

std::vector<std::string> path_parts(const std::string& path) {
  std::vector<std::string> parts;
  std::istringstream in(path);
  for (std::string part; std::getline(in, part, '/');) parts.push_back(part);
  return parts;
}

bool is_torch(const std::string& include) {
  static const std::set<std::string> roots = {"torch", "ATen", "c10", "caffe2"};
  return roots.count(path_parts(include).front()) != 0;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "nothing" : text;
}

// One file of the tree under examination.
class FileCheck {
 public:
  FileCheck(const fs::path& src, std::string path, Report& report)
      : src_(src), path_(std::move(path)), parts_(path_parts(path_)), room_(parts_.front()), report_(report) {}

  void run() {
    if (parts_.size() < 2) return violation(0, "stands in no room; expected a folder of src/");
    if (allowed_rooms().count(room_) == 0) return violation(0, "is in unknown room " + room_);
    const std::string raw = read_text(src_ / path_);
    lines_ = split_lines(strip_comments_and_literals(raw));
    if (path_.ends_with(".h")) check_guard();
    for (size_t i = 0; i < lines_.size(); ++i) {
      check_include(static_cast<int>(i) + 1, lines_[i]);
      check_words(static_cast<int>(i) + 1, lines_[i]);
    }
  }

 private:
  void violation(int line, const std::string& what) {
    report_.violations.push_back(path_ + (line > 0 ? ":" + std::to_string(line) : "") + " " + what);
  }

  void check_guard() {
    for (size_t i = 0; i < lines_.size(); ++i) {
      if (lines_[i].find_first_not_of(" \t\r") == std::string::npos) continue;
      static const std::regex once(R"(^\s*#\s*pragma\s+once\s*$)");
      // Highway includes such a header once per instruction set: its guard toggles.
      const bool toggles = path_.ends_with("-inl.h") && lines_[i].find("HWY_TARGET_TOGGLE") != std::string::npos;
      if (!std::regex_match(lines_[i], once) && !toggles) {
        violation(static_cast<int>(i) + 1, "does not start with #pragma once");
      }
      return;
    }
    violation(1, "does not start with #pragma once");
  }

  // A format's own kernels/ follow the rules of the room kernels, and may include their neighbours.
  bool torch_free() const {
    return room_ == "base" || room_ == "kernels" || std::find(parts_.begin() + 1, parts_.end() - 1, "kernels") != parts_.end() - 1;
  }

  void check_include(int line, const std::string& text) {
    static const std::regex include(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
    std::smatch match;
    if (!std::regex_search(text, match, include)) return;
    const bool quoted = match[1] == "\"";
    const std::string target = match[2];
    const std::vector<std::string> parts = path_parts(target);
    const std::vector<std::string>& allowed = allowed_rooms().at(room_);

    if (is_torch(target)) {
      if (torch_free()) {
        violation(line, "includes " + target + "; allowed: " + join(room_ == "base" || room_ == "kernels" ? allowed : kernel_rooms()));
      }
      return;
    }
    if (std::find(parts.begin(), parts.end(), "..") != parts.end()) {
      return violation(line, "includes " + target + "; expected a path from src/");
    }
    if (allowed_rooms().count(parts.front()) == 0 || parts.size() < 2) {
      const fs::path sibling = src_ / fs::path(path_).parent_path() / target;
      if (quoted && fs::exists(sibling)) {
        violation(line, "includes " + target + "; expected a path from src/: " + (fs::path(path_).parent_path() / target).string());
      }
      return;  // third party or generated
    }

    ++report_.n_room_includes;
    const std::string& room = parts.front();
    if (room == room_) {
      if (torch_free() && room_ != "base" && room_ != "kernels" && !target.starts_with(format_folder())) {
        violation(line, "includes " + target + "; allowed: " + join(kernel_rooms()));
      }
      return;
    }
    const std::vector<std::string> rooms = torch_free() && room_ != "base" && room_ != "kernels" ? kernel_rooms() : allowed;
    if (std::find(rooms.begin(), rooms.end(), room) == rooms.end()) {
      violation(line, "includes " + target + "; allowed: " + join(rooms));
    } else if (rooms_of_formats().count(room) != 0 && parts.size() > 2) {
      violation(line, "includes " + target + "; a format's own files stay behind the interface: allowed: " + room + "/*.h");
    }
  }

  std::vector<std::string> kernel_rooms() const { return {format_folder().substr(0, format_folder().size() - 1), "kernels", "base"}; }

  // "kv/rotate/kernels/" for kv/rotate/kernels/rotate_page.h
  std::string format_folder() const {
    std::string folder;
    for (size_t i = 0; i + 1 < parts_.size(); ++i) {
      folder += parts_[i] + "/";
      if (i > 0 && parts_[i] == "kernels") break;
    }
    return folder;
  }

  void check_words(int line, const std::string& text) {
    static const std::regex writes(
        R"(\b(v?printf|puts|putchar|perror)\s*\(|\bv?fprintf\s*\(\s*std(out|err)\b|\bf(puts|putc|write)\s*\([^;]*\bstd(out|err)\b|\bstd::(cout|cerr|clog)\b|#\s*include\s*<(iostream|print)>|\bstd::print(ln)?\s*\()");
    static const std::regex environment(R"(\b(secure_)?getenv\b|\b(un)?setenv\b|\bputenv\b|\benviron\b)");
    std::smatch match;
    if (room_ != "app" && std::regex_search(text, match, writes)) {
      violation(line, "writes to a stream (" + trimmed(match.str()) + "); only app/ prints, the rest logs, returns or throws");
    }
    if (path_ != "base/env.cpp" && std::regex_search(text, match, environment)) {
      violation(line, "touches the environment (" + match.str() + "); allowed in base/env.cpp only");
    }
  }

  static std::string trimmed(std::string text) {
    while (!text.empty() && (text.back() == '(' || text.back() == ' ')) text.pop_back();
    return text;
  }

  const fs::path& src_;
  const std::string path_;
  const std::vector<std::string> parts_;
  const std::string room_;
  std::vector<std::string> lines_;
  Report& report_;
};

}  // namespace

std::string strip_comments_and_literals(std::string_view text) {
  std::string out(text);
  // Blanks [from, to) but keeps line ends, so that line numbers hold.
  const auto blank = [&out](size_t from, size_t to) {
    for (size_t i = from; i < to && i < out.size(); ++i) {
      if (out[i] != '\n') out[i] = ' ';
    }
  };
  const auto is_word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  size_t i = 0;
  while (i < text.size()) {
    if (text.compare(i, 2, "//") == 0) {
      size_t end = text.find('\n', i);
      if (end == std::string_view::npos) end = text.size();
      blank(i, end);
      i = end;
    } else if (text.compare(i, 2, "/*") == 0) {
      const size_t close = text.find("*/", i + 2);
      const size_t end = close == std::string_view::npos ? text.size() : close + 2;
      blank(i, end);
      i = end;
    } else if (text[i] == '"') {
      const size_t line_start = text.rfind('\n', i) == std::string_view::npos ? 0 : text.rfind('\n', i) + 1;
      static const std::regex include_head(R"(^\s*#\s*include\s*$)");
      const std::string_view before = text.substr(line_start, i - line_start);
      const bool is_include = std::regex_match(before.begin(), before.end(), include_head);
      const bool is_raw = i > 0 && text[i - 1] == 'R' && (i < 2 || !is_word(text[i - 2]) || text[i - 2] == '8' || text[i - 2] == 'L');
      size_t end = i + 1;
      if (is_raw) {
        const size_t open = text.find('(', i);
        const std::string closing = ")" + std::string(text.substr(i + 1, open - i - 1)) + "\"";
        const size_t close = text.find(closing, open);
        end = close == std::string_view::npos ? text.size() : close + closing.size();
      } else {
        while (end < text.size() && text[end] != '"' && text[end] != '\n') end += text[end] == '\\' ? 2 : 1;
        end = std::min(end + 1, text.size());
      }
      if (!is_include) blank(i + 1, end - 1);
      i = end;
    } else if (text[i] == '\'' && !(i > 0 && is_word(text[i - 1]) && i + 1 < text.size() && is_word(text[i + 1]))) {
      // Not the digit separator of 1'000'000.
      size_t end = i + 1;
      while (end < text.size() && text[end] != '\'' && text[end] != '\n') end += text[end] == '\\' ? 2 : 1;
      end = std::min(end + 1, text.size());
      blank(i + 1, end - 1);
      i = end;
    } else {
      ++i;
    }
  }
  return out;
}

Report check_sources(const fs::path& src) {
  std::vector<std::string> paths;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(src)) {
    const std::string extension = entry.path().extension().string();
    if (entry.is_regular_file() && (extension == ".h" || extension == ".cpp" || extension == ".cc")) {
      paths.push_back(fs::relative(entry.path(), src).generic_string());
    }
  }
  std::sort(paths.begin(), paths.end());
  Report report;
  report.n_files = static_cast<int>(paths.size());
  for (const std::string& path : paths) FileCheck(src, path, report).run();
  return report;
}

}  // namespace rotunda::layers
