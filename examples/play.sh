#!/usr/bin/env bash
# Play a lesson about a mode: `examples/play.sh mode-iptables` runs the commands of its README as they stand there, and
# shows each before what it says. In a network of its own, on a copy of the manifests: nothing is left behind.
set -eu
lesson=${1:?which one? mode-userspace, mode-iptables, mode-nftables or mode-ipvs}
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.venv/bin:/usr/sbin:/sbin
export TMPDIR
TMPDIR=$(mktemp -d)
trap 'rm -rf "$TMPDIR"' EXIT
cp -r examples "$TMPDIR"
{
  echo "ip link set lo up"
  # shellcheck disable=SC2016 # Markdown, no expansion
  sed -n '/^```sh$/,/^```$/{/^```/!p}' "examples/$lesson/README.md"
} >"$TMPDIR/commands"
cd "$TMPDIR"
namespaces=(--net --pid --fork --kill-child --mount-proc)
[ "$(id -u)" = 0 ] || namespaces+=(--user --map-root-user)
unshare "${namespaces[@]}" bash -v commands 2>&1
