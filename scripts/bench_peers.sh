#!/usr/bin/env bash
# bench_peers.sh JOBS [benchmark flags...]: builds the pinned peers under build/peers (ggml of llama.cpp, optimized for this
# CPU; a few minutes, once), then the benches of bench/peers against them, runs those and leaves their JSON in build/bench.
# JOBS=1 nice -n 19 lets other work on the machine go on; the figures want it idle.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
jobs=${1:?usage: bench_peers.sh JOBS [benchmark flags...]}
shift

say() { echo "bench-peers: $*"; }
fail() { echo "bench-peers: $*" >&2; exit 1; }

peers=build/peers
requirements=bench/peers/requirements.txt
log=$peers/build.log
mkdir -p "$peers" build/bench
logged() { "$@" >> "$log" 2>&1 || { tail -n 20 "$log" >&2; fail "failed: $* (all of its output: $log)"; }; }

# Of llama.cpp only ggml is built, by the package's own CMake project and so with the options that `pip install` would use:
# the benches need no more, and the rest takes ten times as long.
if ! cmp -s "$requirements" "$peers/built"; then
  say "building ggml from the sdist of $(grep -o '^[a-z-]*==[0-9.]*' "$requirements") (log: $log)"
  rm -rf "$peers"
  mkdir -p "$peers/sdist" "$peers/source"
  logged python3 -m venv "$peers/venv"
  logged "$peers/venv/bin/pip" download --disable-pip-version-check --no-input --no-deps --require-hashes \
    --no-binary llama-cpp-python --dest "$peers/sdist" -r "$requirements"
  logged tar -xf "$peers"/sdist/*.tar.gz -C "$peers/source" --strip-components 1
  logged cmake -S "$peers/source" -B "$peers/ggml" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF
  logged cmake --build "$peers/ggml" --parallel "$jobs" --target ggml
  cp "$requirements" "$peers/built"
fi

bench=$peers/ggml_attention_bench
logged "${CXX:-g++}" -std=c++20 -O3 -march=native -Wall -Wextra -Werror -isystem "$peers/source/vendor/llama.cpp/ggml/include" \
  bench/peers/ggml_attention_bench.cpp -o "$bench" -L "$peers/ggml/bin" "-Wl,-rpath,\$ORIGIN/ggml/bin" \
  -lggml -lggml-cpu -lggml-base -lbenchmark -pthread
say "load: $(cut -d ' ' -f 1-3 /proc/loadavg). ggml's threads wait for each other in spin loops: with anything else running, times grow tenfold"
"$bench" --benchmark_out=build/bench/ggml_attention_bench.json --benchmark_out_format=json "$@"
python3 scripts/bench_table.py build/bench/ggml_attention_bench.json
