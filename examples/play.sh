#!/usr/bin/env bash
# Play a lesson: `examples/play.sh mode-iptables` runs the commands of its README as they stand there, and shows each
# before what it says. In a network of its own, on a copy of the manifests: nothing is left behind.
set -eu
cd "$(dirname "$0")/.."
lesson=${1:-}
case $lesson in
mode-* | balance | health-check | connection-policy | dns | headless | external-name | environment | forward | offline)
  [ -f "examples/$lesson/README.md" ] || lesson=
  ;;
*) lesson= ;;
esac
if [ -z "$lesson" ]; then
  echo "usage: examples/play.sh mode-userspace | mode-iptables | mode-nftables | mode-ipvs | balance | health-check |" \
    "connection-policy | dns | headless | external-name | environment | forward | offline" >&2
  exit 2
fi
PATH=$PATH:$PWD/.venv/bin:/usr/sbin:/sbin
export TMPDIR
TMPDIR=$(mktemp -d)
child=
# KILL: unshare heeds no other signal while it waits, and takes all that it started with it.
trap '[ -z "$child" ] || kill -KILL "$child" 2>/dev/null || :; rm -rf "$TMPDIR"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
cp -r examples "$TMPDIR"
{
  echo "ip link set lo up"
  # shellcheck disable=SC2016 # Markdown, no expansion
  sed -n '/^```sh$/,/^```$/{/^```/!p}' "examples/$lesson/README.md"
} >"$TMPDIR/commands"
cd "$TMPDIR"
namespaces=(--net --pid --fork --kill-child --mount-proc)
[ "$(id -u)" = 0 ] || namespaces+=(--user --map-root-user)
unshare "${namespaces[@]}" bash -v commands 2>&1 &
child=$!
code=0
wait "$child" || code=$?
child=
exit "$code"
