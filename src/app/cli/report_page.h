#pragma once

#include <string>
#include <string_view>

#include "app/cli/report.h"

namespace rotunda::cli {

/// One HTML page, whole in itself, made of assets/report.html, the library that draws, and the report (as JSON in a script element, which
/// the page reads). Whatever texts the report holds, no byte of them is markup.
std::string report_page(const Json& report);

/// The bytes of assets/report.html and of assets/echarts/echarts.min.js.
std::string_view report_template();
std::string_view echarts_source();

}  // namespace rotunda::cli
