#!/bin/sh
# What each word of the lab's shell does. The lab links every word in /run/lab/bin to this script.
set -u
. /run/lab/paths # PYTHON, PACKAGE and OWN_PATH, which has none of these words
word=${0##*/}

proxy() { exec "$PYTHON" -P -m userspace_proxy "$@"; }
lab() { exec "$PYTHON" -S -E "$PACKAGE/word.py" "$@"; }
node() { exec ip netns exec node "$@"; }

case $word in
  node) node "$@" ;;
  nft | iptables | iptables-save | ip6tables | ip6tables-save | conntrack | ipvsadm)
    PATH=$OWN_PATH
    node "$word" "$@"
    ;;
  userspace-proxy) proxy "$@" ;;
  describe | why | check) proxy "$word" "$@" ;;
  port-forward) proxy forward -f /run/lab/manifests "$@" ;;
  render)
    node "$PYTHON" -P -m userspace_proxy render --proxy-mode "$(cat /run/lab/mode)" --state-dir /run/lab/state \
      /run/lab/manifests "$@"
    ;;
  trace)
    case " $* " in *" --wait "* | *" --from"*) ;; *) set -- --from-pod client "$@" ;; esac
    node "$PYTHON" -P -m userspace_proxy trace "$@"
    ;;
  lookup) exec "$PYTHON" -P -m dnslib.client --server 10.96.0.10:53 --short "$@" ;;
  access-log) exec tail /run/lab/access.log "$@" ;;
  proxy-log) exec tail /run/lab/proxy.log "$@" ;;
  lab-help) exec cat "$PACKAGE/help.txt" ;;
  get)
    case ${1:-} in svc | service* | ep | endpoint* | conn*) proxy get "$@" ;; *) lab get "$@" ;; esac
    ;;
  exec)
    pod=$("$PYTHON" -S -E "$PACKAGE/word.py" exec "$@") || exit 1
    until [ "$1" = -- ]; do shift; done
    shift
    exec ip netns exec "$pod" "$@"
    ;;
  kubectl)
    word=${1:-lab-help}
    [ $# = 0 ] || shift
    [ "$word" != rollout ] || { word=$1 && shift; }
    [ -x "/run/lab/bin/$word" ] || { echo "kubectl $word: the lab has no such word; see lab-help" >&2 && exit 1; }
    exec "/run/lab/bin/$word" "$@"
    ;;
  *) lab "$word" "$@" ;;
esac
