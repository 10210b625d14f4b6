"""What a training run survives: `python -m benchmarks.faults [--kills=50] [--terms=10] [--out=FILE.json]`.

A real `train.py` process is killed and restarted again and again until its run ends; then all that the run
left is compared with an undisturbed run: the parameters and the optimizer's state bit by bit, in the last and
in the best checkpoint, the rows of metrics.jsonl byte by byte, the curves of TensorBoard point by point, and
the final metrics. If a run ends before all signals were sent, another run begins. The signals come at these
moments, in turn:

start        any time between the start of the process and its first rows, imports included
compile      any time within a second after the log was opened, with no compiled step in the cache; the next
             starts find there what this one has left
step         any time within 0.2 s after a row of metrics
row          as soon as a row of metrics is written
evaluation   within 0.02 s after a row of training, which an evaluation follows
save         while a checkpoint is being written

SIGKILL leaves a process no time for anything. After SIGTERM it has to save, which is timed, say at which step
it did, and end with exit code 143. Before it trains, it ends at once; before its imports are done, the signal
itself ends it. A signal that came too late, when the run was over, is sent to the next run instead; in the
first half of the run none is too late, and one that does nothing then ends the harness. So does a process
that has not ended BOUND_SECONDS after its signal.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import children, record
from cnn_cases import saved_runs
from cnn_cases.training import checkpoint, logbook, programs

event_pb2 = logbook.event_pb2  # of tensorboardX, which would import PyTorch here
ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/resnet_digits.py"
MOMENTS = ("start", "compile", "step", "row", "evaluation", "save")
# A row, an evaluation and a checkpoint every few steps, so that little time passes between them.
OVERRIDES = {
    "model.depth": 8,
    "num_steps": 400,
    "log_every_steps": 10,
    "evaluation.every_steps": 10,
    "checkpoint.every_steps": 20,
}
POLL_SECONDS = 0.001
BOUND_SECONDS = 60  # from a signal to the end of the process
# Runs in a row whose first signal came too late, which happens where a start takes as long as the run.
MOST_IN_VAIN = 3


def start(workdir, overrides, errors, more_flags=(), environment=None, config=CONFIG):
    """Starts a process that trains in `workdir`; its output goes to the open file `errors`, or to pipes."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags, *more_flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=errors, stderr=errors, text=True)


def disturb(workdir, overrides, signals, rng):
    """Trains in `workdir` until the run ends, and disturbs it while there are signals.

    Args:
      workdir: the run's workdir.
      overrides: {key: value} of the config.
      signals: a deque of (signal number, one of MOMENTS), from which sent ones are removed.
      rng: a `random.Random`.

    Returns:
      [{"signal", "moment", "step" of the last row at the end, "exit_code", "seconds" until the end, "saved":
      the step that it says it saved, or None}].

    Raises:
      RuntimeError: a process did not end as it should.
      subprocess.TimeoutExpired: a process did not end BOUND_SECONDS after its signal.
    """
    blows, startup, cache = [], 5.0, f"{workdir}-cache"
    while True:
        blow = signals[0] if signals else None
        if blow and blow[1] == "compile":
            cache = f"{workdir}-cache-{len(blows)}"  # a new one
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        with (
            (workdir.parent / f"{workdir.name}.log").open("w+") as errors,
            children.ended(start(workdir, overrides, errors, environment=environment)) as (process,),
        ):
            began = time.monotonic()
            rows = workdir / "metrics.jsonl"
            if blow and wait_for(process, workdir, blow[1], startup, rng):
                number, moment = blow
                done = last_step(rows)
                process.send_signal(number)
                sent = time.monotonic()
                code = process.wait(BOUND_SECONDS)
                seconds = time.monotonic() - sent
                if moment not in ("start", "compile"):
                    startup = sent - began
            else:
                blow, code = None, process.wait()
            # The signal, if any, came too late and stays in the queue.
            over = code == 128 + signal.SIGTERM and (workdir / "result.json").exists()
            if code == 0 or over:
                if blow and done < overrides["num_steps"] // 2:
                    raise RuntimeError(f"{blow} after step {done} did not end the process")
                return blows
            errors.seek(0)
            text = errors.read()
            saved = re.search(r"SIGTERM: saved after step (\d+)", text)
            saved = int(saved[1]) if saved else None
            if not blow or not _is_right(*blow, code, saved, checkpoint.steps(workdir / "checkpoints")):
                raise RuntimeError(f"exit code {code} after {blow}, saved: {saved}: {text[-2000:]}")
            blows.append(
                {
                    "signal": signal.Signals(number).name,
                    "moment": moment,
                    "step": last_step(rows),
                    "exit_code": code,
                    "seconds": round(seconds, 2),
                    "saved": saved,
                }
            )
            signals.popleft()


def last_step(rows):
    """The last step in a file metrics.jsonl; 0 if it has none yet."""
    return max((row["step"] for row in logbook.read_rows(rows)), default=0)


def _is_right(number, moment, code, saved, kept):
    """Whether a process ended as it should; `kept` are the steps of the checkpoints that it left."""
    if number == signal.SIGKILL:
        return code == -signal.SIGKILL
    if saved is None:
        return moment in ("start", "compile") and code in (128 + signal.SIGTERM, -signal.SIGTERM)
    return code == 128 + signal.SIGTERM and kept[-1:] == [saved]


