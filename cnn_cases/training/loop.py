"""The training loop: config -> data set, model, optimizer -> state -> steps -> log, checkpoints, evaluation.

If several processes share a run, all execute this code (see `devices`). Anything that must not differ between
them comes from process 0; only process 0 has a log and checkpoints.
"""

import collections
import contextlib
import datetime
import itertools
import multiprocessing
import pathlib
import shlex
import signal
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnn_cases import settings
from cnn_cases.stopping import InterruptedRun, stop_signals
from cnn_cases.training import checkpoint, logbook, predictions, processes, programs, transfer
from cnn_cases.training import devices as devices_lib
from cnn_cases.training.checkpoint import Checkpoints, check_path
from cnn_cases.training.provenance import environment, what_runs
from cnn_cases.training.running import DivergedError, RunningMetrics, check_finite

MAX_REWINDS = 3  # to one checkpoint


class Silence:
    """Stands in for the log and the checkpoints in all processes but process 0."""

    def _nothing(self, *_):
        return None

    write = progress = say = start = flush = close = start_profile = stop_profile = _nothing
    save = note_error = wait = restore = _nothing


def train_and_evaluate(config, workdir, *, program=None, show_progress=True):
    """Trains one network, or resumes where an earlier call on the same workdir stopped.

    Args:
      config: from `configs/`.
      workdir: the run's directory, which only process 0 uses; see `logbook` for its files.
      program: `programs.make_program` of this config or of one that differs only in the seed; None: build it.
      show_progress: report the progress on standard error.

    Returns:
      The content of result.json: {"status": "finished", "step", "metrics", "nonfinite": the steps that were
      skipped or led to a rewind, "seconds": since the last start, "date": of the end}.

    Raises:
      ValueError: the config is invalid, the workdir belongs to another config, cannot be written or is
        damaged, the processes differ, or a worker process that imports the caller's script called this.
      OSError: a checkpoint could not be saved.
      DivergedError: the loss, the gradient or the state became NaN or infinite, and `on_nonfinite` ends the
        run. The last good checkpoint is kept, and result.json has what `cnn_cases.replay` needs:
        {"status": "diverged", "step", "reason", "checkpoint": step of the last one, "seed_of_batches",
        "examples": indices, in the training split, of the examples in the step's batch, "seconds", "date"}.
      InterruptedRun: SIGTERM, SIGINT or SIGUSR2 reached any of the processes; the run was saved.
    """
    started = time.monotonic()
    _check_not_in_worker()
    workdir = pathlib.Path(workdir)
    settings.check(config)  # a config that JSON cannot hold could not be compared with the workdir's
    check_path(workdir)
    _check_alike(config)
    earlier = processes.from_lead(lambda: _earlier_result(workdir, config))
    if earlier:
        if earlier["status"] == "diverged":
            raise DivergedError(
                f"{workdir}: this run diverged at step {earlier['step']} and would diverge again; "
                "change its config and use another workdir",
                earlier["step"],
            )
        if show_progress and processes.is_lead():
            processes.tell(f"{workdir}: finished before, {format_metrics(earlier['metrics'])}")
        return earlier
    # Everything that a bad config can break is built before the workdir is touched. Process 0 goes first: it
    # may prepare the data set, which the other processes then find.
    resumes = processes.from_lead(lambda: bool(checkpoint.steps(workdir / "checkpoints")))
    program = processes.lead_first(lambda: program or programs.make_program(config))
    start = processes.from_lead(lambda: _identity_of_start(config, workdir, resumes))
    if start:  # the other run may still be training, so its last step may change
        program = program.starting_from(start[0])
    state = processes.lead_first(lambda: _make_state(config, program, resumes))
    data = program.feed.fingerprint()
    _check_same_data(data)
    data = data | {"start": start} if start else data
    log, checkpoints = processes.lead_first(lambda: _open(workdir, config, program, data, show_progress))
    with stop_signals() as stop, contextlib.closing(log), contextlib.closing(checkpoints):
        result = _train_to_the_end(
            config, program, state, workdir=workdir, log=log, checkpoints=checkpoints, stop=stop
        )
        result |= {
            "seconds": round(time.monotonic() - started, 2),
            "date": datetime.date.today().isoformat(),
        }
        processes.from_lead(lambda: logbook.write_result(workdir, result))
        if result["status"] == "diverged":
            kept = result["checkpoint"]
            raise DivergedError(
                f"{workdir}: the run diverged at step {result['step']}: {result['reason']}; "
                + (f"the last good checkpoint is of step {kept}" if kept else "there is no checkpoint yet")
                + f"; to see where: python -m cnn_cases.replay --workdir={shlex.quote(str(workdir))} "
                f"--step={result['step']}",
                result["step"],
            )
        final = result["metrics"]
        log.say(f"{workdir}: {format_metrics(final)}")
    number = max(processes.gather(stop.number))
    if number:  # too late to stop this run, but the caller may have more runs
        raise InterruptedRun(f"{signal.Signals(number).name}: {workdir} is finished and saved", number)
    return result


