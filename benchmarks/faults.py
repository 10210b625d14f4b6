"""What a training survives: `python -m benchmarks.faults [--kills=50] [--terms=10] [--out=FILE.json]`.

A real `train.py` process is killed again and again, and started again, until its run ends; then all that
the run left is compared with a run that nobody disturbed: the parameters and the optimizer's state bit by
bit, the rows of metrics.jsonl byte by byte, the curves of TensorBoard point by point, the final figures.
Where a run ends before there were kills enough, another one is begun. The signal comes at these moments by
turns:

start        any time between the start of the process and its first rows, imports and compilation included
step         any time within 0.2 s after a row of metrics
row          as soon as a row of metrics has grown
evaluation   within 0.02 s after a row, when an evaluation follows
save         while a checkpoint is being written

SIGKILL leaves a process no time for anything. After SIGTERM it has to save and to end with exit code 143,
unless Python itself had not come to its feet; the time that takes is reported.
"""

import argparse
import collections
import functools
import itertools
import json
import pathlib
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from tensorboardX.proto import event_pb2

from benchmarks import record
from cnn_cases import saved_runs
from cnn_cases.training import checkpoint, logbook, programs

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/resnet_digits.py"
MOMENTS = ("start", "step", "row", "evaluation", "save")
# A row, an evaluation and a checkpoint every few steps, so that little of the time is between them.
OVERRIDES = {
    "model.depth": 8,
    "num_steps": 400,
    "log_every_steps": 10,
    "evaluation.every_steps": 10,
    "checkpoint.every_steps": 20,
}
POLL_SECONDS = 0.001


