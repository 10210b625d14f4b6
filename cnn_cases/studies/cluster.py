"""The runs of a study as jobs of a cluster, through submitit: each run that is not finished is one job.

One run a job, not one group that shares a compilation: all runs can train at once, `--time` and the GPUs are
those of one run, and a job that is preempted has one checkpoint to go on from. It costs a compilation a run.

    runs/<run>/           as ever; result.json says that the run has ended
    jobs/<run>/<id>_...   what submitit keeps of each job: its script, its pickle, its logs

A job is told the run's directory and reads config.json there; no config is pickled. Its end is seen by its
files, its death by its absence from the queue: sacct, which submitit would ask, is not on every cluster.
"""

import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import submitit
from submitit.core import utils as submitit_utils
from submitit.helpers import Checkpointable

from cnn_cases import checks, command, saved_runs
from cnn_cases.studies import jobs
from cnn_cases.training import logbook, loop, processes, stopping

COMMANDS = {"slurm": ("sbatch", "srun", "squeue", "scontrol"), "local": ("ps",)}
MAX_TIMEOUTS = 100  # of one run, each of which goes on from a checkpoint
LEAST_MINUTES = 3  # Slurm warns 90 seconds before the end

_POLL_SECONDS = 1  # between two looks at the files
_QUEUE_SECONDS = {"slurm": 15, "local": 1}  # between two looks at the queue, which all users share

# submitit's jobs hold the processes of the local ones, which Python wants held as long as they run.
_submitted = []


class Cluster(NamedTuple):
    """Where runs are submitted to, and what each of them gets. None leaves it to the cluster.

    `time` is a limit in minutes, or as hh:mm; a run that reaches it is saved and queued again.
    """

    name: str
    partition: str | None = None
    time: str = "1:00"
    gpus_per_run: int | None = None
    cpus_per_run: int | None = None


def check(cluster, workdir):
    """Raises ValueError unless runs below a directory can be submitted from here; creates nothing."""
    if "%" in str(pathlib.Path(workdir).absolute()):
        raise ValueError(f"workdir = {workdir}: a cluster takes the % for a place where something is put in")
    checks.one_of("cluster", cluster.name, COMMANDS)
    missing = [command for command in COMMANDS[cluster.name] if shutil.which(command) is None]
    if missing:
        raise ValueError(
            f"cluster = {cluster.name!r} needs {', '.join(COMMANDS[cluster.name])}, and this machine has no "
            f"{', '.join(missing)}; start the study on a machine of the cluster, or without --cluster"
        )
    if cluster.name == "local" and cluster.partition is not None:
        raise ValueError(f"partition = {cluster.partition!r}: cluster = 'local' has no partitions")
    for key in ("gpus_per_run", "cpus_per_run"):
        value, least = getattr(cluster, key), int(key == "cpus_per_run")
        if value is not None and value < least:
            raise ValueError(f"{key} = {value} must be {least} or more")
    _minutes(cluster.time)


def _minutes(text):
    """Minutes of "90" or "1:30"; raises ValueError for others, and for less than a run needs."""
    match = re.fullmatch(r"(?:(\d+):(?=[0-5]\d$))?(\d+)", text)
    minutes = 60 * int(match[1] or 0) + int(match[2]) if match else 0
    if minutes < LEAST_MINUTES:
        raise ValueError(
            f"time = {text!r} must be minutes or hh:mm, and {LEAST_MINUTES} minutes or more: "
            "the last 90 seconds are for saving"
        )
    return minutes


