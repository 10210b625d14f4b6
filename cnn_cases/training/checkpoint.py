"""Checkpoints of a run, through Orbax: asynchronous, atomic, checked before they are read."""

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from cnn_cases.training import disk

CHECKSUMS = "checksums.json"
LATER_ERROR = "error.json"  # in a checkpoint; see Checkpoints.note_error
NEWEST = "newest_checkpoint"  # beside the checkpoints; holds the step of the last that was committed

DRAFTS = "*.orbax-checkpoint-tmp*"  # checkpoints that are not committed
# Errors that say nothing against a file: no permission, too many open files, a file server that is away.
_NOT_OF_THE_FILE = (
    *(errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ETIMEDOUT),
)

logger = logging.getLogger(__name__)


def check_path(directory):
    """Raises ValueError where no checkpoint could be saved, or read again.

    Orbax takes a path for a pattern, TensorStore a backslash for a slash; and a bucket is no directory.
    """
    if re.match(r"\w+:/", str(directory)):
        raise ValueError(f"{directory}: a workdir must be a directory, which a bucket is once it is mounted")
    path = str(pathlib.Path(directory).absolute())
    if set(path) & set("*?[\\"):
        raise ValueError(f"{path}: the path of a workdir must have no *, ?, [ or backslash")


SECONDS_TO_DELETE = 0.5  # what another process may take


class OtherStateError(ValueError):
    """A checkpoint is whole, and the state that it holds is not one of this network and optimizer."""