def start(workdir, overrides, errors, more_flags=(), environment=None, config=CONFIG):
    """A process that trains in `workdir`; what it says goes to the open file `errors`."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags, *more_flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=errors, stderr=errors)


def disturb(workdir, overrides, signals, rng):
    """Trains in `workdir` until the run ends, disturbed for as long as there are signals.

    Args:
      workdir: of the run.
      overrides: {key: value} of the config.
      signals: a deque of (signal number, one of MOMENTS); those that were sent are taken from it.
      rng: a `random.Random`.

    Returns:
      [{"signal", "moment", "step" of the last row when it came, "exit_code", "seconds" until the end}].

    Raises:
      RuntimeError: a process ended in another way than it should.
    """
    blows, startup = [], 5.0
    while True:
        with (workdir.parent / f"{workdir.name}.log").open("a+") as errors:
            process = start(workdir, overrides, errors)
            began, blow = time.monotonic(), signals[0] if signals else None
            rows = workdir / "metrics.jsonl"
            if blow and wait_for(process, workdir, blow[1], startup, rng):
                number, moment = blow
                process.send_signal(number)
                signals.popleft()
                sent = time.monotonic()
                code = process.wait()
                steps = [row["step"] for row in logbook.read_rows(rows)]
                blows.append(
                    {
                        "signal": signal.Signals(number).name,
                        "moment": moment,
                        "step": max(steps, default=0),
                        "exit_code": code,
                        "seconds": round(time.monotonic() - sent, 2),
                    }
                )
                if moment != "start":
                    startup = sent - began
            else:
                code = process.wait()
            if code == 0:
                return blows
            if not blow or code not in _expected(*blow):
                errors.seek(0)
                raise RuntimeError(f"exit code {code} after {blow}: {errors.read()[-2000:]}")


def _expected(number, moment):
    """The exit codes that are right."""
    if number == signal.SIGKILL:
        return {-signal.SIGKILL}
    saved = 128 + signal.SIGTERM
    return {saved, -signal.SIGTERM} if moment == "start" else {saved}


def wait_for(process, workdir, moment, startup, rng):
    """Waits for one of MOMENTS; False where the process ended before.

    Args:
      process: that trains.
      workdir: of the run.
      moment: one of MOMENTS.
      startup: seconds, within which "start" falls.
      rng: a `random.Random`.
    """
    rows, saves = workdir / "metrics.jsonl", workdir / "checkpoints"
    left_over = set(saves.glob(checkpoint.DRAFTS))  # by a process that was killed in a save

    def size():
        return rows.stat().st_size if rows.exists() else 0

    until = time.monotonic() + rng.uniform(0, startup)
    before, events = size(), rng.randint(1, 3)
    while process.poll() is None:
        if moment == "start":
            if time.monotonic() > until:
                return True
        elif moment == "save":
            drafts = set(saves.glob(checkpoint.DRAFTS))
            if drafts - left_over:
                return True
            left_over &= drafts  # those that were cleaned up may come again
        elif size() > before:
            before, events = size(), events - 1
            if events == 0:
                time.sleep(
                    {"step": rng.uniform(0, 0.2), "row": 0, "evaluation": rng.uniform(0, 0.02)}[moment]
                )
                return process.poll() is None
        time.sleep(POLL_SECONDS)
    return False


def differences(one, other):
    """What two runs of one config left that is not the same, as lines of text."""
    found = []
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("the rows of metrics.jsonl")
    if curves(one) != curves(other):
        found.append("the curves of TensorBoard")
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (one, other)]
    if results[0]["metrics"] != results[1]["metrics"]:
        found.append("the final figures")
    step, like = _end((one / "config.json").read_text(), one)
    states = [checkpoint.read(workdir / "checkpoints", step, like) for workdir in (one, other)]
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(state) for state in states), strict=True)
    found += [jax.tree_util.keystr(path) for (path, a), (_, b) in leaves if not np.array_equal(a, b)]
    return found


@functools.lru_cache(maxsize=1)
def _end(config_text, workdir):
    """The last step of a run, and a state like that of its checkpoints."""
    del config_text  # by which the last answer is known
    config = saved_runs.load_config(workdir)
    program = programs.make_program(config)
    return config.num_steps, program.shapes_of_state()


def curves(workdir):
    """{(tag, step): [values]} of the event files of a run, as TensorBoard shows them after each restart."""
    points = collections.defaultdict(list)
    for path in sorted((workdir / "tensorboard").iterdir()):
        for event in _events(path.read_bytes()):
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                for key in [key for key in points if key[1] >= event.step]:
                    del points[key]
            for value in event.summary.value:
                points[value.tag, event.step].append(value.simple_value)
    return dict(points)


def _events(content):
    """The events of a file: each has its length, a checksum of that, and a checksum behind it."""
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        data = content[place + 12 : place + 12 + length]
        if len(data) < length:
            return  # cut short by a kill
        yield event_pb2.Event.FromString(data)
        place += 12 + length + 4


def torment(directory, planned, overrides, seed=0, disturb=disturb):
    """Disturbs runs until all signals are spent, and compares each with an undisturbed one.

    Args:
      directory: where the runs lie.
      planned: [(signal number, one of MOMENTS)], in order, or what else `disturb` takes.
      overrides: {key: value} of the config.
      seed: of the moments.
      disturb: as the function of that name.

    Returns:
      {"runs": how many were disturbed, "blows": see `disturb`, "differences": see `differences`}.
    """
    directory = pathlib.Path(directory)
    undisturbed = directory / "undisturbed"
    disturb(undisturbed, overrides, collections.deque(), None)
    signals = collections.deque(planned)
    blows, found, runs, rng = [], [], 0, random.Random(seed)
    while signals and not found:
        runs += 1
        workdir = directory / f"disturbed-{runs}"
        blows += disturb(workdir, overrides, signals, rng)
        found = differences(undisturbed, workdir)
        print(
            f"run {runs}: {len(blows)} of {len(planned)} signals; different: {', '.join(found) or 'nothing'}"
        )
    return {"runs": runs, "blows": blows, "differences": found}


def main():
    """Disturbs, prints, and writes what --out names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs")
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which it writes the section 'signals'"
    )
    options = parser.parse_args()
    if min(options.kills, options.terms) < 0 or not options.kills + options.terms:
        parser.error("--kills and --terms must be 0 or more, and one of them above 0")
    numbers = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    planned = list(zip(numbers, itertools.cycle(MOMENTS), strict=False))
    with tempfile.TemporaryDirectory() as directory:
        result = torment(directory, planned, OVERRIDES)
    blows = result.pop("blows")
    result["moments"] = collections.Counter(f"{one['signal']} {one['moment']}" for one in blows)
    saving = [one["seconds"] for one in blows if one["exit_code"] == 128 + signal.SIGTERM]
    result["seconds_to_save_on_sigterm"] = {"longest": max(saving, default=None), "all": saving}
    for key, value in result.items():
        print(f"{key}: {value}")
    if options.out:
        command = f"python -m benchmarks.faults --kills={options.kills} --terms={options.terms}"
        figures = {"config": CONFIG, "overrides": OVERRIDES} | result
        record.write_section(options.out, "signals", command, figures)
    sys.exit(1 if result["differences"] else 0)


if __name__ == "__main__":
    main()