def run_on_cluster(runs, workdir, cluster):
    """Submits the runs that are neither finished nor under way, waits for all; see `jobs.run_here`.

    A signal ends the waiting and not the jobs; the next call waits for them again. A run whose job failed is
    told like the others, and submitted anew by the next call.

    Args:
      runs: of `plan.expand`.
      workdir: the study's directory, which all machines of the cluster must see.
      cluster: a `Cluster` that `check` has passed.

    Raises:
      ChildProcessError: jobs failed; raised after all the others have ended.
      InterruptedRun: SIGTERM, SIGINT or SIGUSR2 came.
    """
    workdir = pathlib.Path(workdir).absolute()
    run_dirs = {run.name: workdir / "runs" / run.name for run in runs}
    folders = {run.name: workdir / "jobs" / run.name for run in runs}
    with stopping.stop_signals() as stop:
        waiting, failed = {}, []
        before = {name: _newest_job(folder) for name, folder in folders.items()}
        alive = _alive(cluster.name, [paths for paths in before.values() if paths])
        # Before anything is submitted, for a result may be damaged; and after the jobs, which may just end.
        results = {name: logbook.read_result(run_dir) for name, run_dir in run_dirs.items()}
        for run in runs:
            if stop.number:
                break
            if result := results[run.name]:
                yield run.name, jobs.format_outcome(result, finished_before=True)
            elif (paths := before[run.name]) and paths.job_id in alive and not paths.result_pickle.exists():
                waiting[run.name] = paths
            else:
                logbook.claim(run_dirs[run.name], run.config.to_dict())
                try:
                    waiting[run.name] = _submit(run_dirs[run.name], folders[run.name], cluster)
                except ValueError as error:
                    if not waiting:
                        raise
                    failed.append(run.name)  # as a cluster takes so many jobs at a time
                    yield run.name, f"failed: {error}"
        told = {name: paths.job_id for name, paths in waiting.items()}
        if told:
            again = sum(before[name] is paths for name, paths in waiting.items())
            processes.tell(
                f"{len(told) - again} jobs submitted to {cluster.name}, {again} under way before: "
                f"{' '.join(told.values())}; their logs are in {workdir / 'jobs'}"
            )
        for name in _ended(waiting, cluster.name, stop):
            result = logbook.read_result(run_dirs[name])
            if result is None:
                failed.append(name)
                yield name, f"failed: {_last_words(waiting[name])} ({waiting[name].stderr})"
            else:
                yield name, jobs.format_outcome(result)
            del told[name]
    if stop.number:
        end = {"slurm": "scancel", "local": "kill"}[cluster.name]
        raise stopping.InterruptedRun(
            f"{signal.Signals(stop.number).name}: {len(told)} jobs go on; start again to wait for them, or "
            f"end them: {end} {' '.join(told.values())}",
            stop.number,
        )
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; "
            "start again to submit them once more"
        )


