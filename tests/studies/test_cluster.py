import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from submitit.core.utils import JobPaths

from cnn_cases import stopping
from cnn_cases.studies import cluster, jobs, plan, sweep
from cnn_cases.training import logbook, loop, programs
from tests.studies.conftest import tiny_study

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = cluster.Cluster("local")


def runs_of(data_dir, num_steps=4, checkpoint_every=4):
    study = tiny_study(data_dir, grid=(("optimizer.momentum", (0.0, 0.9)),), seeds=(0,))
    study.base.num_steps = num_steps
    study.base.evaluation.every_steps = 0
    study.base.checkpoint.every_steps = checkpoint_every
    study.base.checkpoint.best_on = ""
    return plan.expand(study)


def metrics(workdir):
    return {path.parent.name: path.read_bytes() for path in workdir.glob("*/metrics.jsonl")}


def run_here(runs, workdir):
    """{name: figures in words} of runs without a cluster, and their metrics."""
    ended = without_seconds(jobs.run_here([[run] for run in runs], workdir))
    return ended, metrics(workdir)


def without_seconds(ended):
    return {name: news.rpartition(" (")[0] for name, news in ended}


def test_a_job_outlives_the_command_and_preemption(data_dir, tmp_path, monkeypatch):
    runs = runs_of(data_dir, num_steps=400, checkpoint_every=20)[1:]
    expected = run_here(runs, tmp_path / "here")
    there = tmp_path / "there"
    folder = there / "jobs" / runs[0].name
    checkpoints = there / "runs" / runs[0].name / "checkpoints"

    def at_first_checkpoint(act):
        def wait():
            while not [*checkpoints.glob("[0-9]*/checksums.json")]:
                time.sleep(0.01)
            act()

        threading.Thread(target=wait, daemon=True).start()

    at_first_checkpoint(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(stopping.InterruptedRun, match=r"SIGINT: 1 jobs keep running; .* end them: kill \d+"):
        list(cluster.run_on_cluster(runs, there, LOCAL))

    # The same command again. It waits for the job, which the cluster interrupts now.
    monkeypatch.setattr(cluster, "_submit", pytest.fail)

    def preempt():
        (task,) = psutil.Process(int(cluster._newest_job(folder).job_id)).children()
        task.send_signal(signal.SIGUSR2)

    at_first_checkpoint(preempt)
    assert (without_seconds(cluster.run_on_cluster(runs, there, LOCAL)), metrics(there / "runs")) == expected
    log = next(folder.glob("*.err")).read_text()
    assert "SIGUSR2: saved after step" in log
    assert "resuming after step" in log

    again = list(cluster.run_on_cluster(runs, there, LOCAL))
    assert [(name, "(finished before)" in news) for name, news in again] == [(runs[0].name, True)]


def fake(tmp_path, monkeypatch, **commands):
    """The directory of commands that are found before all others, as lines of shell."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, line in commands.items():
        (directory / name).write_text(f"#!/bin/sh\n{line}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


@pytest.fixture
def queued_again():
    """Stands for a job's process with submitit's handler of SIGUSR2; a list of what that was called with."""
    calls = []

    def queue_again(number, _):
        calls.append(number)
        sys.exit(99)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, queue_again)
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    """A run, its program, and what it leaves in peace."""
    run = runs_of(data_dir, num_steps=12, checkpoint_every=0)[1]
    run.config.evaluation.every_steps = 4
    program = programs.make_program(run.config)
    workdir = tmp_path_factory.mktemp("undisturbed")
    loop.train_and_evaluate(run.config, workdir / run.name, program=program, show_progress=False)
    return run, program, metrics(workdir)


@pytest.mark.parametrize(
    ("number", "state", "code"),
    [
        (signal.SIGUSR2, "RUNNING", 99),
        (signal.SIGTERM, "RUNNING", 99),  # preempted, in the time of grace
        (signal.SIGTERM, "COMPLETING", 143),  # cancelled, or queued again by Slurm
        (signal.SIGTERM, "", 143),  # a local job
    ],
)
def test_a_signal_saves_and_all_but_the_end_queues_again(
    number, state, code, queued_again, undisturbed, tmp_path, monkeypatch
):
    run, program, expected = undisturbed
    monkeypatch.setattr(programs, "make_program", lambda *_: program)  # which is compiled already
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm" if state else "local")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake(tmp_path, monkeypatch, squeue=f"echo {state}")
    run_dir = tmp_path / "there" / run.name
    logbook.claim(run_dir, run.config.to_dict())
    evaluate = programs.evaluate

    def interrupted(program, state, split, **options):
        os.kill(os.getpid(), number)
        return evaluate(program, state, split, **options)

    with monkeypatch.context() as patch:
        patch.setattr(programs, "evaluate", interrupted)
        with pytest.raises(SystemExit) as end:
            cluster.Training()(str(run_dir))
    assert end.value.code == code
    assert queued_again == [signal.SIGUSR2] * (code == 99)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["4"]
    cluster.Training()(str(run_dir))
    assert metrics(tmp_path / "there") == expected


def test_a_diverged_run_is_no_failed_job(data_dir, tmp_path, monkeypatch):
    run = runs_of(data_dir)[0]
    logbook.claim(tmp_path, run.config.to_dict())

    def diverge(*_):
        raise loop.DivergedError("no finite number", 3)

    monkeypatch.setattr(loop, "check_finite", diverge)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    cluster.Training()(str(tmp_path))
    assert jobs.format_outcome(json.loads((tmp_path / "result.json").read_text())) == "diverged at step 3"


@pytest.mark.parametrize(
    ("executor", "there", "seen"),
    [("local", "3,2", "3,2"), ("local", None, None), ("slurm", "3,2", "0")],
)
def test_a_local_job_sees_the_gpus_of_the_command(executor, there, seen, data_dir, tmp_path, monkeypatch):
    logbook.claim(tmp_path, runs_of(data_dir)[0].config.to_dict())
    visible = []

    def look(*_):
        visible.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr(loop, "train_and_evaluate", look)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if executor == "local" else "0")
    cluster.Training()(str(tmp_path), there)
    assert visible == [seen]


def test_a_failed_job_is_named_with_its_log_and_the_others_go_on(data_dir, tmp_path):
    good, bad = runs_of(data_dir)
    bad.config.batch_size = 25
    _, expected = run_here([good], tmp_path / "here")
    ended = []
    with pytest.raises(ChildProcessError, match=f"1 of 2 runs failed: {bad.name}; start again"):
        ended.extend(cluster.run_on_cluster([bad, good], tmp_path / "there", LOCAL))
    ended = dict(ended)
    message, _, log = ended[bad.name].rpartition(" (")
    assert message.startswith("failed: ValueError: batch_size = 25 cannot be split evenly over 4 devices")
    assert "batch_size = 25" in pathlib.Path(log.rstrip(")")).read_text()
    assert "test/error" in ended[good.name]
    assert metrics(tmp_path / "there/runs") == expected


def test_the_last_words_of_a_killed_job_are_those_of_its_log(tmp_path):
    paths = JobPaths(tmp_path, "7")
    assert cluster._last_words(paths) == "no output"
    paths.stderr.write_text("srun: error: task 0: Exited with exit code 137\n")
    assert cluster._last_words(paths) == "srun: error: task 0: Exited with exit code 137"
    paths.stderr.write_text(
        "step 4/12\nslurmstepd: error: Detected 1 oom-kill event\n\nsrun: error: task 0\n"
    )
    assert cluster._last_words(paths) == "slurmstepd: error: Detected 1 oom-kill event"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands in place of Slurm's: sbatch gives the number 7 and keeps the script, squeue knows no job."""
    sbatch = f'cp "$1" {tmp_path}/script; echo Submitted batch job 7'
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "_QUEUE_SECONDS", {"slurm": 0.01})
    return fake(tmp_path, monkeypatch, sbatch=sbatch, squeue="true", srun="exit 1", scontrol="exit 1")


