#!/bin/sh
# Asks the Service for its name, again and again, a new connection each time; says after every 30 who answered.
set -eu
trap 'exit 0' TERM INT

# What the network of a cluster does: packets to cluster IPs go by way of a node on which the proxy runs.
ip route replace "$SERVICE_RANGE" via "$PROXY"

failed=0
while true; do
  names=''
  for _ in $(seq 30); do
    if name=$(curl --silent --show-error --fail --max-time 5 "http://$CLUSTER_IP/"); then
      names="$names $name"
    else
      failed=$((failed + 1))
    fi
    sleep 0.1
  done
  counts=$(printf '%s\n' $names | sort | uniq -c | awk 'NF == 2 {printf "%s %d, ", $2, $1}')
  echo "answered: ${counts:-nobody, }failed since the start: $failed"
done
