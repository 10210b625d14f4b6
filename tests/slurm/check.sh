#!/bin/bash
# Checks --cluster=slurm against a real Slurm of one machine, which it starts and stops (see daemons.sh).
#
#     tests/slurm/check.sh [python]        # from the repository's root; a few minutes on two cores
#
# Needs the ports 16817 and 16818.
set -euo pipefail
PYTHON=$(realpath -s "${1:-.venv/bin/python}")
cd "$(dirname "$0")/../.."

HOSTS=("$(hostname -s)")
ADDRESSES=(127.0.0.1)
on() { exec "${@:2}"; }
# What is in the high partition preempts what is in the low one: SIGTERM, and SIGKILL after the time of grace.
MORE="
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=2"
source tests/slurm/daemons.sh
start_slurm
"$PYTHON" -m tests.slurm.check_study "$DIR/study"
