#!/usr/bin/env bash
# cuda_check.sh BUILD OUT: on a machine with a GPU, runs what build folder BUILD (preset cuda-release) holds for it: the tests of the kernels,
# the same under compute-sanitizer's memcheck, racecheck and initcheck, and the benches; logs and JSON go to folder OUT. Every part runs even
# where one before it failed; the exit status is 0 only if all passed.
set -uo pipefail
build=$1 out=$2
mkdir -p "$out"
failed=0
part() {
  local name=$1
  shift
  local started=$SECONDS
  if "$@" > "$out/$name.log" 2>&1; then
    echo "-- $name: passed, $((SECONDS - started)) s"
  else
    echo "-- $name: FAILED, $((SECONDS - started)) s; the end of its log:"
    tail -n 15 "$out/$name.log"
    failed=1
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "cuda_check: no GPU" >&2; exit 1; }
mapfile -t tests < <(find "$build/tests" -name '*_gpu_test' -type f -executable | sort)
[[ ${#tests[@]} -gt 0 ]] || { echo "cuda_check: $build/tests holds no *_gpu_test" >&2; exit 1; }
for test in "${tests[@]}"; do part "$(basename "$test")" "$test"; done
# The sanitizer slows a kernel down some hundred times: a few tests of each program are enough, all of them take the same paths.
for tool in memcheck racecheck initcheck; do
  for test in "${tests[@]}"; do
    part "$tool-$(basename "$test")" compute-sanitizer --tool "$tool" --error-exitcode 1 "$test" --gtest_filter='*Few*:*Window*:*Shifted*:*Refuse*'
  done
done
bench() {
  local name=$1 program=$2
  shift 2
  part "$name" "$build/bench/cuda/$program" "$@" --json "$out/$name.json"
}
bench attention attention_cuda
bench store store_cuda
bench decode_short decode_cuda --shape llama3-8b --context 128 --kv bf16,rotunda2
bench decode_long decode_cuda --shape llama3-8b --context 131072 --kv bf16,rotunda2 --steps 32
bench decode_batch decode_cuda --shape llama2-13b --dtype fp16 --context 4096 --kv fp16,rotunda2,rotate2 --batch 8 --largest --steps 16
cat "$out"/{attention,store,decode_short,decode_long,decode_batch}.log
exit $failed
