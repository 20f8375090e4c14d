#!/usr/bin/env bash
# fuzz.sh JOBS SECONDS: builds the fuzz targets (preset cpu-fuzz) and runs each for SECONDS, from the seeds in
# tests/fuzz/corpus/<target>/. New inputs gather in build/fuzz/<target>/corpus; a crash stops the run, names the input that
# does it and fails.
# fuzz.sh --unavailable-reason: succeeds and says why where this machine cannot fuzz, else fails silently.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

unavailable_reason() {
  if ! command -v clang++ > /dev/null; then
    echo "clang++ is not installed (make fuzz-smoke installs it)"
  elif ! echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
         clang++ -fsanitize=fuzzer,address -x c++ - -o /dev/null > /dev/null 2>&1; then
    echo "clang++ cannot link a libFuzzer program (make fuzz-smoke installs its runtime)"
  else
    return 1
  fi
}

if [[ ${1:-} == --unavailable-reason ]]; then
  unavailable_reason
  exit
fi
jobs=$1 seconds=$2
if reason=$(unavailable_reason); then
  echo "fuzz: $reason" >&2
  exit 1
fi

scripts/build.sh cpu-fuzz "$jobs" fuzz_targets
mapfile -t targets < build/cpu-fuzz/fuzz_targets.txt
[[ ${#targets[@]} -gt 0 ]] || { echo "fuzz: no target is declared in tests/fuzz/CMakeLists.txt" >&2; exit 1; }
for target in "${targets[@]}"; do
  work="build/fuzz/$target"
  mkdir -p "$work/corpus" "$work/crashes"
  seeds=()
  [[ ! -d tests/fuzz/corpus/$target ]] || seeds=("tests/fuzz/corpus/$target")
  # 2 GB and 10 s bound one input: a header that lies about sizes must be refused, not obeyed.
  if ! "build/cpu-fuzz/bin/$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
         -artifact_prefix="$work/crashes/" "$work/corpus" "${seeds[@]}" > "$work/log.txt" 2>&1; then
    tail -n 60 "$work/log.txt" >&2
    echo "fuzz: $target failed; the input is in $work/crashes/" >&2
    exit 1
  fi
  echo "fuzz: $target: $(awk '/stat::number_of_executed_units/ { print $2 }' "$work/log.txt") runs in $seconds s, no crash"
done
