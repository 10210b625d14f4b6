"""What check.sh runs: a study on a Slurm that interrupts its jobs, against the same study without Slurm."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

SWEEP = [sys.executable, "-m", "cnn_cases.studies.sweep", "--config=tests/slurm/study.py"]
SLURM = ["--cluster=slurm", "--partition=low", "--time=10", "--cpus_per_run=1"]
PATIENCE = 600  # seconds


def say(text):
    """A line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def until(condition, what):
    """The first value of `condition()` that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{PATIENCE} s have passed without: {what}")


class Study:
    """The study that Slurm runs."""

    def __init__(self, workdir):
        """Submits it."""
        self.workdir = workdir
        self.log = workdir.with_suffix(".log")
        self.command = None
        self.start()

    def start(self):
        """Starts the command, for the first time or again."""
        self.command = subprocess.Popen(
            [*SWEEP, *SLURM, f"--workdir={self.workdir}"],
            stderr=self.log.open("a"),
            stdout=subprocess.DEVNULL,
        )

    def job(self, run):
        """The id of the run's last job, once it has been submitted."""
        folder = self.workdir / "jobs" / run
        pickles = until(lambda: [*folder.glob("*_submitted.pkl")], f"a job of {run}")
        return max(pickles, key=lambda path: path.stat().st_mtime).name.split("_")[0]

    def starts(self, run):
        """How often the run has been started."""
        path = self.workdir / "runs" / run / "environment.json"
        return len(json.loads(path.read_text())) if path.exists() else 0

    def resumed_after(self, run):
        """The steps from which the run has gone on."""
        logs = sorted((self.workdir / "jobs" / run).glob("*.err"), key=lambda path: path.stat().st_mtime)
        return [
            int(step) for path in logs for step in re.findall(r"resuming after step (\d+)", path.read_text())
        ]

    def trains(self, run, start=1):
        """Waits until the run has a checkpoint in its start of that number; returns its job's id."""
        run_dir = self.workdir / "runs" / run
        until(
            lambda: (
                self.starts(run) == start
                and len(self.resumed_after(run)) == start - 1
                and [*run_dir.glob("checkpoints/[0-9]*/checksums.json")]
            ),
            f"a checkpoint of {run} in start {start}",
        )
        if start > 1:
            say(f"    {run} goes on after step {self.resumed_after(run)[-1]}")
        assert not (run_dir / "result.json").exists(), f"{run} is finished already; make the study longer"
        return self.job(run)


def slurm(*words):
    """Runs a command of Slurm."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def outcome(workdir):
    """All of a record but when and how long, and the bytes of all metrics."""
    record = json.loads((workdir / "record.json").read_text())
    for run in record["runs"]:
        del run["seconds"], run["date"]
    return record, {path.parent.name: path.read_bytes() for path in workdir.glob("runs/*/metrics.jsonl")}


def main(workdir):
    """Interrupts each run in another way and compares."""
    first, second, third, fourth = (
        f"momentum-{momentum}_seed-{seed}" for momentum in ("0.0", "0.9") for seed in (0, 1)
    )
    workdir.mkdir()
    say("the study without Slurm")
    subprocess.run([*SWEEP, f"--workdir={workdir / 'here'}"], check=True, capture_output=True)
    study = Study(workdir / "there")

    job = study.trains(first)
    say(f"SIGUSR2 for job {job}, as when its time is nearly over")
    slurm("scancel", "--signal=USR2", job)
    job = study.trains(second)
    say(f"scontrol requeue {job}")
    slurm("scontrol", "requeue", job)

    study.trains(third)
    running = slurm("squeue", "--noheader", "--states=running", "--format=%j").split()
    say(f"a job of the high partition preempts {' and '.join(running)}")
    assert third in running
    slurm("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    study.trains(third, start=2)

    say("Ctrl-C for the command that waits, and a second start")
    jobs = slurm("squeue", "--noheader", "--format=%A").split()
    study.command.send_signal(signal.SIGINT)
    assert study.command.wait(PATIENCE) == 130
    study.start()
    until(lambda: study.log.read_text().count("submitted to slurm") == 2, "the second start")
    assert set(slurm("squeue", "--noheader", "--format=%A").split()) <= set(jobs)

    start = 1 + (fourth in running)
    job = study.trains(fourth, start)
    say(f"scancel {job}: its run is reported as failed, and submitted once more by the next start")
    slurm("scancel", job)
    assert study.command.wait(PATIENCE) == 2
    assert f"1 of 4 runs failed: {fourth}" in study.log.read_text()
    study.start()
    study.trains(fourth, start + 1)
    assert study.command.wait(PATIENCE) == 0

    say("what the command said:")
    print(study.log.read_text())
    starts = {run: study.starts(run) for run in (first, second, third, fourth)}
    say(f"starts of each run: {starts}")
    assert all(len(study.resumed_after(run)) == number - 1 > 0 for run, number in starts.items())
    assert outcome(workdir / "there") == outcome(workdir / "here")
    say("the records and all metrics are equal to the bit")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
