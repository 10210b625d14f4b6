#!/bin/bash
# Checks --cluster=slurm against a real Slurm of one machine, which it starts and stops.
#
#     tests/slurm/check.sh [python]        # from the repository's root; a few minutes on two cores
#
# Needs root, the packages slurm-wlm and munge of Debian or Ubuntu (apt-get install slurm-wlm munge), and the
# ports 16817 and 16818. It neither reads nor changes a Slurm that is installed already: the configuration, key,
# socket, state and logs are its own, in a new directory below $TMPDIR, which is removed when all is well. No
# systemd and no control groups are needed, so it runs in a container, too.
set -euo pipefail
PYTHON=$(realpath -s "${1:-.venv/bin/python}")
cd "$(dirname "$0")/../.."

for command in munged slurmctld slurmd sbatch; do
    command -v $command > /dev/null || { echo "no $command: apt-get install slurm-wlm munge"; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "slurmd needs root"; exit 2; }

DIR=$(mktemp -d --tmpdir slurm-check.XXXXXX)
NODE=$(hostname -s)
mkdir "$DIR/state" "$DIR/spool"
dd if=/dev/urandom of="$DIR/munge.key" bs=1024 count=1 status=none
chmod 600 "$DIR/munge.key"
chmod 755 "$DIR"
# What is in the high partition preempts what is in the low one: SIGTERM, and SIGKILL after the time of grace.
cat > "$DIR/slurm.conf" <<END
ClusterName=check
SlurmctldHost=$NODE(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
# What is queued again waits until its credentials have expired, after 120 seconds by default.
AuthInfo=socket=$DIR/munge.socket,cred_expire=20
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$NODE Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=$NODE PriorityTier=2
END
export SLURM_CONF=$DIR/slurm.conf

daemons=()
stop() {
    status=$?
    scancel --me 2> /dev/null || true
    # Without slurmd the jobs would go on; it kills them half a minute after SIGTERM at the latest.
    for _ in $(seq 60); do [ -z "$(squeue --me --noheader 2> /dev/null)" ] && break; sleep 1; done
    for ((n = ${#daemons[@]} - 1; n >= 0; n--)); do
        kill "${daemons[n]}" 2> /dev/null || true
        wait "${daemons[n]}" 2> /dev/null || true
    done
    if [ $status = 0 ]; then rm -rf "$DIR"; else echo "failed; what there is lies in $DIR"; fi
}
trap stop EXIT

munged --foreground --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munge.pid" \
    --log-file="$DIR/munge.log" --seed-file="$DIR/munge.seed" > "$DIR/munge.out" 2>&1 &
daemons+=($!)
for _ in $(seq 50); do [ -S "$DIR/munge.socket" ] && break; sleep 0.1; done
slurmctld -D > "$DIR/slurmctld.out" 2>&1 &
daemons+=($!)
slurmd -D -N "$NODE" > "$DIR/slurmd.out" 2>&1 &
daemons+=($!)
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%T --partition=low 2> /dev/null)" = idle ] && break
    sleep 1
done
sinfo

"$PYTHON" -m tests.slurm.check_study "$DIR/study"
