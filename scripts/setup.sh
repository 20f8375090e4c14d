#!/usr/bin/env bash
# Installs what is missing and nothing else: Debian packages (scripts/packages.txt; with --fuzz also packages-fuzz.txt)
# and .venv with the wheels pinned in scripts/requirements.txt (with --cuda also requirements-cuda.txt). Safe to run
# again: with all in place it takes well under a second and changes nothing; what it finds broken it makes anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

lists=(scripts/packages.txt)
requirements=(scripts/requirements.txt)
case "${1:-}" in
  "") ;;
  --fuzz) lists+=(scripts/packages-fuzz.txt) ;;
  --cuda) requirements+=(scripts/requirements-cuda.txt) ;;
  *) fail "unknown argument $1; expected nothing, --fuzz or --cuda" ;;
esac

[[ $(uname -sm) == "Linux x86_64" ]] || fail "this is $(uname -sm); expected Linux x86_64"
command -v dpkg-query > /dev/null && command -v apt-get > /dev/null ||
  fail "no dpkg and apt-get here; expected Debian 12 or Ubuntu 24.04 (elsewhere install what ${lists[*]} name, by hand)"

log=build/setup.log
# Runs a command with its output in the log; where it fails, shows the end of it.
logged() {
  mkdir -p build
  echo "+ $(date '+%F %T') $*" >> "$log"
  local before
  before=$(wc -l < "$log")
  "$@" >> "$log" 2>&1 || { tail -n "+$((before + 1))" "$log" | tail -n 8 >&2; fail "failed: $* (all of its output: $log)"; }
}

# Debian packages ------------------------------------------------------------------------------------------------------

mapfile -t packages < <(sed -E 's/#.*//; s/[[:space:]]+$//; /^$/d' "${lists[@]}")
# Names of the packages that are not installed, one a line.
missing_packages() {
  dpkg-query -W -f='${Package} ${db:Status-Abbrev}\n' "${packages[@]}" 2> /dev/null |
    awk -v wanted="${packages[*]}" '
      $2 == "ii" { here[$1] = 1 }
      END { n = split(wanted, names, " "); for (i = 1; i <= n; ++i) if (!(names[i] in here)) print names[i] }' || true
}

mapfile -t missing < <(missing_packages)
if [[ ${#missing[@]} -gt 0 ]]; then
  as_root=()
  if [[ $(id -u) != 0 ]]; then
    command -v sudo > /dev/null || fail "missing Debian packages: ${missing[*]}; no root and no sudo, so ask an administrator for: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  say "Debian packages: ${missing[*]}"
  # Waits for another apt to finish (a fresh server upgrades itself at first boot) instead of failing at once.
  apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
  logged "${apt[@]}" update
  logged "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
  mapfile -t missing < <(missing_packages)
  [[ ${#missing[@]} == 0 ]] || fail "apt-get succeeded, but still missing: ${missing[*]}"
fi

# .venv ----------------------------------------------------------------------------------------------------------------

# The first thing of a list of wheels that is wrong with .venv, or nothing.
venv_problem() {
  if [[ ! -e .venv ]]; then
    echo "not there yet"
  else
    .venv/bin/python -I scripts/check_venv.py "$1" || true
  fi
}

# A venv whose python does not start (its system python is gone, or it was moved) cannot be mended.
if [[ -e .venv || -L .venv ]] && ! .venv/bin/python -c '' > /dev/null 2>&1; then
  say ".venv: its python does not start, making it anew"
  rm -rf .venv
fi
for list in "${requirements[@]}"; do
  problem=$(venv_problem "$list")
  [[ -n $problem ]] || continue
  what="LibTorch, CMake and Ninja (1.4 GB once unpacked)"
  [[ $list != *-cuda.txt ]] || what="the libraries of LibTorch's CUDA half (several GB)"
  say ".venv: $problem; installing $what"
  [[ -e .venv/bin/pip ]] || logged python3 -m venv .venv
  # A package of the right version with files missing counts as installed with pip: hence --force-reinstall.
  logged .venv/bin/python -m pip install --disable-pip-version-check --no-input --no-deps --require-hashes \
    --only-binary=:all: --no-cache-dir --no-compile --force-reinstall -r "$list"
  problem=$(venv_problem "$list")
  [[ -z $problem ]] || fail ".venv: pip succeeded, but $problem"
  say "ready"
done
