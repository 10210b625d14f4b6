# Starts a Slurm of its own and stops it at the end; sourced by check.sh and check_hosts.sh, which say in HOSTS and
# ADDRESSES what its machines are, in `on` how to run a command on one of them, and in MORE what else to configure.
#
# Needs root and the packages slurm-wlm and munge of Debian or Ubuntu (apt-get install slurm-wlm munge). It neither
# reads nor changes a Slurm that is installed already: the configuration, key, socket, state and logs are its own,
# in a new directory below $TMPDIR, which is removed when all is well. No systemd and no control groups are needed,
# so it runs in a container, too.

for command in munged slurmctld slurmd sbatch; do
    command -v $command > /dev/null || { echo "no $command: apt-get install slurm-wlm munge"; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "slurmd needs root"; exit 2; }

DIR=$(mktemp -d --tmpdir slurm-check.XXXXXX)
mkdir "$DIR/state" "$DIR/spool"
dd if=/dev/urandom of="$DIR/munge.key" bs=1024 count=1 status=none
chmod 600 "$DIR/munge.key"
chmod 755 "$DIR"
cat > "$DIR/slurm.conf" <<END
ClusterName=check
SlurmctldHost=${HOSTS[0]}(${ADDRESSES[0]})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
# What is queued again waits until its credentials have expired, after 120 seconds by default.
AuthInfo=socket=$DIR/munge.socket,cred_expire=20
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
$(for n in "${!HOSTS[@]}"; do
    echo "NodeName=${HOSTS[n]} NodeAddr=${ADDRESSES[n]} CPUs=2 State=UNKNOWN"
done)
$MORE
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
    remove_hosts
    if [ $status = 0 ]; then rm -rf "$DIR"; else echo "failed; what there is lies in $DIR"; fi
}
remove_hosts() { :; }
trap stop EXIT

start_slurm() {
    munged --foreground --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munge.pid" \
        --log-file="$DIR/munge.log" --seed-file="$DIR/munge.seed" > "$DIR/munge.out" 2>&1 &
    daemons+=($!)
    for _ in $(seq 50); do [ -S "$DIR/munge.socket" ] && break; sleep 0.1; done
    on "${HOSTS[0]}" slurmctld -D > "$DIR/slurmctld.out" 2>&1 &
    daemons+=($!)
    for host in "${HOSTS[@]}"; do
        on "$host" slurmd -D -N "$host" > "$DIR/slurmd.$host.out" 2>&1 &
        daemons+=($!)
    done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format='%T %D' --partition=low 2> /dev/null)" = "idle ${#HOSTS[@]}" ] && break
        sleep 1
    done
    sinfo
}