@pytest.mark.usefixtures("slurm")
def test_a_job_asks_for_what_the_flags_say(data_dir, tmp_path):
    there = cluster.Cluster("slurm", partition="gpu", time="1:30", gpus_per_run=2, cpus_per_run=8)
    run = runs_of(data_dir)[0]
    with pytest.raises(ChildProcessError, match="1 of 1 runs failed"):
        list(cluster.run_on_cluster([run], tmp_path / "study", there))  # it is gone from the queue at once
    script = (tmp_path / "script").read_text()
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        f"job-name={run.name}",
        "partition=gpu",
        "time=90",
        "gpus-per-node=2",
        "cpus-per-task=8",
        "requeue",
        "signal=USR2@90",
    }
    assert "--cpus-per-task=8" in next(line for line in script.splitlines() if line.startswith("srun"))
    pickle = (tmp_path / "study" / "jobs" / run.name / "7_submitted.pkl").read_bytes()
    assert len(pickle) < 1000, "a config is pickled"
    assert str(tmp_path / "study" / "runs" / run.name).encode() in pickle


@pytest.mark.usefixtures("slurm")
def test_what_is_not_asked_for_is_left_to_the_cluster(data_dir, tmp_path):
    with pytest.raises(ChildProcessError, match="1 of 1 runs failed"):
        list(cluster.run_on_cluster(runs_of(data_dir)[:1], tmp_path / "study", cluster.Cluster("slurm")))
    script = (tmp_path / "script").read_text()
    assert not any(word in script for word in ("partition", "gpus", "cpus"))
    assert "--time=60\n" in script


