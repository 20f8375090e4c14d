#!/usr/bin/env bash
# Runs every bench of build/cpu-release (each checks its results against the reference before it times), prints its table
# and leaves its JSON in build/bench/<name>.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mapfile -t benches < build/cpu-release/benches.txt
[[ ${#benches[@]} -gt 0 ]] || { echo "bench: no bench is declared in bench/" >&2; exit 1; }
mkdir -p build/bench
for bench in "${benches[@]}"; do
  name=$(basename "$bench")
  echo "== $name"
  "$bench" --benchmark_out="build/bench/$name.json" --benchmark_out_format=json
done