def _check_not_in_worker():
    """Raises ValueError in a process that, as it starts, runs the script of the process that started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            "a worker process first runs the script that started it, and so would train, too; put what the "
            'script does below `if __name__ == "__main__":`'
        )


def _check_alike(config):
    """Raises ValueError unless a run's processes have the same config, code, packages and devices."""
    if not processes.is_one_of_several():
        return
    # First: nothing can be gathered from processes with different numbers of devices.
    devices_lib.of_all_processes(devices_lib.local_devices())
    ours = what_runs(environment())
    lead, *others = processes.gather({"config": config.to_dict()} | ours)
    # profile_steps must agree, too: a process waits for its devices there and would get out of step.
    aside = tuple(key for key in logbook.OF_THE_MACHINE if key.startswith("data."))
    for index, other in enumerate(others, start=1):
        sides = "in process 0", f"in process {index}"
        lines = logbook.differences(lead, other, aside=aside, sides=sides)
        if lines:
            raise ValueError(
                f"process {index} differs from process 0:\n  "
                + "\n  ".join(lines)
                + "\nGive all processes of a run the same config, code and packages"
            )


def _identity_of_start(config, workdir, resumes):
    """Returns `transfer.identity` of what a run starts from, as its workdir records it on resume; or None."""
    if not config.start.workdir:
        return None
    if resumes:
        return logbook.noted_start(workdir)
    return transfer.identity(config.start.workdir, config.start.step)


def _check_same_data(data):
    """Raises ValueError unless the data of all processes of a run have the same fingerprint, `data`."""
    lead, *others = processes.gather(data)
    for index, other in enumerate(others, start=1):
        if other != lead:
            raise ValueError(
                f"process {index} reads other data than process 0: {lead} in process 0, {other} in process "
                f"{index} (number and checksum of the examples of each split); give all processes copies of "
                "the same data set"
            )


def _make_state(config, program, resumes):
    """Returns the state before the first step, None if the run resumes; checks the network in both cases."""
    state = None if resumes else program.init_state(config.seed)
    programs.check_network(program, state or program.shapes_of_state(), config)
    return state


def _open(workdir, config, program, data, show_progress):
    """Opens the log and the checkpoints."""
    if not processes.is_lead():
        return Silence(), Silence()
    devices = devices_lib.of_all_processes(program.devices)
    logbook.warn_of_devices(workdir, config, logbook.read_environments(workdir), len(devices))
    log = logbook.Logbook(
        workdir,
        config.to_dict(),
        data=data,
        inputs=program.inputs(config),
        num_steps=config.num_steps,
        show_progress=show_progress,
        devices=devices,
    )
    try:
        return log, Checkpoints(workdir / "checkpoints", config.checkpoint.keep_last)
    except BaseException:
        log.close()  # and release the lock, which a notebook would keep
        raise


