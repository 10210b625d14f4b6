"""What check_hosts.sh runs: a run on two hosts that Slurm and the network disturb, against one process."""

import os
import pathlib
import re
import subprocess
import sys
import time

from tests.slurm.check_study import say, slurm, until

OVERRIDES = {
    "num_steps": 1_500,
    "log_every_steps": 50,
    "evaluation.every_steps": 500,
    "checkpoint.every_steps": 100,
}
TRAIN = [
    *(sys.executable, "train.py", "--config=configs/resnet_digits.py"),
    *(f"--config.{key}={value}" for key, value in OVERRIDES.items()),
]
MANUAL = pathlib.Path(__file__).parents[2] / "docs/cluster.md"


def batch_script(log, command):
    """The batch script of the manual for one CPU per host, with another command and a log file."""
    (script,) = re.findall(r"```\n(#!/bin/bash\n.*?)```", MANUAL.read_text(), re.DOTALL)
    for there, here in (
        ("--gpus-per-node=4 --cpus-per-task=32 --time=24:00:00", "--cpus-per-task=1 --time=30:00"),
        ("--open-mode=append", f"--open-mode=append --output={log}"),
        ("srun --cpus-per-task=32", "srun --cpus-per-task=1"),
        ("python train.py --config=configs/resnet_imagenet2012.py --workdir=runs/resnet", command),
    ):
        assert script.count(there) == 1, f"{MANUAL} no longer has {there}"
        script = script.replace(there, here)
    return script


def main(workdir):
    """Disturbs the run in three ways and compares."""
    workdir.mkdir()
    say("one process with two devices, undisturbed")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [*TRAIN, f"--workdir={workdir / 'one'}"]
    subprocess.run(command, check=True, capture_output=True, env=environment)

    run, log, script = workdir / "two", workdir / "job.log", workdir / "job.sh"
    script.write_text(batch_script(log, " ".join([*TRAIN, f"--workdir={run}"])))
    job = re.search(r"\d+", slurm("sbatch", str(script)))[0]

    def step():
        steps = [int(path.name) for path in run.glob("checkpoints/[0-9]*") if path.name.isdecimal()]
        return max(steps, default=0)

    def resumed():
        return re.findall(r"resuming after step (\d+)", log.read_text() if log.exists() else "")

    def trains_on(what, start):
        """Waits until the run has saved a later step, in the start of that number."""
        before = step()
        until(lambda: len(resumed()) == start and step() > before, what)
        say(f"    it has saved step {step()}")

    trains_on("the first checkpoint", 0)
    say(f"SIGUSR2 for job {job}, as when its time is nearly over")
    slurm("scancel", "--signal=USR2", job)
    trains_on("a checkpoint after the requeue", 1)
    say("beta is without a network for 10 s")
    slurm("ip", "link", "set", "to-beta", "down")
    time.sleep(10)
    slurm("ip", "link", "set", "to-beta", "up")
    trains_on("a checkpoint in the same start", 1)
    say("beta is without a network until Slurm takes it for dead")
    slurm("ip", "link", "set", "to-beta", "down")
    until(
        lambda: "down" in slurm("sinfo", "--noheader", "--nodes=beta", "--format=%T"), "a node that is down"
    )
    say("    Slurm has requeued the job; the network is back")
    slurm("ip", "link", "set", "to-beta", "up")
    trains_on("a checkpoint after the second requeue", 2)
    until(lambda: (run / "result.json").exists(), "the end of the run")
    say(f"the run is finished, after it went on from the steps {' and '.join(resumed())}")
    assert (run / "metrics.jsonl").read_bytes() == (workdir / "one/metrics.jsonl").read_bytes()
    say("all metrics are equal to the bit")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
