#!/bin/sh
# Send ten requests a second to the Service, each on a new connection. After every 30, print which backends answered.
set -u
trap 'exit 0' TERM INT

# As the network of a cluster does: packets to cluster IPs, and to cluster DNS, go by way of a node on which the proxy
# runs. Its name ends with a dot, so that cluster DNS is not asked for it.
set_route() {
  address=$(getent hosts "$PROXY." | awk '{print $1; exit}')
  [ -z "$address" ] || ip route replace "$SERVICE_RANGE" via "$address"
}

failed=0
set_route
while true; do
  answers=''
  for _ in $(seq 30); do
    if answer=$(curl --silent --show-error --fail --max-time 2 --write-out '%{time_total}' http://web); then
      answers="$answers
$(echo $answer)"
    else
      failed=$((failed + 1))
      set_route  # the proxy's container may have another address now
    fi
    sleep 0.1
  done
  counts=$(echo "$answers" | awk 'NF == 2 {print $1}' | sort | uniq -c | awk '{printf "%s %d, ", $2, $1}')
  slowest=$(echo "$answers" | awk 'NF == 2 && $2 > most {most = $2} END {printf "%d", 1000 * most}')
  echo "answered: ${counts:-none, }slowest ${slowest} ms; failed since the start: $failed"
done
