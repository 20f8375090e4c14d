#include "app/cli/report_page.h"

#include "base/check.h"

namespace rotunda::cli {

namespace {

// The two places of the template; each stands there once.
constexpr std::string_view kLibraryPlace = "/*ROTUNDA:ECHARTS*/";
constexpr std::string_view kDataPlace = "/*ROTUNDA:REPORT*/";

std::pair<std::string_view, std::string_view> split_at(std::string_view text, std::string_view place) {
  const size_t at = text.find(place);
  ROTUNDA_ASSERT(at != std::string_view::npos, "assets/report.html lacks ", place);
  return {text.substr(0, at), text.substr(at + place.size())};
}

// ASCII alone, and no character that HTML looks for: "</script>", "<!--" and entities cannot come up.
std::string script_safe(const Json& report) {
  std::string safe;
  for (const char c : report.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace)) {
    switch (c) {
      case '<':
        safe += "\\u003c";
        break;
      case '>':
        safe += "\\u003e";
        break;
      case '&':
        safe += "\\u0026";
        break;
      default:
        safe += c;
    }
  }
  return safe;
}

}  // namespace

std::string report_page(const Json& report) {
  const auto [before_library, rest] = split_at(report_template(), kLibraryPlace);
  const auto [between, after_data] = split_at(rest, kDataPlace);
  // Joined, not replaced in place: texts that hold a place's name change nothing.
  std::string page(before_library);
  page += echarts_source();
  page += between;
  page += script_safe(report);
  page += after_data;
  return page;
}

}  // namespace rotunda::cli