def wait_for(process, workdir, moment, startup, rng):
    """Waits for one of MOMENTS; returns False if the process ended before.

    Args:
      process: the training process.
      workdir: the run's workdir.
      moment: one of MOMENTS.
      startup: seconds within which "start" falls.
      rng: a `random.Random`.
    """
    rows, saves, starts = (workdir / name for name in ("metrics.jsonl", "checkpoints", "environment.json"))
    left_over = set(saves.glob(checkpoint.DRAFTS))  # by a process that was killed while saving

    def written(path=rows):
        return path.read_bytes() if path.exists() else b""

    until = time.monotonic() + rng.uniform(0, startup)
    before, events, known = len(written()), rng.randint(1, 3), written(starts)
    while process.poll() is None:
        if moment == "start":
            if time.monotonic() > until:
                return True
        elif moment == "compile":
            if written(starts) != known:
                time.sleep(rng.uniform(0, 1))
                return process.poll() is None
        elif moment == "save":
            drafts = set(saves.glob(checkpoint.DRAFTS))
            if drafts - left_over:
                return True
            left_over &= drafts  # drafts that were cleaned up may appear again
        elif new := written()[before:].splitlines():
            before += sum(len(line) + 1 for line in new)
            # The row of an evaluation is followed by a step, or a save.
            events -= moment != "evaluation" or b'"running/' in new[-1]
            if events == 0:
                time.sleep(
                    {"step": rng.uniform(0, 0.2), "row": 0, "evaluation": rng.uniform(0, 0.02)}[moment]
                )
                return process.poll() is None
        time.sleep(POLL_SECONDS)
    return False


def differences(one, other):
    """The differences between what two runs of one config left, as lines of text."""
    found = []
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("the rows of metrics.jsonl")
    if curves(one) != curves(other):
        found.append("the curves of TensorBoard")
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (one, other)]
    if results[0]["metrics"] != results[1]["metrics"]:
        found.append("the final figures")
    step, like = _end((one / "config.json").read_text(), one)
    saved = [workdir / "checkpoints" for workdir in (one, other)]
    found += _different_leaves(saved, step, like)
    best = [_best(directory) for directory in saved]
    if best[0] != best[1]:
        found.append(f"the best checkpoint: step {best[0]} and {best[1]}")
    elif best[0] not in (None, step):
        found += [f"{leaf} of the best checkpoint" for leaf in _different_leaves(saved, best[0], like)]
    return found


def _different_leaves(directories, step, like):
    """The names of the arrays that differ in any bit between two checkpoints of the same step."""
    states = [checkpoint.read(directory, step, like) for directory in directories]
    leaves = zip(*(jax.tree_util.tree_leaves_with_path(state) for state in states), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), (_, b) in leaves if _bits(a) != _bits(b)]


def _bits(leaf):
    leaf = np.asarray(leaf)
    return leaf.dtype, leaf.shape, leaf.tobytes()  # 0.0 == -0.0, though their bits differ


def _best(directory):
    """The step of the best checkpoint; None if no checkpoint has an error of an evaluation."""
    try:
        return checkpoint.find(directory, "best")
    except ValueError:
        return None


@functools.lru_cache(maxsize=1)
def _end(config_text, workdir):
    """The last step of a run, and a state like that of its checkpoints."""
    del config_text  # only part of the cache key
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
    """The events of a file: each comes after its length and a checksum of that, and before its checksum."""
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        data = content[place + 12 : place + 12 + length]
        if len(data) < length:
            return  # cut short by a kill
        yield event_pb2.Event.FromString(data)
        place += 12 + length + 4


def torment(directory, planned, overrides, seed=0, disturb=disturb):
    """Disturbs runs until all signals are sent, and compares each run with an undisturbed one.

    Args:
      directory: the parent directory of the runs.
      planned: [(signal number, one of MOMENTS)], in order, or what `disturb` takes instead.
      overrides: {key: value} of the config.
      seed: seed of the moments.
      disturb: a function like `disturb` of this module.

    Returns:
      {"runs": how many were disturbed, "blows": see `disturb`, "differences": see `differences`}.
    """
    directory = pathlib.Path(directory)
    undisturbed = directory / "undisturbed"
    disturb(undisturbed, overrides, collections.deque(), None)
    signals = collections.deque(planned)
    blows, found, runs, rng, in_vain = [], [], 0, random.Random(seed), 0
    while signals and not found:
        runs += 1
        workdir = directory / f"disturbed-{runs}"
        new = disturb(workdir, overrides, signals, rng)
        in_vain = 0 if new else in_vain + 1
        if in_vain == MOST_IN_VAIN:
            raise RuntimeError(f"{in_vain} runs in a row ended as if they had not been sent {signals[0]}")
        blows += new
        found = differences(undisturbed, workdir)
        print(
            f"run {runs}: {len(blows)} of {len(planned)} signals; different: {', '.join(found) or 'nothing'}"
        )
    return {"runs": runs, "blows": blows, "differences": found}


def main():
    """Disturbs the runs, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs")
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which it writes the section 'signals'"
    )
    options = parser.parse_args()
    if min(options.kills, options.terms) < 0 or not options.kills + options.terms:
        parser.error("--kills and --terms must be 0 or more, and one of them above 0")
    children.end_on_sigterm()
    numbers = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    planned = list(zip(numbers, itertools.cycle(MOMENTS), strict=False))
    with tempfile.TemporaryDirectory() as directory:
        result = torment(directory, planned, OVERRIDES)
    blows = result.pop("blows")
    for key in ("moment", "exit_code"):
        result[f"{key}s"] = collections.Counter(f"{one['signal']} {one[key]}" for one in blows)
    saving = [one["seconds"] for one in blows if one["saved"] is not None]
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
