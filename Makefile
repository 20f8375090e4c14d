# The front door. Two commands matter: `make demo` and `make test`; both set up a fresh Debian 12 or Ubuntu 24.04 machine.
# The build itself is CMake's (CMakePresets.json); this file only calls it in the right order.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# How many jobs at once; LibTorch's headers want about 1 GB each.
JOBS ?= $(shell scripts/jobs.sh)
FUZZ_SECONDS ?= 600

.PHONY: help setup setup-cuda build build-cuda test demo bench bench-peers fuzz fuzz-smoke format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup:  ## install what is missing: Debian packages, .venv with LibTorch and CMake
	@scripts/setup.sh

build: setup  ## the program, build/cpu-release/rotunda (what `make` alone does)
	@scripts/build.sh cpu-release $(JOBS) rotunda

setup-cuda: setup  ## also the libraries of LibTorch's CUDA half
	@scripts/setup.sh --cuda

build-cuda: setup-cuda  ## the program for GPUs, build/cuda-release/rotunda (needs the CUDA toolkit 13)
	@scripts/build.sh cuda-release $(JOBS) rotunda

test: setup  ## every test: optimized, under sanitizers, and a short fuzz run where clang is
	@scripts/test.sh $(JOBS)

demo: build  ## the main job on the model in models/: 16-bit cache against the packed 2-bit cache
	@scripts/demo.sh

bench: setup  ## kernels and end to end against named baselines; JSON in build/bench/
	@scripts/build.sh cpu-release $(JOBS) all
	@scripts/bench.sh

bench-peers: setup  ## decode attention of llama.cpp on this CPU, to set beside `make bench`; JSON in build/bench/
	@scripts/bench_peers.sh $(JOBS)

fuzz:  ## every fuzz target for FUZZ_SECONDS=600 each (installs clang)
	@scripts/setup.sh --fuzz
	@scripts/fuzz.sh $(JOBS) $(FUZZ_SECONDS)

fuzz-smoke:  ## every fuzz target for 10 s each (installs clang)
	@scripts/setup.sh --fuzz
	@scripts/fuzz.sh $(JOBS) 10

format:  ## clang-format over all C++ sources
	@command -v clang-format > /dev/null || { echo "format: clang-format is not installed" >&2; exit 1; }
	@git ls-files -z '*.h' '*.cpp' '*.cc' | xargs -0 clang-format -i

clean:  ## remove build/ (.venv stays)
	@rm -rf build