class Checkpoints:
    """The checkpoints below one directory: the last ones, and the best.

    A checkpoint holds the state and some JSON of the caller's. It is written to a temporary directory and
    committed when it is whole, with the checksums of its files, since Orbax keeps none. Orbax's notes to
    itself have no checksum, `_CHECKPOINT_METADATA` and each `commit_success.txt`: no value comes from them.
    They may be damaged or missing, and the same state is restored.

    The step of the newest is noted in a file beside `directory`, so that checkpoints that somebody deleted
    are not taken for checkpoints that never were. It is noted after the commit: a kill in between leaves the
    note one behind.
    """

    def __init__(self, directory, keep_last):
        """Opens or creates `directory`.

        Args:
          directory: where the checkpoints lie, one directory a step; one that `check_path` has passed.
          keep_last: how many of the latest, at least one, are kept, besides the one with the lowest `error`.

        Raises:
          OSError: `directory` cannot be made.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._newest = self._directory.with_name(NEWEST)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._policy = _LastAndBest(keep_last)
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=_of_process_0_alone(),
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        for step in self._manager.all_steps():
            self._policy.errors[step] = _error_of(self._directory / str(step))
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving = None  # (step, future) of the save under way

    def save(self, step, state, extra, error=None):
        """Starts to save; returns when the state has been copied off the devices.

        Args:
          step: number of steps done.
          state: a pytree of arrays.
          extra: what JSON can hold.
          error: of the evaluation at this step, by which the best is chosen; None where there was none.

        Raises:
          OSError: this save, or the one before it, failed; see `wait`.
        """
        self.wait()
        self._policy.errors[step] = error
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(state)),
            extra=ocp.args.JsonSave({"error": error, "extra": extra}),
        )
        with self._failing_in_one_line(step):
            self._manager.save(step, args=items)
        self._saving = step, self._thread.submit(self._note_when_committed, step)

    def note_error(self, step, error):
        """Notes the error of an evaluation that was done when the state had been saved; see `save`."""
        self.wait()
        self._policy.errors[step] = error
        disk.write_text(self._directory / str(step) / LATER_ERROR, json.dumps(error))

    def wait(self):
        """Waits for the save under way.

        Raises:
          OSError: it failed, as on a full disk; the checkpoints before it are as they were.
        """
        if self._saving is not None:
            (step, future), self._saving = self._saving, None
            with self._failing_in_one_line(step):
                future.result()

    def _note_when_committed(self, step):
        self._manager.wait_until_finished()
        disk.sync(self._directory)
        self._note(step)

    def _note(self, step):
        disk.write_text(self._newest, f"{step}\n")

    def _noted(self):
        """The step of the last checkpoint that was committed; None where there never was one."""
        try:
            return int(self._newest.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise ValueError(
                f"{self._newest} is damaged: it should be the step of the newest checkpoint in "
                f"{self._directory}; write that step into it, and start again"
            ) from None

    @contextlib.contextmanager
    def _failing_in_one_line(self, step):
        """Tells in one line what Orbax and TensorStore tell in hundreds."""
        try:
            yield
        except Exception as error:  # whatever a file that cannot be written makes the libraries below raise
            for draft in self._directory.glob(DRAFTS):
                shutil.rmtree(draft, ignore_errors=True)  # it may be what fills the disk
            whole = sorted(int(path.name) for path in self._directory.glob("*") if path.name.isdecimal())
            raise OSError(
                f"the checkpoint of step {step} could not be saved in {self._directory} "
                f"({_reason(error)}); "
                + (f"the last one there is of step {whole[-1]}" if whole else "there is none yet")
                + "; start again to go on"
            ) from error

    def restore(self, like):
        """The newest checkpoint that is whole.

        A damaged one is moved to the directory `damaged` beside the checkpoints, with a warning.

        Args:
          like: a state of the same structure, shapes and types, or its `state.shapes_of_state`.

        Returns:
          (step, state with numpy leaves, extra), or None where there is no checkpoint.

        Raises:
          OtherStateError: a checkpoint is whole, and of a state of another structure.
          ValueError: there are checkpoints and none is whole, or there were some and they are gone.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        noted = self._noted()
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_empty(like)), extra=ocp.args.JsonRestore())
        damaged = {}
        for step in steps:
            try:
                _verify(self._directory / str(step))
                with _other_structure_refused(self._directory, step, like):
                    restored = self._manager.restore(step, args=items)
            except (OtherStateError, MemoryError):  # which say nothing against the file
                raise
            except Exception as error:  # whatever a damaged file makes the libraries below raise
                if getattr(error, "errno", None) in _NOT_OF_THE_FILE:
                    raise
                damaged[step] = error
                continue
            _check_structure(self._directory, step, restored.state, like)
            for bad, error in damaged.items():
                logger.warning(
                    "checkpoint %d is damaged (%s); going on from step %d", bad, _first_line(error), step
                )
                self._set_aside(bad)
            if noted is not None and noted > max([step, *damaged]):
                logger.warning("checkpoint %d is gone; going on from step %d", noted, step)
            if noted != step:
                self._note(step)
            return step, restored.state, restored.extra["extra"]
        if damaged:
            raise ValueError(
                f"no checkpoint in {self._directory} can be read: "
                + "; ".join(f"step {step}: {_first_line(error)}" for step, error in damaged.items())
                + ". Nothing was changed; use another workdir to start anew"
            )
        if noted is not None:
            raise ValueError(
                f"no checkpoint is left in {self._directory}, though one of step {noted} was saved there; "
                "put it back, or use another workdir to start anew"
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
        for checkpoint in self._directory.glob(DRAFTS):
            (checkpoint / CHECKSUMS).write_text(json.dumps(_checksums(checkpoint)))
            # Orbax leaves it to the system when to write them, and older checkpoints are deleted before that.
            for path in (*checkpoint.rglob("*"), checkpoint):
                disk.sync(path)

    def all_steps(self):
        """The steps that have a checkpoint."""
        return sorted(self._manager.all_steps())

    def close(self):
        """Waits for the save under way.

        Raises:
          OSError: it failed; see `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # of a save that failed, which has been told
                self._manager.close()


def steps(directory):
    """The steps that have a checkpoint below the directory of `Checkpoints`, in order; reads only."""
    names = (path.name for path in pathlib.Path(directory).glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())  # the others are still being written


def find(directory, which):
    """The step of a checkpoint; reads only.

    Args:
      directory: of `Checkpoints`.
      which: "last"; "best", the one whose evaluation had the lowest error; or a step.

    Raises:
      ValueError: there is no such checkpoint; the message lists those there are.
    """
    which = str(which)
    errors = {step: _error_of(pathlib.Path(directory) / str(step)) for step in steps(directory)}
    if not errors:
        missing = "" if pathlib.Path(directory).exists() else ", which does not exist"
        raise ValueError(f"there is no checkpoint in {directory}{missing}")
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


def read(directory, step, like=None):
    """The state of one checkpoint. Nothing is written or moved, not even a damaged one.

    Args:
      directory: of `Checkpoints`.
      step: of `find`.
      like: a state of the same structure, shapes and types, or its `state.shapes_of_state`. None: whatever
        the state is, it comes as nested dicts.

    Raises:
      OtherStateError: the checkpoint is of a state of another structure.
      ValueError: it is damaged.
    """
    directory = pathlib.Path(directory).absolute()
    # Not by the manager, which tidies up.
    reader = ocp.StandardCheckpointer(multiprocessing_options=_of_process_0_alone())
    with _read_only(directory, step) as checkpoint, reader:
        if like is None:
            return reader.restore(checkpoint / "state")
        with _other_structure_refused(directory, step, like):
            state = reader.restore(checkpoint / "state", _empty(like))
    _check_structure(directory, step, state, like)
    return state


def find_and_read(directory, which, like=None):
    """(step, state) of a checkpoint, also of a run that goes on and deletes its older ones meanwhile.

    Args:
      directory, which: see `find`.
      like: see `read`.

    Raises:
      OtherStateError, ValueError: as in `find` and `read`.
    """
    while True:
        step = find(directory, which)
        try:
            return step, read(directory, step, like)
        except ValueError:
            time.sleep(SECONDS_TO_DELETE)
            if find(directory, which) == step:
                raise  # else there is a newer one, or a better one


@contextlib.contextmanager
def _other_structure_refused(directory, step, like):
    """Has Orbax fail with an OtherStateError where a checkpoint, which is whole, is of another structure."""
    try:
        yield
    except Exception as error:  # Orbax has no error of its own for that
        notes = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / "state")
        _check_structure(directory, step, notes, like)
        if "do not match" in str(error):  # in parts without numbers, which the notes leave out
            raise _other_state(directory, step, "its optimizer is made of other parts") from error
        raise


def _check_structure(directory, step, state, like):
    """Raises OtherStateError unless a state, or what Orbax notes of one, has the names and shapes of `like`.

    Orbax restores a leaf in the shape that it was saved in, whatever is asked for; of other names it says
    that they do not match, and not which.
    """
    there, here = shapes(state), shapes(like)
    lines = [
        f"{name} is {there.get(name, 'nothing')} there and {here.get(name, 'nothing')} here"
        for name in sorted(there.keys() | here.keys(), key=lambda name: (not name.startswith("params"), name))
        if there.get(name) != here.get(name)
    ]
    if lines:
        more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
        raise _other_state(directory, step, "; ".join([*lines[:3], *more]))


def _other_state(directory, step, reason):
    return OtherStateError(
        f"checkpoint {step} in {directory} is of another network or optimizer: {reason}. Nothing was "
        "changed; take the code that it was saved by, or another workdir"
    )


def shapes(tree):
    """{name of a leaf, such as "params/conv1/kernel": its shape, in words}."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape)) or "a number"
        for path, leaf in leaves
    }


