"""Checkpoints of a run, through Orbax: asynchronous, atomic, checked before they are read."""

import json
import logging
import pathlib
import zlib

import jax
import orbax.checkpoint as ocp

CHECKSUMS = "checksums.json"

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints below one directory: the last ones, and the best.

    A checkpoint holds the state and some JSON of the caller's. It is written to a temporary directory and
    committed when it is whole, with the checksums of its files, since Orbax keeps none.
    """

    def __init__(self, directory, keep_last):
        """Opens or creates `directory`.

        Args:
          directory: where the checkpoints lie, one directory a step.
          keep_last: how many of the latest are kept, besides the one with the lowest `error`.

        Raises:
          ValueError: `keep_last` is below 1.
        """
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last = {keep_last} must be 1 or more")
        self._directory = pathlib.Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._policy = _LastAndBest(keep_last)
        options = ocp.CheckpointManagerOptions(
            create=False,
            # Of several processes that do one training, the first alone comes here. Orbax would wait for all.
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        for step in self._manager.all_steps():
            self._policy.errors[step] = _error_of(self._directory / str(step))

    def save(self, step, state, extra, error=None):
        """Starts to save; returns when the state has been copied off the devices.

        Args:
          step: number of steps done.
          state: a pytree of arrays.
          extra: what JSON can hold.
          error: of the evaluation at this step, by which the best is chosen; None where there was none.
        """
        self._policy.errors[step] = error
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(state)),
            extra=ocp.args.JsonSave({"error": error, "extra": extra}),
        )
        self._manager.save(step, args=items)

    def restore(self, like):
        """The newest checkpoint that is whole.

        A damaged one is moved to the directory `damaged` beside the checkpoints, with a warning.

        Args:
          like: a state of the same structure, shapes and types.

        Returns:
          (step, state with numpy leaves, extra), or None where there is no checkpoint.

        Raises:
          ValueError: there are checkpoints and none is whole.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.device_get(like)), extra=ocp.args.JsonRestore()
        )
        damaged = {}
        for step in steps:
            try:
                _verify(self._directory / str(step))
                restored = self._manager.restore(step, args=items)
            except Exception as error:  # whatever a damaged file makes the libraries below raise
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                logger.warning(
                    "checkpoint %d is damaged (%s); going on from step %d", bad, _first_line(error), step
                )
                self._set_aside(bad)
            return step, restored.state, restored.extra["extra"]
        if damaged:
            raise ValueError(
                f"no checkpoint in {self._directory} can be read: "
                + "; ".join(f"step {step}: {_first_line(error)}" for step, error in damaged.items())
                + ". Nothing was changed; use another workdir to start anew"
            )
        return None

    def _set_aside(self, step):
        target = self._directory.parent / "damaged" / str(step)
        target.parent.mkdir(exist_ok=True)
        number = sum(1 for _ in target.parent.glob(f"{step}*"))
        (self._directory / str(step)).rename(target.with_name(f"{step}-{number}") if number else target)
        self._manager.reload()

    def _add_checksums(self):
        # Orbax calls this when all values are on disk and before it commits, with no word of where they are.
        for checkpoint in self._directory.glob("*.orbax-checkpoint-tmp*"):
            (checkpoint / CHECKSUMS).write_text(json.dumps(_checksums(checkpoint)))

    def all_steps(self):
        """The steps that have a checkpoint."""
        return sorted(self._manager.all_steps())

    def close(self):
        """Waits for the saves under way."""
        self._manager.close()


def steps(directory):
    """The steps that have a checkpoint below the directory of `Checkpoints`, in order; reads only."""
    names = (path.name for path in pathlib.Path(directory).glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())  # the others are still being written


def find(directory, which):
    """The step of a checkpoint; reads only.

    Args:
      directory: of `Checkpoints`.
      which: "last"; "best", the one whose evaluation had the lowest error; or a step, as text.

    Raises:
      ValueError: there is no such checkpoint; the message lists those there are.
    """
    errors = {step: _error_of(pathlib.Path(directory) / str(step)) for step in steps(directory)}
    if not errors:
        raise ValueError(f"there is no checkpoint in {directory}")
    there = f"{directory} has {', '.join(map(str, sorted(errors)))}"
    if which == "last":
        return max(errors)
    if which == "best":
        measured = {step: errors[step] for step in sorted(errors) if errors[step] is not None}
        if not measured:
            raise ValueError(f"no checkpoint was saved with an error that tells the best; {there}")
        return min(measured, key=measured.get)
    if not which.isdecimal() or int(which) not in errors:
        raise ValueError(f"there is no checkpoint of step {which!r}; {there}; 'last' and 'best' will do, too")
    return int(which)


def read(directory, step, like):
    """The state of one checkpoint. Nothing is written or moved, not even a damaged one.

    Args:
      directory: of `Checkpoints`.
      step: of `find`.
      like: a state of the same structure, shapes and types.

    Raises:
      ValueError: the checkpoint is damaged, or of another structure.
    """
    directory = pathlib.Path(directory).absolute()
    try:
        _verify(directory / str(step))
        # Not by the manager, which tidies up.
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(directory / str(step) / "state", jax.device_get(like))
    except Exception as error:  # whatever a damaged file makes the libraries below raise
        raise ValueError(
            f"checkpoint {step} in {directory} cannot be read: {_first_line(error)}; "
            "nothing was changed; name another one by its step"
        ) from error


class _LastAndBest:
    """Orbax's question which checkpoints to keep: the last ones, and the one with the lowest error."""

    def __init__(self, keep_last):
        self._keep_last = keep_last
        self.errors = {}  # step -> error, None where nothing was evaluated

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        measured = {step: self.errors[step] for step in steps if self.errors.get(step) is not None}
        kept = {*sorted(steps)[-self._keep_last :], *([min(measured, key=measured.get)] if measured else [])}
        return [step in kept for step in steps]


def _error_of(checkpoint):
    """The error that was saved with a checkpoint; None where there was none, or where it cannot be read."""
    try:
        return json.loads((checkpoint / "extra" / "metadata").read_text())["error"]
    except (OSError, ValueError, KeyError):
        return None


def _checksums(checkpoint):
    """{file with values, below the directory `checkpoint`: CRC-32 of its bytes}."""
    files = sorted(path for item in checkpoint.glob("*/") for path in item.rglob("*") if path.is_file())
    return {
        str(path.relative_to(checkpoint)): zlib.crc32(path.read_bytes())
        for path in files
        if path.name != "commit_success.txt"  # Orbax's own mark, set when it commits
    }


def _verify(checkpoint):
    """Raises ValueError, naming a file, unless all files with values are as they were written."""
    expected, found = json.loads((checkpoint / CHECKSUMS).read_text()), _checksums(checkpoint)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"{name} is {'not as it was written' if name in found else 'missing'}")


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
