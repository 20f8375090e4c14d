#pragma once

#include <spdlog/spdlog.h>

// Libraries log through these; the program decides level and sink. Nothing below app/ writes to a stream itself.
#define ROTUNDA_LOG_DEBUG(...) ::spdlog::debug(__VA_ARGS__)
#define ROTUNDA_LOG_INFO(...) ::spdlog::info(__VA_ARGS__)
#define ROTUNDA_LOG_WARN(...) ::spdlog::warn(__VA_ARGS__)
#define ROTUNDA_LOG_ERROR(...) ::spdlog::error(__VA_ARGS__)
