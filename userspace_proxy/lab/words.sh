#!/bin/sh
# What each word of the lab's shell does. The lab links every word in /run/lab/bin to this script.
set -u
. /run/lab/paths # PYTHON, PACKAGE and OWN_PATH, which has none of these words
word=${0##*/}

proxy() { exec "$PYTHON" -P -m userspace_proxy "$@"; }
lab() { exec "$PYTHON" -S -E "$PACKAGE/word.py" "$@"; }
node() { exec ip netns exec node "$@"; }

case $word in
  get | describe) # options before the kind go behind it
    left=$#
    while [ "$left" -gt 1 ]; do
      case $1 in
        -n | --namespace | -o | --output | -l | --selector)
          option=$1 value=$2 && shift 2 && set -- "$@" "$option" "$value" && left=$((left - 2))
          ;;
        -*) option=$1 && shift && set -- "$@" "$option" && left=$((left - 1)) ;;
        *) break ;;
      esac
    done
    ;;
esac
case $word-${1:-} in
  get-*/* | describe-*/*) # KIND/NAME
    kind=${1%%/*} name=${1#*/}
    shift
    set -- "$kind" "$name" "$@"
    ;;
esac
case $word in
  node) node "$@" ;;
  nft | iptables | iptables-save | ip6tables | ip6tables-save | conntrack | ipvsadm)
    PATH=$OWN_PATH
    node "$word" "$@"
    ;;
  userspace-proxy) proxy "$@" ;;
  why | check) proxy "$word" "$@" ;;
  describe)
    case ${1:-} in
      svc | service* | -*) proxy describe "$@" ;;
      ep | endpoint*)
        shift
        proxy get endpoints "$@"
        ;;
      *) lab get "$@" -o yaml --describe ;;
    esac
    ;;
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
    kinds=${1:-}
    [ "$kinds" != all ] || kinds=pods,services,deployments
    case $kinds in
      *,*)
        shift
        for kind in $(echo "$kinds" | tr , ' '); do "$0" "$kind" "$@"; done
        ;;
      ep | endpoint*)
        of=$(echo "$*" | sed -n 's/.*service-name=\([-a-z0-9]*\).*/\1/p')
        [ -z "$of" ] || set -- endpoints "$of"
        [ "$kinds" != endpointslices ] || { shift && set -- endpoints "$@"; }
        proxy get "$@"
        ;;
      svc | service* | conn*) proxy get "$@" ;;
      *) lab get "$@" ;;
    esac
    ;;
  apply | delete)
    case " $* " in
      *" -f - "*) # by the sum of the text, so that it can be deleted in the same way
        cat >/run/lab/stdin
        file=/run/lab/stdin-$(cksum </run/lab/stdin | tr ' ' -).yaml
        mv /run/lab/stdin "$file"
        lab "$word" -f "$file"
        ;;
    esac
    lab "$word" "$@"
    ;;
  nslookup) # of machines that have none
    getent ahostsv4 "$1" |
      awk 'NR == 1 { print "Name: " $3 } !seen[$1]++ { print "Address: " $1 } END { exit NR == 0 }'
    ;;
  exec)
    pod=$("$PYTHON" -S -E "$PACKAGE/word.py" exec "$@") || exit 1
    until [ "$1" = -- ]; do shift; done
    shift
    exec ip netns exec "$pod" "$@"
    ;;
  kubectl)
    case ${1:-} in
      -n | --namespace)
        in=$2 && shift 2
        case ${1:-} in exec) shift && set -- exec -n "$in" "$@" ;; *) set -- "$@" -n "$in" ;; esac
        ;;
    esac
    word=${1:-lab-help}
    [ $# = 0 ] || shift
    case $word-${1:-} in
      rollout-restart) word=restart && shift ;;
      rollout-status) echo "successfully rolled out: restart and scale return when it is done" && exit ;;
    esac
    if ! [ -x "/run/lab/bin/$word" ]; then
      echo "kubectl $word: the lab has no such word; see lab-help, and docs/how-to/lab.md for what to do instead" >&2
      exit 1
    fi
    exec "/run/lab/bin/$word" "$@"
    ;;
  *) lab "$word" "$@" ;;
esac