def test_a_job_knows_nothing_of_the_job_that_submits_it(slurm, data_dir, tmp_path, monkeypatch):
    (slurm / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/env; echo Submitted batch job 7\n")
    kept = {"SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT", "SBATCH_ACCOUNT"}
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", *kept):
        monkeypatch.setenv(name, "3")
    with pytest.raises(ChildProcessError, match="1 of 1 runs failed"):
        list(cluster.run_on_cluster(runs_of(data_dir)[:1], tmp_path / "study", cluster.Cluster("slurm")))
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SBATCH_"))} == kept
    assert os.environ["SLURM_NTASKS"] == "3"


def test_a_queue_that_cannot_be_asked_does_not_kill_its_jobs(slurm, tmp_path):
    paths = [JobPaths(tmp_path, "7"), JobPaths(tmp_path, "8")]
    (slurm / "squeue").write_text("#!/bin/sh\necho 8\n")
    assert cluster._alive("slurm", paths) == {"8"}
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert cluster._alive("slurm", paths) == {"7", "8"}


def test_a_refused_submission_is_told(slurm, data_dir, tmp_path):
    (slurm / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2\nexit 1\n")
    run = runs_of(data_dir)[0]
    with pytest.raises(
        ValueError, match=f"{run.name} could not be submitted: sbatch: error: invalid partition"
    ):
        list(cluster.run_on_cluster([run], tmp_path / "study", cluster.Cluster("slurm", partition="gpu")))


@pytest.mark.usefixtures("slurm")
def test_where_a_cluster_takes_no_more_jobs_those_under_way_are_waited_for(data_dir, tmp_path, monkeypatch):
    first, second = runs_of(data_dir)
    started = JobPaths(tmp_path, "7")

    def submit(run_dir, *_):
        if run_dir.name == second.name:
            raise ValueError("could not be submitted: limit of jobs")
        logbook.write_result(run_dir, {"status": "diverged", "step": 3, "checkpoint": 0})
        return started

    monkeypatch.setattr(cluster, "_submit", submit)
    monkeypatch.setattr(cluster, "_ended", lambda waiting, *_: list(waiting))
    ended = cluster.run_on_cluster([first, second], tmp_path / "study", cluster.Cluster("slurm"))
    assert next(ended) == (second.name, "failed: could not be submitted: limit of jobs")
    assert next(ended) == (first.name, "diverged at step 3")
    with pytest.raises(ChildProcessError, match=f"1 of 2 runs failed: {second.name}; start again"):
        next(ended)


# Errors.


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (cluster.Cluster("slrum"), "cluster = 'slrum' is unknown; known: slurm, local"),
        (cluster.Cluster("slurm"), "cluster = 'slurm' needs sbatch, .* and this machine has no sbatch, srun"),
        (LOCAL._replace(partition="gpu"), "partition = 'gpu': cluster = 'local' has no partitions"),
        (LOCAL._replace(time="1:75"), "time = '1:75' must be minutes or hh:mm"),
        (LOCAL._replace(time="1-00:00"), "time = '1-00:00' must be minutes or hh:mm"),
        (LOCAL._replace(time="2"), "time = '2' must be minutes or hh:mm, and 3 minutes or more"),
        (LOCAL._replace(gpus_per_run=-1), "gpus_per_run = -1 must be 0 or more"),
        (LOCAL._replace(gpus_per_run=1), "gpus_per_run = 1: the runs of cluster = 'local' share all GPUs"),
        (LOCAL._replace(cpus_per_run=0), "cpus_per_run = 0 must be 1 or more"),
    ],
)
def test_an_impossible_cluster_is_refused(there, message, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=message):
        sweep.run_all(tiny_study(data_dir), tmp_path / "study", cluster=there)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("text", "minutes"), [("90", 90), ("1:30", 90), ("00:05", 5), ("48:00", 2880)])
