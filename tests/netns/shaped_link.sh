#!/usr/bin/env bash
# Train over a slow link, on one machine: two network namespaces, a link of a chosen rate between them, a Ray node in
# each, and a worker on each node. Prints the bytes that crossed the link, and the median step.
#
#   tests/netns/shaped_link.sh [RATE] [CONFIG] [KEY=VALUE ...]     e.g. 100mbit configs/quick.yaml train.tokens=8Ki
#
# Needs root, ip, and tc with tbf; without them it says so and exits with 77, which test harnesses take for skipped.
set -euo pipefail

RATE=${1:-200mbit}
CONFIG=${2:-$(dirname "$0")/../../configs/quick.yaml}
shift $(($# < 2 ? $# : 2))
readonly STEM=sparsetrain$$ HEAD_IP=10.77.0.1 WORKER_IP=10.77.0.2 PORT=6379
folder=$(mktemp -d /tmp/shaped-XXXXXX)

skip() {
  echo "skipped: $*" >&2
  exit 77
}

end() {
  exec 2>/dev/null # bash would report every Ray process that ends here
  for namespace in "$STEM-a" "$STEM-b"; do
    for pid in $(ip netns pids "$namespace"); do
      kill -KILL "$pid" || true # gcs_server ignores anything milder
    done
    ip netns delete "$namespace" || true
  done
  rm -rf "$folder"
}

build_link() {
  ip netns add "$STEM-a" 2>/dev/null || skip "network namespaces cannot be made here (no root?)"
  ip netns add "$STEM-b"
  ip link add veth-a netns "$STEM-a" type veth peer name veth-b netns "$STEM-b" || skip "there are no veth links here"
  local end address
  for end in "a $HEAD_IP" "b $WORKER_IP"; do
    address=${end#* } end=${end% *}
    ip -n "$STEM-$end" address add "$address/24" dev "veth-$end"
    ip -n "$STEM-$end" link set lo up
    ip -n "$STEM-$end" link set "veth-$end" up
    tc -n "$STEM-$end" qdisc add dev "veth-$end" root tbf rate "$RATE" burst 256kb latency 100ms ||
      skip "the kernel cannot shape links (no tbf)"
  done
}

crossed() { # bytes out of both ends
  local total=0 end
  for end in a b; do
    total=$((total + $(ip netns exec "$STEM-$end" cat "/sys/class/net/veth-$end/statistics/tx_bytes")))
  done
  echo "$total"
}

start_ray() { # NAMESPACE ARGUMENTS: in the background, with one CPU
  local namespace=$1
  shift
  ip netns exec "$STEM-$namespace" ray start --block --num-cpus=1 --disable-usage-stats "$@" \
    >"$folder/ray-$namespace.log" 2>&1 &
}

wait_for() { # WHAT COMMAND: repeated until it succeeds
  local what=$1 deadline=$((SECONDS + 60))
  shift
  until "$@" 2>/dev/null; do
    if ((SECONDS > deadline)); then
      echo "$what did not come up:" >&2
      cat "$folder"/ray-*.log >&2
      exit 1
    fi
    sleep 1
  done
}

checkup_sees_both_nodes() {
  ip netns exec "$STEM-a" sparsetrain doctor --cluster --address "$HEAD_IP:$PORT" >"$folder/checkup.txt" &&
    grep --quiet " 2 nodes" "$folder/checkup.txt"
}

for program in ip tc ray sparsetrain; do
  if ! command -v "$program" >/dev/null; then skip "$program is not on the path"; fi
done
trap end EXIT
build_link

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
start_ray a --head --node-ip-address="$HEAD_IP" --port="$PORT" --temp-dir="$folder/ray" --include-dashboard=false
wait_for "the head" ip netns exec "$STEM-a" bash -c "exec 3<>/dev/tcp/$HEAD_IP/$PORT"
start_ray b --address="$HEAD_IP:$PORT" --node-ip-address="$WORKER_IP"
wait_for "the second node" checkup_sees_both_nodes
cat "$folder/checkup.txt"

before=$(crossed)
ip netns exec "$STEM-a" sparsetrain train "$CONFIG" --address "$HEAD_IP:$PORT" "output=$folder/run" \
  cluster.workers=2 cluster.cpus_per_worker=1 "$@"
after=$(crossed)

python - "$folder/run/metrics.jsonl" $((after - before)) "$RATE" <<'EOF'
import json, sys
from statistics import median

path, crossed, rate = sys.argv[1:]
rows = [json.loads(line) for line in open(path)]
print(f"\nlink of {rate}: {int(crossed) / 1e6:.1f} MB crossed it in {len(rows)} steps, Ray's own included")
print(f"median step {1e3 * median(row['step_time_s'] for row in rows):.0f} ms")
EOF