def _train_to_the_end(config, program, state, *, workdir, log, checkpoints, stop):
    """Trains from the last checkpoint, or from `state`, to the end; returns the content of result.json.

    If `state` is None, it is made only if needed: what a run started from may be gone when it resumes.

    A run that rewinds passes its checkpoint more than once, each time with other batches. How often, and so
    with which batches, does not depend on kills in between: a checkpoint lists the steps that had failed
    before it was saved, and steps that failed later fail again. Say the checkpoint of step 200 lists none,
    and step 250 fails. Then `nonfinite` is [250] and `rewound_to` [200], and the batches after step 200 are
    drawn with another seed. If the run is killed before it saves again, both lists are lost; the next start
    restores step 200 with the first seed, and step 250 fails as before. If the run reaches step 300, the
    checkpoint there holds both lists. A signal saves one more checkpoint, to which the run may then rewind.
    """
    running = RunningMetrics([], [], [])
    if not _measures_all_saved(config):
        log.say(
            "checkpoint.best_on: only checkpoints at whose step "
            f"{config.checkpoint.best_on!r} is evaluated can be the best"
        )
    while True:
        step, state, extra = _restore(config, program, state, log, checkpoints)
        saved = len(extra.nonfinite)
        running = RunningMetrics(
            [*extra.window],
            [*extra.nonfinite, *running.nonfinite[saved:]],
            # If a damaged checkpoint was skipped, the restored one is earlier than the one noted.
            [*extra.rewound_to, *(min(kept, step) for kept in running.rewound_to[saved:])],
        )
        seed = seed_of_batches(config.seed, running.rewound_to, step)
        if step:
            rewinds = f", rewind {len(running.rewound_to)}" if running.rewound_to else ""
            log.say(f"{workdir}: resuming after step {step}{rewinds}")
        else:
            log.say(f"{workdir}: {_described(config, program, state)}")
        final = extra.final
        try:
            if final is None:
                with contextlib.closing(program.feed.train_batches(seed, step)) as batches:
                    training = _Training(
                        config,
                        program,
                        state.replace(seed=np.int32(seed)),
                        _calls(batches, step, config.num_steps, program),
                        running,
                        log=log,
                        checkpoints=checkpoints,
                        stop=stop,
                    )
                    final = training.run(step, evaluated=extra.evaluated)
            processes.from_lead(checkpoints.wait)  # a run whose last save failed is not finished
        except DivergedError as error:
            processes.from_lead(checkpoints.wait)
            kept = processes.from_lead(lambda: max(checkpoint.steps(workdir / "checkpoints"), default=0))
            # This is the first failure after `kept` if `kept` is newer than the restored checkpoint.
            before = len(running.nonfinite) - saved if kept == step else 0
            running.nonfinite.append(error.step)
            if config.on_nonfinite == "rewind" and before < MAX_REWINDS:
                log.say(f"step {error.step}: {error}; going back to step {kept}")
                running.rewound_to.append(kept)
                state = None  # the previous one has been donated
                continue
            return {
                "status": "diverged",
                "step": error.step,
                "reason": str(error),
                "checkpoint": kept,
                "seed_of_batches": seed,
                "examples": program.feed.training_examples(seed, error.step - 1).tolist(),
            }
        return {
            "status": "finished",
            "step": config.num_steps,
            "metrics": final,
            "nonfinite": running.nonfinite,
        }


