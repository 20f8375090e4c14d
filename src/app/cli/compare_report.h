#pragma once

#include <string>

#include "app/cli/report.h"
#include "app/cli/table.h"
#include "engine/compare.h"

namespace rotunda::cli {

/// A comparison as JSON (docs/report.md has the keys): all that table, CSV and page are made of.
Json compare_json(const engine::CompareReport& report, const engine::CompareOptions& options,
                  const engine::Session& session, Json run);

/// Throws Error{kUser} naming `where` and the key, unless `report` has what compare_json writes.
void check_compare_json(const Json& report, const std::string& where);

/// One row per cache, for people.
Table compare_table(const Json& report);

/// One row per cache (RFC 4180), full precision, named like the JSON's keys; an accuracy per data file.
std::string compare_csv(const Json& report);

}  // namespace rotunda::cli