def checksum(directory, step):
    """A number that tells a checkpoint from others, the CRC-32 of its checksums; it looks for no damage."""
    return zlib.crc32((pathlib.Path(directory) / str(step) / CHECKSUMS).read_bytes())


def _of_process_0_alone():
    # Of several that do one training, it alone reads and writes. Orbax would wait for the others.
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


def _empty(like):
    """Arrays of the same shapes and types."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)


def read_extra(directory, step):
    """What was saved with the state of one checkpoint; see `read`."""
    with _read_only(pathlib.Path(directory), step) as checkpoint:
        return _json_of(checkpoint)["extra"]


@contextlib.contextmanager
def _read_only(directory, step):
    """The directory of a checkpoint that is as it was written; whatever goes wrong is a ValueError."""
    try:
        _verify(directory / str(step))
        yield directory / str(step)
    except OtherStateError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries below raise
        raise ValueError(
            f"checkpoint {step} in {directory} cannot be read: {_first_line(error)}; "
            "nothing was changed; move it away, or name another one by its step"
        ) from error


class _LastAndBest:
    """Orbax's preservation policy: keep the last checkpoints, and the one with the lowest error."""

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
    """The error of a checkpoint's evaluation; None where there was none, or where it cannot be read."""
    try:
        if (checkpoint / LATER_ERROR).exists():
            return json.loads((checkpoint / LATER_ERROR).read_text())
        return _json_of(checkpoint)["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _json_of(checkpoint):
    """What `Checkpoints.save` has put beside the state."""
    return json.loads((checkpoint / "extra" / "metadata").read_text())


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


def _reason(error):
    """Why a save failed: the system's word for it, which TensorStore's long message has as a number."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else _first_line(error)


# `Checkpoints` reports a save that failed in one line. The libraries below it print a thousand, of each file
# that they could not write, from threads of their own.
def _is_reported_already(record):
    by_orbax = record.name == "absl" and f"{os.sep}orbax{os.sep}" in record.pathname
    return (by_orbax and record.levelno == logging.ERROR) or (
        record.name == "asyncio" and "exception was never retrieved" in record.getMessage()
    )


def _unraisable(unraisable, before=sys.unraisablehook):
    # TensorStore reports to an event loop that Orbax has closed after the first error.
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(lambda record: not _is_reported_already(record))
sys.unraisablehook = _unraisable