def _submit(run_dir, folder, cluster):
    """Submits a run; returns the paths of its job."""
    executor = submitit.AutoExecutor(
        folder, cluster=cluster.name, slurm_max_num_timeout=MAX_TIMEOUTS, local_max_num_timeout=MAX_TIMEOUTS
    )
    cpus = cluster.cpus_per_run
    executor.update_parameters(
        name=run_dir.name,
        timeout_min=_minutes(cluster.time),
        gpus_per_node=cluster.gpus_per_run,
        cpus_per_task=cpus,
        slurm_partition=cluster.partition,
        slurm_additional_parameters={"requeue": True},
        # srun does not take this over from the job that it runs in.
        slurm_srun_args=[f"--cpus-per-task={cpus}"] if cpus else None,
    )
    # A local job inherits the mask, and so outlives the terminal and its Ctrl-C as one of Slurm does.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        job = executor.submit(Training(), str(run_dir))
    except submitit_utils.FailedJobError as error:
        raise ValueError(f"{run_dir.name} could not be submitted: {str(error).strip()}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _submitted.append(job)
    return job.paths


class Training(Checkpointable):
    """What a job does: it trains one run, or goes on with it.

    SIGUSR2 comes when the time is nearly over and, on some clusters, when a job is preempted; submitit would
    queue the job again at once. During the training the loop gets the signal, and submitit when all is saved.
    SIGTERM comes when a job is cancelled, which ends it, but also when it is preempted with a time of grace.
    """

    def __call__(self, run_dir):
        """Trains the run of a directory with a config.json."""
        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's; it does not return

        def end(number, _=None):
            # Slurm's answer to being asked to queue the job again is one more.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if number == signal.SIGUSR2 or _is_preempted():
                queue_again(signal.SIGUSR2, None)
            sys.exit(128 + number)

        signal.signal(signal.SIGTERM, end)  # before and after the training; submitit would ignore it
        command.separate_compilation_cache()
        try:
            loop.train_and_evaluate(saved_runs.load_config(run_dir), run_dir)
        except loop.DivergedError as error:
            processes.tell(error)  # result.json says so, too: no failure of the job
        except stopping.InterruptedRun as interruption:
            processes.tell(interruption)
            end(interruption.signal_number)


def _is_preempted():
    """Whether Slurm takes this job, which got SIGTERM, for running.

    It does in the time of grace before a preemption, and a job that ends by itself then is not queued again.
    One that is cancelled, or that Slurm queues again, has another state by now.
    """
    if os.environ["SUBMITIT_EXECUTOR"] != "slurm":
        return False
    squeue = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    return subprocess.run(squeue, capture_output=True, text=True).stdout.strip() == "RUNNING"


def _newest_job(folder):
    """The paths of the last job that was submitted for a run; None where there was none."""
    # While a job is queued again, its pickle has a longer name for a moment.
    pickles = sorted(folder.glob("*_submitted.pkl*"), key=_time_of)
    return submitit_utils.JobPaths(folder, pickles[-1].name.split("_")[0]) if pickles else None


def _time_of(path):
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it has its other name by now
        return math.inf


def _alive(name, all_paths):
    """The ids of the jobs that wait or run."""
    ids = {paths.job_id for paths in all_paths}
    if not ids:
        return ids
    if name == "slurm":
        squeue = ["squeue", "--me", "--noheader", "--format=%A"]
        queue = subprocess.run(squeue, capture_output=True, text=True)
        # Where the queue cannot be asked right now, the jobs are taken to be there.
        return ids if queue.returncode else ids & set(queue.stdout.split())
    ps = ["ps", "-ww", "-o", "pid=,args=", "-p", ",".join(sorted(ids))]
    letters = os.environ | {"LC_ALL": "C.UTF-8"}  # in another locale it leaves some of a path out
    listing = subprocess.run(ps, capture_output=True, text=True, env=letters).stdout
    commands = dict(line.split(maxsplit=1) for line in listing.splitlines())
    # By now the number may be that of some other process.
    return {paths.job_id for paths in all_paths if commands.get(paths.job_id, "").endswith(str(paths.folder))}


def _ended(waiting, cluster_name, stop):
    """Yields the names of the runs whose jobs end, until none is left or a signal has come."""
    left, missed, asked = dict(waiting), set(), time.monotonic()
    while left and not stop.number:
        time.sleep(_POLL_SECONDS)
        ended = {name for name, paths in left.items() if paths.result_pickle.exists()}
        if time.monotonic() - asked >= _QUEUE_SECONDS[cluster_name]:
            alive = _alive(cluster_name, left.values())
            gone = {name for name, paths in left.items() if paths.job_id not in alive}
            ended |= gone & missed  # the second time: files may come late over the network
            missed, asked = gone, time.monotonic()
        for name in sorted(ended):
            del left[name]
            yield name


def _last_words(paths):
    """The last line that a failed job left: of its exception, or else of its log."""
    lines = []
    if paths.result_pickle.exists():
        outcome, trace = submitit_utils.pickle_load(paths.result_pickle)
        lines = trace.splitlines() if outcome == "error" else []
    elif paths.stderr.exists():
        lines = paths.stderr.read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    # srun comes last and only repeats that the job has failed.
    return ([line for line in said if not line.startswith("srun: ")] or said or ["without a word"])[-1]
