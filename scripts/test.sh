#!/usr/bin/env bash
# test.sh JOBS: builds and runs every test. In order: optimized (cpu-release), under AddressSanitizer and UndefinedBehaviorSanitizer
# (cpu-debug), the CUDA half compiled where the toolkit is installed, a short fuzz run where clang is. Stops at the first part that
# fails. The last line is ctest's own summary of the optimized run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
jobs=$1
smoke_seconds=${FUZZ_SMOKE_SECONDS:-10}

part_started=$SECONDS
part_done() { echo "-- $1: $((SECONDS - part_started)) s"; part_started=$SECONDS; }

# ctest's line "N% tests passed, ..." of one preset. JUnit for programs, the log for people.
run_ctest() {
  local preset=$1
  ctest --preset "$preset" --parallel "$jobs" --no-tests=error --output-junit junit.xml 2>&1 | tee "build/$preset/ctest.log"
}
summary_of() { grep -E '^[0-9]+% tests passed' "build/$1/ctest.log" | tail -n 1; }

for preset in cpu-release cpu-debug; do
  echo "== $preset: build"
  scripts/build.sh "$preset" "$jobs" all
  part_done "$preset built"
  echo "== $preset: test"
  run_ctest "$preset"
  part_done "$preset tested"
done

echo "== cuda: compile"
nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
toolkit=$("$nvcc" --version 2> /dev/null | sed -nE 's/.*release ([0-9]+)\..*/\1/p') || true
if [[ -z $toolkit ]]; then
  echo "-- cuda skipped: no nvcc on PATH, in /usr/local/cuda or named by CUDACXX"
elif [[ $toolkit -lt 13 ]]; then
  echo "-- cuda skipped: $nvcc is of CUDA $toolkit, expected 13 or newer"
else
  scripts/build.sh cuda-compile "$jobs" cuda_half
  part_done "cuda-compile built"
fi

echo "== fuzz: ${smoke_seconds} s per target"
if reason=$(scripts/fuzz.sh --unavailable-reason); then
  echo "-- fuzz skipped: $reason"
else
  scripts/fuzz.sh "$jobs" "$smoke_seconds"
  part_done "fuzz"
fi

echo "== all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "cpu-debug (AddressSanitizer, UndefinedBehaviorSanitizer): $(summary_of cpu-debug)"
summary_of cpu-release
