#!/usr/bin/env bash
# build.sh PRESET JOBS TARGET...: configures (if need be) and builds; on a terminal one progress line, else plain output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
preset=$1 jobs=$2
shift 2

mkdir -p "build/$preset"
log="build/$preset/configure.log"
# CMake's own checks are noise unless they fail. Configuring again is quick and notices a changed preset.
cmake --preset "$preset" > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
cmake --build "build/$preset" --parallel "$jobs" --target "$@"
