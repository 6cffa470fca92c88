#!/usr/bin/env bash
# Play lessons in one lab, one after the other: `examples/play.sh deployment mode-iptables` runs the commands of their
# READMEs as they stand there, and shows each before what it says. On a copy of the manifests: nothing is left behind.
set -eu
cd "$(dirname "$0")/.."
lessons=$(grep -l 'userspace-proxy lab .*examples/' examples/*/README.md | cut -d/ -f2 | tr '\n' ' ')
for lesson in "${@:-none}"; do
  case " $lessons " in
    *" $lesson "*) ;;
    *)
      echo "usage: examples/play.sh LESSON..., of: $lessons" >&2
      exit 2
      ;;
  esac
done
PATH=$PATH:$PWD/.venv/bin:/usr/sbin:/sbin
export TMPDIR
TMPDIR=$(mktemp -d)
lab=
# KILL: the lab takes all that it started with it.
trap '[ -z "$lab" ] || kill -KILL "$lab" 2>/dev/null || :; rm -rf "$TMPDIR"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
cp -r examples "$TMPDIR"
for lesson in "$@"; do
  # shellcheck disable=SC2016 # Markdown, no expansion
  commands=$(sed -n '/^```sh$/,/^```$/{/^```/!p}' "examples/$lesson/README.md")
  mode=$(sed -n 's/.*userspace-proxy lab --proxy-mode \([a-z]*\) .*/\1/p' <<<"$commands")
  echo "# ---- $lesson"
  echo "apply -f examples/$lesson"
  echo "grep -q ${mode:-userspace} /run/lab/mode || mode ${mode:-userspace}"
  grep -v 'userspace-proxy lab .*examples/' <<<"$commands"
  # A lesson ends where it began.
  echo "delete --now -f examples/$lesson"
  echo "until get pods -A | grep '^No Pods'; do sleep 0.1; done"
done >"$TMPDIR/commands"
cd "$TMPDIR"
userspace-proxy lab -- bash -v commands 2>&1 &
lab=$!
code=0
wait "$lab" || code=$?
lab=
exit "$code"