def _described(config, program, state):
    """Returns a summary: `resnet_cifar, 272,474 parameters, 5.1 epochs, on 2 x cpu, 10 steps per call`."""
    devices = collections.Counter(
        device.device_kind for device in devices_lib.of_all_processes(program.devices)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    where = " and ".join(f"{number} x {kind}" for kind, number in devices.items())
    epochs = config.num_steps * config.batch_size / program.feed.num_train
    steps = f"{program.steps_per_call} step{'s' if program.steps_per_call > 1 else ''} per call"
    words = f"{config.model.name}, {count:,} parameters, {epochs:,.1f} epochs, on {where}, {steps}"
    if config.start.workdir:
        words += f", starting from {', '.join(config.start.layers)} of {config.start.workdir}"
    return words


def _restore(config, program, state, log, checkpoints):
    """Returns (step, state, `Extra`) of the last checkpoint, and starts the log after that step.

    Process 0 reads the checkpoint for all processes.
    """
    like = state or program.shapes_of_state()
    restored = processes.lead_first(lambda: checkpoints.restore(like))
    step, state, saved = restored or (0, state or program.init_state(config.seed), {})
    step, saved = processes.from_lead(lambda: (step, saved))
    extra = extra_of(saved, step) if saved else Extra()
    processes.lead_first(lambda: log.start(step, extra.rows))
    return step, processes.broadcast(state), extra


def seed_of_batches(seed, rewound_to, step):
    """Returns the seed of data order, augmentation and dropout for the step after the first `step` ones.

    Args:
      seed: the config's.
      rewound_to: see `running.RunningMetrics`.
      step: number of steps done.
    """
    rewinds = sum(kept <= step for kept in rewound_to)
    return int(np.random.default_rng((seed, rewinds)).integers(2**31)) if rewinds else seed


class Extra(NamedTuple):
    """What a checkpoint holds besides the state; the defaults are those of a run that has not begun.

    Attributes:
      window, nonfinite, rewound_to: see `running.RunningMetrics`.
      evaluated: whether the evaluation that was due at this step, if any, has been done.
      final: the final evaluation, after the last step.
      rows: the result of `logbook.Logbook.flush`.
    """

    window: Any = ()
    nonfinite: Any = ()
    rewound_to: Any = ()
    evaluated: bool = True
    final: Any = None
    rows: Any = None


def extra_of(saved, step):
    """Returns the `Extra` of a checkpoint; raises ValueError if older code saved it, with fewer keys.

    No default can stand in for a missing key: without `rows`, for example, all rows would be dropped.
    """
    missing = [key for key in Extra._fields if key not in saved]
    if missing:
        raise ValueError(
            f"the checkpoint of step {step} was saved by older code, without {', '.join(missing)}: this code "
            "can evaluate it, but not resume from it; use the code that saved it (see environment.json), or "
            "start another run from it with --config.start.workdir"
        )
    return Extra(**{key: saved[key] for key in Extra._fields})


class _Call(NamedTuple):
    """A call to the devices, whose results may not have been computed yet."""

    step: int  # number of steps done after it
    metrics: Any
    signal: Any  # the signal that any of several processes received, 0 for none
    rate: Any  # the learning rate, if a row of the log is due


class _StoppedError(Exception):
    """A signal arrived during an evaluation."""


class _Training:
    """The steps of a run from a checkpoint on, and the rows, evaluations and checkpoints that are due.

    A few calls are sent to the devices before earlier results are back, so they do not wait for the host. On
    a CPU, calls of several steps take so long that this would gain nothing, and a signal would wait for them.
    """

    def __init__(self, config, program, state, calls, running, *, log, checkpoints, stop):
        """Takes the state, whose memory the first step reuses, and the next calls' batches, see `_calls`."""
        self._config, self._program = config, program
        self._calls, self._running = calls, running
        self._next = next(calls, None)
        self._log, self._checkpoints, self._stop = log, checkpoints, stop
        self._state = devices_lib.replicate(state, program.devices)
        several = processes.is_one_of_several()
        self._of_all = devices_lib.pmap_max(program.devices) if several else None
        self._heard = 0  # the signal that any process received, as of the last collected call
        self._max_in_flight = 0 if program.loops_on_cpu else devices_lib.max_in_flight(program.devices)
        self._in_flight = collections.deque()
        self._restart_clock()

    def run(self, step, evaluated):
        """Trains to the end.

        Args:
          step: number of steps done.
          evaluated: whether the evaluation that was due at this step, if any, has been done.

        Returns:
          The final evaluation, {"<split>/<name>": number}.

        Raises:
          DivergedError, InterruptedRun, OSError: see `train_and_evaluate`.
        """
        config, values = self._config, {}
        if not evaluated:
            values = self._evaluate(step)
            if values is None:
                self._interrupt(step, self._stop.number)
            self._checkpoints.note_error(step, self._error_of(step, values))
        while step < config.num_steps:
            step = self._call(step)
            last = step == config.num_steps
            is_due = last or _is_due(step, config.evaluation.every_steps)
            values = self._evaluate(step) if is_due else {}
            # Read once: a signal can arrive at any moment. Several processes use the value that all share.
            number = self._heard if self._of_all else self._stop.number
            if number or self._save_is_due(step):
                self._save(step, values, final=values if last else None)
            if number and (not last or values is None):
                self._interrupt(step, number)
        return values

    def _interrupt(self, step, number):
        processes.from_lead(self._checkpoints.wait)  # or the message would not be true
        name = signal.Signals(number).name
        raise InterruptedRun(f"{name}: saved after step {step}; start again to resume", number)

    def _call(self, step):
        """Sends the next steps to the devices; returns the number of steps done after them."""
        config, program = self._config, self._program
        first_profiled, last_profiled = config.profile_steps or (0, 0)
        before = step
        step, batches = self._next
        if before < first_profiled <= step:
            self._collect()
            self._log.start_profile()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            self._state, metrics = program.train(self._state, program.arrays, batches)
        number = self._of_all(self._stop.number, metrics) if self._of_all else 0
        # Not when the row is written: the rate would then be computed after the calls in flight.
        row_is_due = step == config.num_steps or _is_due(step, config.log_every_steps)
        rate = program.schedule(step - 1) if row_is_due else None
        self._in_flight.append(_Call(step, metrics, number, rate))
        self._next = next(self._calls, None)  # while the devices compute, since a stream has to decode it
        self._collect(at_most=self._max_in_flight)
        if before < last_profiled <= step:
            self._collect()
            self._log.stop_profile()
        return step

    def _collect(self, at_most=0):
        """Waits until at most `at_most` calls are in flight; adds the metrics of the finished calls."""
        while len(self._in_flight) > at_most:
            call = self._in_flight.popleft()
            metrics, self._heard = jax.device_get(call.metrics), int(call.signal)
            for line in self._running.add(call.step, metrics):
                self._log.say(line)
            self._timed_steps += len(metrics["loss"])
            if call.rate is not None:
                self._write_row(call.step, float(call.rate))

    def _write_row(self, step, learning_rate):
        config, running = self._config, self._running
        means = running.take()
        values = means | {"learning_rate": learning_rate}
        if config.on_nonfinite == "skip":
            before = (step - 1) // config.log_every_steps * config.log_every_steps
            values["running/skipped"] = sum(number > before for number in running.nonfinite)
        self._log.write(step, values)
        if means:
            rate = self._timed_steps * config.batch_size / (time.monotonic() - self._clock)
            left = (config.num_steps - step) * config.batch_size / rate
            self._log.progress(step, means, rate, left)
        self._restart_clock()

    def _restart_clock(self):
        """Restarts the count of images per second, at each row, evaluation and checkpoint."""
        self._clock, self._timed_steps = time.monotonic(), 0

    def _evaluate(self, step):
        """Returns and logs the evaluation of this step; None if a signal ended it, so it is still due."""
        self._collect()
        config, values = self._config, {}
        last = step == config.num_steps
        protocol, size = config.evaluation.protocol, config.evaluation.batch_size
        arguments = self._program, self._state
        try:
            for split in config.evaluation.final_splits if last else config.evaluation.splits:
                values |= programs.evaluate(*arguments, split, check_stop=self._check_stop)
                if last and protocol != "single" and split != "train":  # not train: many views of many images
                    told = programs.predict(
                        *arguments, split, protocol, batch_size=size, check_stop=self._check_stop
                    )
                    values |= {f"{split}/{protocol}/{name}": value for name, value in _scores(*told).items()}
        except _StoppedError:
            return None
        finally:
            self._restart_clock()
        check_finite(step, values)
        if values:
            self._log.write(step, values)
            self._log.say(f"step {step}/{config.num_steps}: {format_metrics(values)}")
        return values

    def _check_stop(self):
        """Ends an evaluation if a signal arrived. One of several processes cannot do that on its own."""
        if self._stop.number and not self._of_all:
            raise _StoppedError

    def _save(self, step, values, final):
        self._collect()
        # A step's metrics are computed before its update, and the update itself may have gone wrong.
        check_finite(step, {"largest number of the state": max_abs(self._state)})
        extra = Extra(
            window=[*self._running.window],
            nonfinite=[*self._running.nonfinite],
            rewound_to=[*self._running.rewound_to],
            evaluated=values is not None,
            final=final,
            rows=self._log.flush(),
        )
        self._checkpoints.save(step, self._state, extra._asdict(), self._error_of(step, values))
        self._restart_clock()

    def _error_of(self, step, values):
        """Returns the error by which the best checkpoint is chosen; None if it was not measured.

        A checkpoint that only a signal made has none either: which one is best must not depend on signals.
        """
        measured = values and self._save_is_due(step)
        return values.get(f"{self._config.checkpoint.best_on}/error") if measured else None

    def _save_is_due(self, step):
        """Returns whether the state is saved at this step even without a signal."""
        config = self._config
        return step == config.num_steps or _is_due(step, config.checkpoint.every_steps)


def _calls(batches, step, num_steps, program):
    """Yields (number of steps done after a call, its batches as `program.train` takes them), after `step`."""
    while step < num_steps:
        # If the run was stopped with another steps_per_call, a shorter call realigns it.
        before, step = step, step + program.steps_per_call - step % program.steps_per_call
        stacked = jax.tree.map(_stack, *itertools.islice(batches, step - before))
        yield step, devices_lib.shard(stacked, len(program.devices), axis=1)


def _scores(probabilities, label):
    """Returns `predictions.scores` over all processes, each of which has predicted its own examples."""
    own = len(label), predictions.scores(probabilities, label) if len(label) else {}
    counts, parts = zip(*(part for part in processes.gather(own) if part[0]), strict=True)
    if not parts[1:]:
        return parts[0]
    return {name: float(np.average([part[name] for part in parts], weights=counts)) for name in parts[0]}


def max_abs(state):
    """Returns the largest absolute value in a state, except integer counters; NaN if any value is NaN."""
    # In NumPy, on a host copy that saving needs anyway: JAX would compile two programs per shape.
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return float(np.max([np.abs(leaf).max() for leaf in jax.device_get(leaves)]))


def _stack(*leaves):
    """Stacks leaves as np.stack does, but does not copy a single one: streamed images are large."""
    return np.stack(leaves) if leaves[1:] else leaves[0][None]


def format_metrics(metrics):
    """Returns {name: number} as text, with errors, which are fractions, in percent."""
    return ", ".join(
        f"{name} {value:.2%}" if name.endswith("error") else f"{name} {value:.4f}"
        for name, value in metrics.items()
    )


def _measures_all_saved(config):
    """Returns whether no best checkpoint is kept, or every checkpoint has the error that chooses it."""
    best_on, evaluation, saving = config.checkpoint.best_on, config.evaluation, config.checkpoint.every_steps
    in_time = not saving or (evaluation.every_steps and saving % evaluation.every_steps == 0)
    return not best_on or (in_time and best_on in evaluation.final_splits)


def _is_due(step, every_steps):
    return bool(every_steps) and step % every_steps == 0


def _earlier_result(workdir, config):
    """Returns the content of result.json; None if this run has not ended before."""
    result = logbook.read_result(workdir)
    if result:
        logbook.check_owner(workdir, config.to_dict())
    return result
