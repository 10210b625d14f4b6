"""What a run of several processes survives: `python -m benchmarks.processes [--out=FILE.json]`.

Four real `train.py` processes with one CPU device each share one training run. One of them is killed
(SIGKILL), or stops responding like a machine that hangs (SIGSTOP), at these moments:

import       before it has connected to the other processes
start        any time within 3 s after all have connected: compilation and the first steps
step         any time within 0.2 s after a row of metrics
save         while process 0 writes a checkpoint

The benchmark records how long the three other processes take to end, and their exit codes and messages.
Then all four are restarted until the run ends; what it left is compared, as in `benchmarks.faults`, with an
undisturbed run of four processes. A process with another config or package version has to be refused.
"""

import argparse
import collections
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import time

from benchmarks import children, faults, record
from cnn_cases.training.processes import LOST

COUNT = 4
STARTUP_SECONDS = 3.0
OVERRIDES = {
    "model.depth": 8,
    "batch_size": 16,
    "num_steps": 150,
    "log_every_steps": 5,
    "evaluation.every_steps": 0,
    "evaluation.splits": (),
    "checkpoint.best_on": "",
    "checkpoint.every_steps": 15,
}
HEARTBEAT_SECONDS, MEETING_SECONDS = 10, 20
# Seconds after the signal, before or after all have connected, within which the other processes must have
# ended: the timeout for a process that is missing or silent, plus the time to end, process 0 last.
BOUNDS = {"before": MEETING_SECONDS + 10, "after": HEARTBEAT_SECONDS + 10}
ABORT = -signal.SIGABRT
PLANNED = [
    *((signal.SIGKILL, "import", process) for process in (0, 3)),
    *((signal.SIGKILL, moment, process) for moment in ("start", "step", "save") for process in range(COUNT)),
    *((signal.SIGSTOP, "step", process) for process in range(COUNT)),
]


def start_all(workdir, overrides, own_flags=None, own_environment=None):
    """Starts the processes of a job; the output of process i goes to a new `<workdir>.<i>.log`.

    Args:
      workdir: the run's workdir.
      overrides: {key: value} of the config.
      own_flags: {process: [its additional flags]}.
      own_environment: {process: {its additional environment variables}}.
    """
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    # Quick compilation leaves more of the time to what is tested.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "16",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    processes = []
    for index in range(COUNT):
        flags = [
            f"--coordinator_address=localhost:{port}",
            f"--num_processes={COUNT}",
            f"--process_id={index}",
            f"--heartbeat_timeout_seconds={HEARTBEAT_SECONDS}",
            f"--meeting_timeout_seconds={MEETING_SECONDS}",
            *(own_flags or {}).get(index, []),
        ]
        with _log_of(workdir, index).open("w") as log:
            own = environment | (own_environment or {}).get(index, {})
            processes.append(faults.start(workdir, overrides, log, flags, own))
    return processes


def disturb(workdir, overrides, blows, rng):
    """Trains in `workdir` until the run ends, and disturbs it while there are blows.

    Args:
      workdir: the run's workdir.
      overrides: {key: value} of the config.
      blows: a deque of (signal number, moment, process), from which struck ones are removed.
      rng: a `random.Random`.

    Returns:
      [{"signal", "moment", "process", "step" of the last row when it came, "seconds" until the other
      processes had ended, "exit_codes" and "messages" of the other processes}].

    Raises:
      RuntimeError: a process did not end within its bound, or not as it should.
    """
    done = []
    while True:
        with children.ended(*start_all(workdir, overrides)) as processes:
            if blows and _wait_for(processes[blows[0][2]], workdir, blows[0][1], rng):
                done.append(_strike(processes, workdir, *blows.popleft()))
                continue
            codes = [process.wait() for process in processes]
            if codes != [0] * COUNT:
                raise RuntimeError(f"exit codes {codes}: {_said(workdir, range(COUNT))}")
            return done


def _wait_for(process, workdir, moment, rng):
    """Waits for the moment; returns False if the process ended before."""
    if moment == "import":
        time.sleep(rng.uniform(0, 0.5))
        return True
    # Process 0 writes this file when all have connected; then they compile.
    starts, before = workdir / "environment.json", time.time()
    while not (starts.exists() and starts.stat().st_mtime > before):
        if process.poll() is not None:
            return False
        time.sleep(faults.POLL_SECONDS)
    return faults.wait_for(process, workdir, moment, STARTUP_SECONDS, rng)


