#!/usr/bin/env bash
# Play lessons: `examples/play.sh mode-iptables` runs the commands of its README as they stand there, and shows each
# before what it says. In a network of its own, on a copy of the manifests: nothing is left behind.
# Lessons for the lab are played in one lab, one after the other: `examples/play.sh deployment scaling`.
set -eu
cd "$(dirname "$0")/.."
in_lab=$(grep -l '^userspace-proxy lab examples/' examples/*/README.md | cut -d/ -f2 | tr '\n' ' ')
by_itself="balance health-check connection-policy dns headless external-name environment forward offline $(cd examples && echo mode-*)"
kind=
for lesson in "$@"; do
  found=
  case " $in_lab " in *" $lesson "*) found=lab ;; esac
  case " $by_itself " in *" $lesson "*) found=alone ;; esac
  [ -n "$found" ] && { [ -z "$kind" ] || [ "$kind$found" = lablab ]; } || { kind=; break; }
  kind=$found
done
if [ -z "$kind" ]; then
  echo "usage: examples/play.sh LESSON, one of: $by_itself" >&2
  echo "       examples/play.sh LESSON..., of: $in_lab" >&2
  exit 2
fi
PATH=$PATH:$PWD/.venv/bin:/usr/sbin:/sbin
export TMPDIR
TMPDIR=$(mktemp -d)
child=
# KILL: unshare heeds no other signal while it waits, and takes all that it started with it. The lab does so, too.
trap '[ -z "$child" ] || kill -KILL "$child" 2>/dev/null || :; rm -rf "$TMPDIR"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
cp -r examples "$TMPDIR"
commands_of() {
  # shellcheck disable=SC2016 # Markdown, no expansion
  sed -n '/^```sh$/,/^```$/{/^```/!p}' "examples/$1/README.md"
}
if [ "$kind" = lab ]; then
  for lesson in "$@"; do
    echo "apply -f examples/$lesson"
    commands_of "$lesson" | grep -v '^userspace-proxy lab '
    # A lesson ends where it began.
    echo "cmp -s /run/lab/mode <(echo userspace) || mode userspace"
    echo "delete -f examples/$lesson"
    echo "until get pods -A | grep '^No Pods'; do sleep 0.1; done"
  done >"$TMPDIR/commands"
  command=(userspace-proxy lab -- bash -v commands)
else
  { echo "ip link set lo up"; commands_of "$1"; } >"$TMPDIR/commands"
  command=(unshare --net --pid --fork --kill-child --mount-proc)
  [ "$(id -u)" = 0 ] || command+=(--user --map-root-user)
  command+=(bash -v commands)
fi
cd "$TMPDIR"
"${command[@]}" 2>&1 &
child=$!
code=0
wait "$child" || code=$?
child=
exit "$code"
