"""Runs a study as jobs of a cluster, through submitit: each unfinished run is one job.

A job is one run, not a group of runs that share a compilation. So all runs can train at once, `--time` and
the GPUs apply to one run, and a preempted job resumes from one checkpoint. It costs a compilation per run.

    runs/<run>/           as without a cluster; result.json means that the run has ended
    jobs/<run>/<id>_...   submitit's files for each job: script, pickle and logs

A job gets the run's directory and reads config.json from it; no config is pickled. Its files show whether it
has ended, and the queue whether it has died: sacct, which submitit would ask, is not on every cluster.
"""

import contextlib
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

import psutil
import submitit
from submitit.core import utils as submitit_utils
from submitit.helpers import Checkpointable

from cnn_cases import checks, saved_runs, stopping
from cnn_cases.studies import jobs
from cnn_cases.training import logbook, loop, processes, runtime

COMMANDS = {"slurm": ("sbatch", "srun", "squeue", "scontrol"), "local": ()}
MAX_TIMEOUTS = 100  # per run, which resumes from a checkpoint after each
LEAST_MINUTES = 3  # Slurm warns 90 seconds before the end

_POLL_SECONDS = 1  # between two checks of the files
_QUEUE_SECONDS = {"slurm": 15, "local": 1}  # between two queries of the queue, which all users share

# A local job of submitit holds its process, which Python needs to be referenced as long as it runs.
_submitted = []


class Cluster(NamedTuple):
    """Where runs are submitted, and the resources of each run. None leaves the choice to the cluster.

    `time` is a limit in minutes, or as hh:mm; a run that reaches it is saved and queued again.
    """

    name: str
    partition: str | None = None
    time: str = "1:00"
    gpus_per_run: int | None = None
    cpus_per_run: int | None = None


def check(cluster, workdir):
    """Raises ValueError unless runs below a directory can be submitted from this machine; creates nothing."""
    if "%" in str(pathlib.Path(workdir).absolute()):
        raise ValueError(
            f"workdir = {workdir}: its path must not have a %, which a cluster takes for a placeholder"
        )
    checks.one_of("cluster", cluster.name, COMMANDS)
    missing = [command for command in COMMANDS[cluster.name] if shutil.which(command) is None]
    if missing:
        raise ValueError(
            f"cluster = {cluster.name!r} needs {', '.join(COMMANDS[cluster.name])}, and this machine has no "
            f"{', '.join(missing)}; start the study on a machine of the cluster, or without --cluster"
        )
    if cluster.name == "local" and cluster.partition is not None:
        raise ValueError(f"partition = {cluster.partition!r}: cluster = 'local' has no partitions")
    for key, least in (("gpus_per_run", 0), ("cpus_per_run", 1)):
        value = getattr(cluster, key)
        if value is not None and value < least:
            raise ValueError(f"{key} = {value} must be {least} or more")
    if cluster.name == "local" and cluster.gpus_per_run is not None:
        raise ValueError(
            f"gpus_per_run = {cluster.gpus_per_run}: the runs of cluster = 'local' share all GPUs that this "
            "process sees"
        )
    _minutes(cluster.time)


def _minutes(text):
    """Minutes of "90" or "1:30"; raises ValueError for other texts and for less time than a run needs."""
    match = re.fullmatch(r"(?:(\d+):(?=[0-5]\d$))?(\d+)", text)
    minutes = 60 * int(match[1] or 0) + int(match[2]) if match else 0
    if minutes < LEAST_MINUTES:
        raise ValueError(
            f"time = {text!r} must be minutes or hh:mm, and {LEAST_MINUTES} minutes or more: "
            "the last 90 seconds are for saving"
        )
    return minutes


def run_on_cluster(runs, workdir, cluster):
    """Submits the runs that are neither finished nor under way, then waits for all; see `jobs.run_here`.

    A signal ends the waiting but not the jobs; the next call waits for them again. A run whose job failed is
    reported like any other run, and the next call submits it again.

    Args:
      runs: from `plan.expand`.
      workdir: the study's directory, which all machines of the cluster must see.
      cluster: a `Cluster` that has passed `check`.

    Raises:
      ChildProcessError: jobs failed; raised after all other jobs have ended.
      InterruptedRun: SIGTERM, SIGINT or SIGUSR2 arrived.
    """
    workdir = pathlib.Path(workdir).absolute()
    run_dirs = {run.name: workdir / "runs" / run.name for run in runs}
    folders = {run.name: workdir / "jobs" / run.name for run in runs}
    with stopping.stop_signals() as stop:
        waiting, failed = {}, []
        before = {name: _newest_job(folder) for name, folder in folders.items()}
        alive = _alive(cluster.name, [paths for paths in before.values() if paths])
        # Read before submitting, since a result may be damaged, and after listing, since a job may just end.
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
                    failed.append(run.name)  # for example, the cluster limits the number of jobs
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
            f"{signal.Signals(stop.number).name}: {len(told)} jobs keep running; start again to wait for "
            f"them, or end them: {end} {' '.join(told.values())}",
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
        # srun does not inherit this from its job.
        slurm_srun_args=[f"--cpus-per-task={cpus}"] if cpus else None,
    )
    # A local job inherits the mask, so like a Slurm job it survives Ctrl-C and the end of the terminal.
    with stopping.blocked(signal.SIGINT, signal.SIGHUP), _outside_of_a_job():
        try:
            job = executor.submit(Training(), str(run_dir), os.environ.get("CUDA_VISIBLE_DEVICES"))
        except submitit_utils.FailedJobError as error:
            raise ValueError(f"{run_dir.name} could not be submitted: {str(error).strip()}") from error
    _submitted.append(job)
    return job.paths


