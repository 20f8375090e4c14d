#!/usr/bin/env bash
# Proves the two commands on a bare system: a fresh Debian tree, a clean clone of this repository's HEAD, and nothing
# of this machine but the settings of its package registries.
#
#   sudo scripts/bare_system.sh [--suite bookworm] FOLDER [COMMAND]
#
# FOLDER   where the tree goes, outside the repository; 12 GB free. FOLDER/base-<suite>.tar is kept and reused, FOLDER/tree is made
#          anew by each run and left for inspection.
# COMMAND  run by bash in the clone as plain root; default "make demo && make test".
#
# Needs root and debootstrap. The mounts live in a mount namespace of their own and vanish with it.
# What the tree gets from this machine:
#   /etc/resolv.conf, the enabled apt sources and apt's `Acquire` settings (proxies, timeouts),
#   pip's network settings (`pip config`), *_proxy from the environment, and the CA bundle in use.
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; }
fail() { echo "bare_system: $*" >&2; exit 1; }

suite=bookworm
while [[ $# -gt 0 ]]; do
  case "$1" in
    --suite) [[ $# -ge 2 ]] || fail "--suite wants a name"; suite=$2; shift 2 ;;
    -h|--help) usage; exit 0 ;;
    -*) fail "unknown option $1" ;;
    *) break ;;
  esac
done
[[ $# -ge 1 && $# -le 2 ]] || { usage >&2; exit 2; }
folder=$(mkdir -p "$1" && cd "$1" && pwd)
command=${2:-make demo && make test}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

[[ $(id -u) == 0 ]] || fail "needs root (debootstrap, chroot, mount)"
for tool in debootstrap unshare chroot git; do
  command -v "$tool" > /dev/null || fail "$tool is not installed"
done
case "$folder/" in "$repo"/*) fail "$folder is inside the repository" ;; esac
if [[ -z ${ROTUNDA_BARE_NAMESPACE:-} ]]; then
  export ROTUNDA_BARE_NAMESPACE=1
  exec unshare --mount --propagation private "${BASH_SOURCE[0]}" --suite "$suite" "$folder" "$command"
fi

# The mirror this machine's apt already uses for Debian, else the public one.
mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' 2> /dev/null |
         awk -v suite="$suite" '$2 == suite { print $1; exit }' || true)
mirror=${mirror:-http://deb.debian.org/debian}

# What a freshly installed server has beyond the minimum.
server_packages=ca-certificates,git,make,sudo

base="$folder/base-$suite.tar"
tree="$folder/tree"
rm -rf --one-file-system "$tree"
if [[ ! -f $base ]]; then
  echo "== debootstrap $suite from $mirror"
  debootstrap --variant=minbase --include="$server_packages" "$suite" "$tree" "$mirror" > "$folder/debootstrap.log" ||
    fail "debootstrap failed, see $folder/debootstrap.log"
  tar -C "$tree" -cf "$base.part" .
  mv "$base.part" "$base"
else
  echo "== fresh tree from $base"
  mkdir -p "$tree"
  tar -C "$tree" -xf "$base"
fi

echo "== settings of the package registries"
cp -L /etc/resolv.conf "$tree/etc/resolv.conf"
# A host that runs the same suite hands over its sources; any other leaves the one debootstrap wrote.
if [[ $(. /etc/os-release; echo "${VERSION_CODENAME:-}") == "$suite" ]]; then
  rm -f "$tree/etc/apt/sources.list"
  for source in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    # Only sources of the distribution itself: a third party's would need its keys too.
    if [[ -f $source ]] && grep -Eq "^[^#]*\\b$suite\\b" "$source" && ! grep -Eq 'Signed-By: */etc/apt' "$source"; then
      install -D -m 644 "$source" "$tree$source"
    fi
  done
fi
apt-config dump Acquire |
  grep -E '^Acquire::(http|https|Retries|Check-Valid-Until|Check-Date|ForceIPv4)' > "$tree/etc/apt/apt.conf.d/99host" || true

ca_bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
inside_env=(HOME=/root USER=root LOGNAME=root LANG=C.UTF-8 TERM="${TERM:-dumb}"
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
if [[ -f $ca_bundle ]]; then
  install -m 644 "$ca_bundle" "$tree/etc/ssl/host-ca-bundle.crt"
  inside_env+=(SSL_CERT_FILE=/etc/ssl/host-ca-bundle.crt PIP_CERT=/etc/ssl/host-ca-bundle.crt)
fi
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
  [[ -z ${!name:-} ]] || inside_env+=("$name=${!name}")
done
if command -v pip3 > /dev/null; then
  # `pip config list` prints section.key='value', the environment's entries as :env:.key; keys that name local folders stay behind.
  { echo "[global]"
    pip3 config list | sed -nE "s/^[^=]*\\.(index-url|extra-index-url|trusted-host|proxy|default-timeout|timeout|retries)='(.*)'$/\\1 = \\2/p" |
      sed -E 's/^default-timeout/timeout/' | sort -u -t= -k1,1
  } > "$tree/etc/pip.conf"
fi

echo "== clean clone of $(git -C "$repo" rev-parse --short HEAD)"
# A worktree's clone needs the commit by name; safe.directory: the repository may belong to another user.
git -c safe.directory='*' clone --quiet --no-local --no-checkout "$repo" "$tree/root/rotunda"
git -C "$tree/root/rotunda" checkout --quiet --detach "$(git -c safe.directory='*' -C "$repo" rev-parse HEAD)"

echo "== in the tree: $command"
mount -t proc proc "$tree/proc"
mount --rbind /dev "$tree/dev"
started=$SECONDS
status=0
env -i "${inside_env[@]}" chroot "$tree" /bin/bash -c "cd /root/rotunda && $command" || status=$?
echo "== exit status $status after $((SECONDS - started)) s"
exit "$status"
