#!/bin/bash
# Checks a run on two machines against a real Slurm, which it starts and stops (see daemons.sh).
#
#     tests/slurm/check_hosts.sh [python]        # from the repository's root; a quarter of an hour on two cores
#
# The machines, alpha and beta, have a network interface, an address and a name of their own, as Linux's network
# namespaces provide, but share the cores, the memory and the disk of this one. Needs the package iproute2, the
# addresses 10.77.0.*, and a kernel that lets root make namespaces.
set -euo pipefail
PYTHON=$(realpath -s "${1:-.venv/bin/python}")
cd "$(dirname "$0")/../.."
command -v ip > /dev/null || { echo "no ip: apt-get install iproute2"; exit 2; }

HOSTS=(alpha beta)
ADDRESSES=(10.77.0.1 10.77.0.2)
on() { exec nsenter --net="/run/netns/$1" unshare --uts --mount tests/slurm/as_host.sh "$DIR/hosts" "$@"; }
# A machine that is silent for half a minute is taken for dead, and its jobs are requeued.
MORE="
SlurmdTimeout=30
PartitionName=low Nodes=ALL Default=YES"
source tests/slurm/daemons.sh
remove_hosts() {
    for host in "${HOSTS[@]}"; do ip netns delete "$host" 2> /dev/null || true; done
    ip link delete check-bridge 2> /dev/null || true
}
ip link add check-bridge type bridge
ip address add 10.77.0.254/24 dev check-bridge
ip link set check-bridge up
echo "127.0.0.1 localhost" > "$DIR/hosts"
for n in 0 1; do
    host=${HOSTS[n]}
    ip netns add "$host"
    ip link add "to-$host" type veth peer name eth0 netns "$host"
    ip link set "to-$host" master check-bridge up
    ip -n "$host" address add "${ADDRESSES[n]}/24" dev eth0
    ip -n "$host" link set eth0 up
    ip -n "$host" link set lo up
    echo "${ADDRESSES[n]} $host" >> "$DIR/hosts"
done
start_slurm
"$PYTHON" -m tests.slurm.check_hosts "$DIR/hosts-run"
