#!/usr/bin/env bash
# Prints how many compile jobs this machine carries: one per core, and no more than one per 1.5 GB of free memory.
set -euo pipefail
cores=$(nproc)
by_memory=$(awk '/^MemAvailable:/ { print int($2 / 1500000) }' /proc/meminfo)
jobs=$((cores < by_memory ? cores : by_memory))
echo $((jobs > 0 ? jobs : 1))