def test_times_are_minutes_or_hours_and_minutes(text, minutes):
    assert cluster._minutes(text) == minutes


def test_a_path_that_a_cluster_would_change_is_refused(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"workdir = .*50%test: its path must not have a %"):
        sweep.run_all(tiny_study(data_dir), tmp_path / "50%test", cluster=LOCAL)
    assert not list(tmp_path.iterdir())


def test_jobs_side_by_side_are_for_this_machine_only(data_dir, tmp_path):
    with pytest.raises(ValueError, match="jobs = 2: on a cluster each run is a job; leave --jobs out"):
        sweep.run_all(tiny_study(data_dir), tmp_path / "study", 2, LOCAL)


@pytest.mark.parametrize("command", ["sweep", "depth_curves"])
def test_flags_of_a_cluster_need_one(command, tmp_path):
    words = ["--config=configs/studies/depth_digits.py", f"--workdir={tmp_path / 'study'}", "--partition=gpu"]
    done = subprocess.run(
        [sys.executable, "-m", f"cnn_cases.studies.{command}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: partition = 'gpu' is for jobs of a cluster; name one with --cluster\n"
    assert not (tmp_path / "study").exists()


def test_the_newest_job_is_that_of_the_last_submission(tmp_path):
    for job, when in (("9", 200), ("10", 300), ("11", 100)):
        path = tmp_path / f"{job}_submitted.pkl"
        path.touch()
        os.utime(path, (when, when))
    assert cluster._newest_job(tmp_path).job_id == "10"
    assert cluster._newest_job(tmp_path / "none") is None


def test_a_job_is_gone_if_it_is_missed_twice(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0)
    monkeypatch.setitem(cluster._QUEUE_SECONDS, "slurm", 0)
    monkeypatch.setattr(cluster, "_alive", lambda *_: asked.append(1) or set())
    stop = SimpleNamespace(number=0)
    assert list(cluster._ended({"a": JobPaths(tmp_path, "7")}, "slurm", stop)) == ["a"]
    assert len(asked) == 2