def _strike(processes, workdir, number, moment, struck):
    """Sends the signal, waits for the other processes to end, and returns what happened."""
    name = signal.Signals(number).name
    bound = BOUNDS["before" if moment == "import" else "after"]
    others = [index for index in range(COUNT) if index != struck]
    step = faults.last_step(workdir / "metrics.jsonl")
    processes[struck].send_signal(number)
    sent = time.monotonic()
    while any(processes[index].poll() is None for index in others) and time.monotonic() < sent + bound:
        time.sleep(faults.POLL_SECONDS)
    blow = {
        "signal": name,
        "moment": moment,
        "process": struck,
        "step": step,
        "seconds": round(time.monotonic() - sent, 2),
        "exit_codes": [processes[index].poll() for index in others],
        "messages": _said(workdir, others),
    }
    print(blow, flush=True)
    # JAX aborts all processes when process 0, which they depend on, is gone; Gloo at times when any is.
    clear = all(re.match("error: |Terminating process|terminate called", said) for said in blow["messages"])
    if not (clear and {LOST, ABORT}.issuperset(blow["exit_codes"])):
        raise RuntimeError(f"not as it should be: {blow}")
    return blow


def _said(workdir, indices):
    """The distinct last messages of processes: the line of the error, without times, ids and ports."""
    lines = set()
    for index in indices:
        text = _log_of(workdir, index).read_text().strip().splitlines()
        telling = [line for line in text if re.match("error: |F[0-9]{4} |terminate called", line)]
        line = (telling or text or ["nothing"])[0]
        line = re.sub(r"^F[0-9]{4} [0-9:.]+ +[0-9]+ [^ ]+ ", "", line)
        lines.add(re.sub(r"127.0.0.1:?\]?:[0-9]+", "127.0.0.1", line)[:200])
    return sorted(lines)


def refused(directory):
    """Starts jobs in which one process differs: {what differs: {"exit_codes", "seconds", "message"}}.

    Args:
      directory: the parent directory of the runs.

    Raises:
      RuntimeError: a job was not refused, or its workdir was touched.
    """
    # Another version of a package, according to the metadata of the installation.
    (directory / "optax-0.0.1.dist-info").mkdir()
    (directory / "optax-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n"
    )
    ways = {
        "config": ({2: ["--config.optimizer.momentum=0.5"]}, None),
        "package": (None, {2: {"PYTHONPATH": str(directory)}}),
    }
    outcomes = {}
    for name, (own_flags, own_environment) in ways.items():
        workdir = directory / name
        began = time.monotonic()
        with children.ended(*start_all(workdir, OVERRIDES, own_flags, own_environment)) as processes:
            codes = [process.wait() for process in processes]
        texts = {
            _log_of(workdir, index).read_text().partition("error: ")[2].strip() for index in range(COUNT)
        }
        outcomes[name] = {
            "exit_codes": codes,
            "seconds": round(time.monotonic() - began, 2),
            "message": " | ".join(sorted(texts)),
        }
        print(outcomes[name])
        if codes != [2] * COUNT or len(texts) > 1 or workdir.exists():
            raise RuntimeError(f"not refused as it should be: {outcomes[name]}")
    return outcomes


def _log_of(workdir, index):
    return workdir.parent / f"{workdir.name}.{index}.log"


def main():
    """Disturbs the runs, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which it writes the section 'processes'"
    )
    options = parser.parse_args()
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        outcomes = refused(directory)
        result = faults.torment(directory, PLANNED, OVERRIDES, disturb=disturb)
    kinds = collections.defaultdict(list)
    for blow in result["blows"]:
        kinds[f"{blow['signal']} {blow['moment']}"].append(blow["seconds"])
    longest = {kind: max(seconds) for kind, seconds in kinds.items()}
    codes = collections.Counter(str(code) for blow in result["blows"] for code in blow["exit_codes"])
    print(f"longest: {longest}\nexit codes: {dict(codes)}\ndifferent: {result['differences'] or 'nothing'}")
    if options.out:
        figures = {
            "config": faults.CONFIG,
            "overrides": OVERRIDES,
            "processes": COUNT,
            "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
            "meeting_timeout_seconds": MEETING_SECONDS,
            "bounds_seconds": BOUNDS,
            "longest_seconds": longest,
            "exit_codes": codes,
            "refused": outcomes,
        }
        command = "python -m benchmarks.processes"
        record.write_section(options.out, "processes", command, figures | result, ["cpu"])
    sys.exit(1 if result["differences"] else 0)


if __name__ == "__main__":
    main()