@contextlib.contextmanager
def _outside_of_a_job():
    """Hides the Slurm job in which this command may run: sbatch would pass its variables on to srun.

    What tells Slurm's commands where their cluster is, and who asks, stays.
    """
    kept = {"SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT"}
    hidden = {name for name in os.environ if name.startswith("SLURM_")} - kept
    hidden = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(hidden)


class Training(Checkpointable):
    """The work of a job: trains one run, or resumes it.

    SIGUSR2 comes when the time is nearly over and, on some clusters, when a job is preempted; submitit would
    queue the job again at once. During training the loop gets the signal, and submitit once all is saved.
    SIGTERM comes when a job is cancelled, which ends it, but also when it is preempted with a grace period.
    """

    def __call__(self, run_dir, visible_gpus=None):
        """Trains a run.

        Args:
          run_dir: its directory, with a config.json.
          visible_gpus: for a local job, CUDA_VISIBLE_DEVICES where it was submitted; None if it was not set.
        """
        # submitit hides all GPUs of a local job, and JAX looks for them later.
        if os.environ["SUBMITIT_EXECUTOR"] == "local":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if visible_gpus is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's handler, which does not return

        def end(number, _=None):
            # Slurm sends another SIGTERM when it is asked to queue the job again.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if number == signal.SIGUSR2 or _is_preempted():
                queue_again(signal.SIGUSR2, None)
            sys.exit(128 + number)

        signal.signal(signal.SIGTERM, end)  # before and after training; submitit would ignore it
        runtime.separate_compilation_cache()
        try:
            loop.train_and_evaluate(saved_runs.load_config(run_dir), run_dir)
        except loop.DivergedError as error:
            processes.tell(error)  # result.json says so too; the job has not failed
        except stopping.InterruptedRun as interruption:
            processes.tell(interruption)
            end(interruption.signal_number)


def _is_preempted():
    """Whether Slurm still lists this job, which got SIGTERM, as running.

    It does in the grace period before a preemption; a job that ends by itself in that period is not queued
    again. A job that is cancelled, or that Slurm queues again, already has another state.
    """
    if os.environ["SUBMITIT_EXECUTOR"] != "slurm":
        return False
    squeue = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    return subprocess.run(squeue, capture_output=True, text=True).stdout.strip() == "RUNNING"


def _newest_job(folder):
    """The paths of the last job submitted for a run, or None."""
    # While a job is being queued again, its pickle briefly has a longer name.
    pickles = sorted(folder.glob("*_submitted.pkl*"), key=_time_of)
    return submitit_utils.JobPaths(folder, pickles[-1].name.split("_")[0]) if pickles else None


def _time_of(path):
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # just renamed
        return math.inf


def _alive(name, all_paths):
    """The ids of the jobs that are queued or running."""
    ids = {paths.job_id for paths in all_paths}
    if not ids:
        return ids
    if name == "slurm":
        squeue = ["squeue", "--me", "--noheader", "--format=%A"]
        queue = subprocess.run(squeue, capture_output=True, text=True)
        # If the queue cannot be queried right now, the jobs are assumed to be in it.
        return ids if queue.returncode else ids & set(queue.stdout.split())
    return {paths.job_id for paths in all_paths if _runs_here(paths)}


def _runs_here(paths):
    """Whether the process of a local job runs; by now its id may belong to another process."""
    try:
        return psutil.Process(int(paths.job_id)).cmdline()[-1:] == [str(paths.folder)]
    except psutil.Error:  # there is none, or it has ended, or belongs to another user
        return False


def _ended(waiting, cluster_name, stop):
    """Yields the names of runs as their jobs end, until none is left or a signal has arrived."""
    left, missed, asked = dict(waiting), set(), time.monotonic()
    while left and not stop.number:
        time.sleep(_POLL_SECONDS)
        ended = {name for name, paths in left.items() if paths.result_pickle.exists()}
        if time.monotonic() - asked >= _QUEUE_SECONDS[cluster_name]:
            alive = _alive(cluster_name, left.values())
            gone = {name for name, paths in left.items() if paths.job_id not in alive}
            ended |= gone & missed  # missing twice: files may arrive late over the network
            missed, asked = gone, time.monotonic()
        for name in sorted(ended):
            del left[name]
            yield name


def _last_words(paths):
    """The last line of a failed job's exception, or else of its log."""
    lines = []
    if paths.result_pickle.exists():
        outcome, trace = submitit_utils.pickle_load(paths.result_pickle)
        lines = trace.splitlines() if outcome == "error" else []
    elif paths.stderr.exists():
        lines = paths.stderr.read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    # srun writes last and only repeats that the job has failed.
    return ([line for line in said if not line.startswith("srun: ")] or said or ["no output"])[-1]
