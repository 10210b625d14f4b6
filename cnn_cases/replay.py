"""Repeats one step of a training run, and reports the line that produced the first non-finite number.

    python -m cnn_cases.replay --workdir=runs/x [--step=37] [--data_dir=D]

The default step is the one at which the run diverged. The replay reads the last checkpoint before it, and
repeats the steps in between and then the step itself: once as in the run and, if any number is not finite,
once more with JAX's `debug_nans`. On a CPU, with as many threads as the run had, the numbers are bitwise
those of a run with one step per call; other devices, and calls of several steps, may round differently.
Nothing is written.
"""

import contextlib
import math
import pathlib
import traceback
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from cnn_cases import command, saved_runs
from cnn_cases.models import fast
from cnn_cases.training import checkpoint, devices, logbook, loop, programs, running

ROOT = pathlib.Path(__file__).parent.parent


class Replay(NamedTuple):
    """The result of a replayed step.

    Attributes:
      step: number of the step; the first is 1.
      first: step of the checkpoint from which the replay started; 0 for the beginning.
      examples: indices in the training split of the B examples in the batch.
      metrics: {"loss", "error", "grad_norm", "largest number of the state" after the step}.
      culprit: where the first NaN came from or, if there is none, the first infinite number; None if all
        numbers are finite, or if the second computation, which is split up differently, produces neither.
    """

    step: int
    first: int
    examples: list
    metrics: dict
    culprit: str | None


def replay(workdir, step=None, data_dir=""):
    """Repeats one step of a run; returns a `Replay`.

    Args:
      workdir: of a run of train.py.
      step: the step to repeat; None for the one at which the run diverged.
      data_dir: TFDS's directory; "" for the config's.

    Raises:
      ValueError: there is no such run or step, the checkpoint is damaged, or the training images are not
        those of the run.
    """
    workdir = pathlib.Path(workdir)
    config = saved_runs.load_config(workdir, data_dir)
    result = logbook.read_result(workdir)
    diverged = result if result and result["status"] == "diverged" else None
    step = _checked_step(step, workdir, config, diverged)
    saved = checkpoint.steps(workdir / "checkpoints")
    first = max((one for one in saved if one < step), default=0)
    program = programs.make_program(config, saved_runs.usable_devices(config))
    starts = saved_runs.read_starts(workdir)
    logbook.warn_of_devices(workdir, config, starts, len(program.devices))
    saved_runs.check_data(workdir, starts, program.feed)
    if first:
        state = checkpoint.read(workdir / "checkpoints", first, program.shapes_of_state())
    else:
        state = saved_runs.initial_state(workdir, config, program)
    seeds = _seeds(range(first, step), workdir, config, saved, diverged)

    batches = before = metrics = None
    hidden = not logbook.is_watched()
    for done in tqdm(range(first, step), unit=" steps", disable=hidden, leave=False):
        if batches is None or seeds[done] != seeds[done - 1]:
            batches = program.feed.train_batches(seeds[done], done)
            state = devices.replicate(state.replace(seed=np.int32(seeds[done])), program.devices)
        batch = jax.tree.map(lambda leaf: leaf[None], next(batches))
        batch = devices.shard(batch, len(program.devices), axis=1)
        if done == step - 1:
            before = jax.device_get(state)
        state, metrics = program.train(state, program.arrays, batch)
    batches.close()
    metrics = {name: metrics[name].item() for name in running.NAMES}
    metrics["largest number of the state"] = loop.max_abs(state)
    culprit = None
    if not all(map(math.isfinite, metrics.values())):
        culprit = _culprit(program, before, batch, infs=False) or _culprit(program, before, batch, infs=True)
    examples = program.feed.training_examples(seeds[step - 1], step - 1).tolist()
    return Replay(step, first, examples, metrics, culprit)


def _checked_step(step, workdir, config, diverged):
    """Returns the step to repeat; raises ValueError if the run never reached it.

    `diverged` is the content of result.json if the run diverged, else None.
    """
    if step is None and not diverged:
        raise ValueError(f"{workdir} did not diverge: name a step")
    if step is None:
        step = diverged["step"]
    if not 1 <= step <= config.num_steps:
        raise ValueError(f"step = {step} must be between 1 and num_steps = {config.num_steps}")
    if diverged and step > diverged["step"]:
        raise ValueError(f"step = {step} was never reached: {workdir} diverged at step {diverged['step']}")
    return step


def _seeds(steps, workdir, config, saved, diverged):
    """Returns {number of steps done before: seed of the batches of the next step}.

    Args:
      steps: a range of these numbers.
      workdir, config: of the run.
      saved: the steps of its checkpoints.
      diverged: the content of result.json if the run diverged, else None.
    """
    rewound_to = []
    # The first checkpoint at or after `last` determines the seeds up to there: no later rewind passed it.
    last = min(steps.stop, diverged["checkpoint"]) if diverged else steps.stop
    if config.on_nonfinite == "rewind" and steps.start < last:
        after = min((one for one in saved if one >= last), default=None)
        if after is None:
            raise ValueError(
                f"step = {steps.stop}: with on_nonfinite = 'rewind' the run may have gone back, and there is "
                f"no checkpoint of step {last} or later to tell; name a step up to {max(saved, default=0)}"
            )
        rewound_to = loop.extra_of(checkpoint.read_extra(workdir / "checkpoints", after), after).rewound_to
    return {
        done: diverged["seed_of_batches"]
        if diverged and done >= diverged["checkpoint"]
        else loop.seed_of_batches(config.seed, rewound_to, done)
        for done in steps
    }


def _culprit(program, state, batch, *, infs):
    """The project's lines that led to the first NaN or, if `infs`, infinite number; None if there is none."""
    # The max pooling of `fast` pads with negative infinity.
    with_flax = fast.written_for("tpu") if infs else contextlib.nullcontext()
    try:
        with with_flax, jax.debug_nans(not infs), jax.debug_infs(infs):
            devices.vmap_train(program.train_steps)(state, program.arrays, batch)
    except FloatingPointError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if pathlib.Path(frame.filename).is_relative_to(ROOT / "cnn_cases")]
        lines = [  # the innermost last
            f"{pathlib.Path(frame.filename).relative_to(ROOT)}:{frame.lineno} in {frame.name}: {frame.line}"
            for frame in ours
            if frame.filename != __file__
        ]
        what = "infinite number" if infs else "NaN"
        return "\n".join([f"the first {what} came from", *lines])
    return None


def main():
    """Replays the step that the flags name, and prints what it did."""
    done = replay(flags.FLAGS.workdir, flags.FLAGS.step, flags.FLAGS.data_dir)
    start = f"the checkpoint of step {done.first}" if done.first else "the beginning"
    print(f"step {done.step}, reached from {start}")
    for name, value in done.metrics.items():
        print(f"  {name}: {value:.6g}")
    print(f"  examples of the training split: {', '.join(map(str, done.examples))}")
    if done.culprit:
        print(f"  {done.culprit}".replace("\n", "\n    "))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The directory of a run.", required=True)
    flags.DEFINE_integer("step", None, "Which step, from 1; by default the one at which the run diverged.")
    saved_runs.define_data_dir()
    command.run(main)
