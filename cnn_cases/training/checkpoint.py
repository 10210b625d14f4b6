"""Checkpoints of a run, through Orbax: asynchronous, atomic, verified before they are read."""

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
NEWEST = "newest_checkpoint"  # next to their directory; holds the step of the last committed one

DRAFTS = "*.orbax-checkpoint-tmp*"  # checkpoints that are not committed
# Errors that do not mean a damaged file: no permission, too many open files, an unreachable file server.
_NOT_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)

SECONDS_TO_DELETE = 0.5  # time that another process may need to delete a checkpoint

logger = logging.getLogger(__name__)


def check_path(directory):
    """Raises ValueError if checkpoints in this directory could not be saved or read.

    Orbax treats a path as a pattern, TensorStore a backslash as a slash, and a bucket is not a directory.
    TensorStore also takes the UTF-8 bytes of a path, and Python those of the locale: if they differ, the
    values of a checkpoint would lie in another directory than the checkpoint.
    """
    if re.match(r"\w+:/", str(directory)):
        raise ValueError(f"workdir = {directory} must be a directory; mount the bucket first")
    path = str(pathlib.Path(directory).absolute())
    if set(path) & set("*?[\\"):
        raise ValueError(f"workdir = {path}: its path must have no *, ?, [ or backslash")
    try:
        is_utf8 = path.encode() == os.fsencode(path)
    except UnicodeEncodeError:  # bytes that are no letters in this locale
        is_utf8 = False
    if not is_utf8:
        raise ValueError(
            f"workdir = {path!a}: its path must be UTF-8, and this process takes the names of files for "
            f"{sys.getfilesystemencoding()}; use ASCII letters alone, or a UTF-8 locale (PYTHONUTF8=1)"
        )


class OtherStateError(ValueError):
    """A checkpoint is intact, but its state is not one of this network and optimizer."""


class Checkpoints:
    """The checkpoints below one directory: the latest ones, and the best.

    A checkpoint holds the state and some JSON of the caller's. It is written to a temporary directory and
    committed once it is complete, with the checksums of its files, since Orbax keeps none. Orbax's metadata
    files `_CHECKPOINT_METADATA` and `commit_success.txt` have no checksum, since no value comes from them:
    if they are damaged or missing, the same state is restored.

    A file next to `directory` records the step of the newest checkpoint, so that deleted checkpoints are not
    mistaken for checkpoints that never existed. It is written after the commit: a kill in between leaves it
    one checkpoint behind.
    """

    def __init__(self, directory, keep_last):
        """Opens or creates `directory`.

        Args:
          directory: of the checkpoints, with a subdirectory for each step; it has passed `check_path`.
          keep_last: how many of the latest to keep, at least one, besides the one with the lowest `error`.

        Raises:
          OSError: `directory` cannot be created.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._newest = self._directory.with_name(NEWEST)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._policy = _LastAndBest(keep_last, _errors(self._directory))
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=_of_process_0_alone(),
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving = None  # (step, future) of the save in progress

    def save(self, step, state, extra, error=None):
        """Starts a save; returns when the state has been copied off the devices.

        Args:
          step: number of steps done.
          state: a pytree of arrays.
          extra: a value that JSON can hold.
          error: of the evaluation at this step, used to choose the best checkpoint; None if there was none.

        Raises:
          OSError: this save or the previous one failed; see `wait`.
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
        """Records the error of an evaluation that was done after the state had been saved; see `save`."""
        self.wait()
        self._policy.errors[step] = error
        disk.write_text(self._directory / str(step) / LATER_ERROR, json.dumps(error))

    def wait(self):
        """Waits for the save in progress.

        Raises:
          OSError: it failed, for example on a full disk; earlier checkpoints are unchanged.
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
        """Returns the step of the last committed checkpoint; None if there never was one."""
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
        """Reports in one line what Orbax and TensorStore report in hundreds."""
        try:
            yield
        except Exception as error:  # a failed write can make Orbax and TensorStore raise anything
            for draft in self._directory.glob(DRAFTS):
                shutil.rmtree(draft, ignore_errors=True)  # it may be what fills the disk
            kept = steps(self._directory)
            latest = (
                f"the latest checkpoint is that of step {kept[-1]}" if kept else "there is no checkpoint yet"
            )
            raise OSError(
                f"the checkpoint of step {step} could not be saved in {self._directory} "
                f"({_reason(error)}); {latest}; start again to resume"
            ) from error

    def restore(self, like):
        """Restores the newest intact checkpoint.

        Damaged newer ones are moved to a directory `damaged` next to the checkpoints', with a warning.

        Args:
          like: a state of the same structure, shapes and types, or its `state.shapes_of_state`.

        Returns:
          (step, state with numpy leaves, extra), or None if there is no checkpoint.

        Raises:
          OtherStateError: a checkpoint is intact, but its state has another structure.
          ValueError: no checkpoint is intact, or the checkpoints that were saved are gone.
        """
        self.wait()
        noted = self._noted()
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_empty(like)), extra=ocp.args.JsonRestore())
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                _verify(self._directory / str(step))
                with _other_structure_refused(self._directory, step, like):
                    restored = self._manager.restore(step, args=items)
            except (OtherStateError, MemoryError):  # neither means that the file is damaged
                raise
            except Exception as error:  # a damaged file can make Orbax and TensorStore raise anything
                if getattr(error, "errno", None) in _NOT_OF_THE_FILE:
                    raise
                damaged[step] = error
                continue
            _check_structure(self._directory, step, restored.state, like)
            for bad, error in damaged.items():
                logger.warning(
                    "checkpoint %d is damaged (%s); resuming from step %d", bad, _first_line(error), step
                )
                self._set_aside(bad)
            if noted is not None and noted > max([step, *damaged]):
                logger.warning("checkpoint %d is missing; resuming from step %d", noted, step)
            if noted != step:
                self._note(step)
            return step, restored.state, restored.extra["extra"]
        if damaged:
            raise ValueError(
                f"no checkpoint in {self._directory} can be read: "
                + "; ".join(f"step {step}: {_first_line(error)}" for step, error in damaged.items())
                + ". Nothing was changed; use another workdir to start over"
            )
        if noted is not None:
            raise ValueError(
                f"no checkpoint is left in {self._directory}, though one of step {noted} was saved there; "
                "restore it, or use another workdir to start over"
            )
        return None

    def _set_aside(self, step):
        target = self._directory.parent / "damaged" / str(step)
        target.parent.mkdir(exist_ok=True)
        number = sum(1 for _ in target.parent.glob(f"{step}*"))
        (self._directory / str(step)).rename(target.with_name(f"{step}-{number}") if number else target)
        self._manager.reload()

    def _add_checksums(self):
        # Orbax calls this after it has written all values and before it commits, but does not say where.
        for checkpoint in self._directory.glob(DRAFTS):
            (checkpoint / CHECKSUMS).write_text(json.dumps(_checksums(checkpoint)))
            # Orbax does not flush its files, and older checkpoints might be deleted before the system does.
            for path in (*checkpoint.rglob("*"), checkpoint):
                disk.sync(path)

    def close(self):
        """Waits for the save in progress, and closes the checkpoints.

        Raises:
          OSError: it failed; see `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # from a failed save, which has been reported
                self._manager.close()


def steps(directory):
    """Returns the steps that have a checkpoint in a directory of `Checkpoints`, in order; only reads."""
    names = (path.name for path in pathlib.Path(directory).glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())  # others are still being written


def find(directory, which):
    """Returns the step of a checkpoint; only reads.

    Args:
      directory: of `Checkpoints`.
      which: "last"; "best", the one whose evaluation had the lowest error; or a step.

    Raises:
      ValueError: there is no such checkpoint; the message lists the existing ones.
    """
    which = str(which)
    kept = steps(directory)
    if not kept:
        missing = "" if pathlib.Path(directory).exists() else ", which does not exist"
        raise ValueError(f"there is no checkpoint in {directory}{missing}")
    there = f"{directory} has steps {', '.join(map(str, kept))}"
    if which == "last":
        return kept[-1]
    if which == "best":
        errors = _errors(directory)
        if not errors:
            raise ValueError(f"no checkpoint has an evaluation error, so none is the best; {there}")
        return min(errors, key=errors.get)
    if not which.isdecimal() or int(which) not in kept:
        raise ValueError(f"there is no checkpoint of step {which!r}; {there}; or use 'last' or 'best'")
    return int(which)


def read(directory, step, like=None):
    """Returns the state of one checkpoint. Nothing is written or moved, not even a damaged checkpoint.

    Args:
      directory: of `Checkpoints`.
      step: as `find` returns it.
      like: a state of the same structure, shapes and types, or its `state.shapes_of_state`. None: any state,
        returned as nested dicts.

    Raises:
      OtherStateError: the checkpoint's state has another structure.
      ValueError: it is damaged.
    """
    directory = pathlib.Path(directory).absolute()
    # Not with Orbax's CheckpointManager, which would tidy up.
    reader = ocp.StandardCheckpointer(multiprocessing_options=_of_process_0_alone())
    with _read_only(directory, step) as checkpoint, reader:
        if like is None:
            return reader.restore(checkpoint / "state")
        with _other_structure_refused(directory, step, like):
            state = reader.restore(checkpoint / "state", _empty(like))
    _check_structure(directory, step, state, like)
    return state


def find_and_read(directory, which, like):
    """Returns (step, state) of a checkpoint, even if the run still trains and deletes older checkpoints.

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
                raise  # otherwise a newer or better one has replaced it


@contextlib.contextmanager
def _other_structure_refused(directory, step, like):
    """Turns Orbax's error into an OtherStateError if an intact checkpoint has another structure."""
    try:
        yield
    except Exception as error:  # Orbax has no specific error for that
        notes = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / "state")
        _check_structure(directory, step, notes, like)
        if "do not match" in str(error):  # in parts without arrays, which the metadata leave out
            raise _other_state(directory, step, "its optimizer state has another structure") from error
        raise


def _check_structure(directory, step, state, like):
    """Raises OtherStateError unless a state, or Orbax's metadata of one, has the names and shapes of `like`.

    Orbax restores a leaf in the shape in which it was saved, even if another is requested; if names differ,
    its error does not say which.
    """
    differing = different_shapes(state, like)
    lines = [f"{name} is {there} in the checkpoint but {here} now" for name, there, here in differing]
    if lines:
        more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
        raise _other_state(directory, step, "; ".join([*lines[:3], *more]))


def _other_state(directory, step, reason):
    return OtherStateError(
        f"checkpoint {step} in {directory} belongs to another network or optimizer: {reason}. Nothing was "
        "changed; use the code that saved it, or another workdir"
    )


def different_shapes(there, here):
    """Yields (name of a leaf, such as "params/conv1/bias", its shape there, here) where two trees differ."""
    there, here = _shapes(there), _shapes(here)
    for name in sorted(there.keys() | here.keys(), key=lambda name: (not name.startswith("params"), name)):
        if there.get(name) != here.get(name):
            yield name, there.get(name, "missing"), here.get(name, "missing")


def _shapes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape)) or "a number"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def checksum(directory, step):
    """Returns a number that identifies a checkpoint, the CRC-32 of its checksums; looks for no damage."""
    return zlib.crc32((pathlib.Path(directory) / str(step) / CHECKSUMS).read_bytes())


def _of_process_0_alone():
    # Of a run's processes, only process 0 reads and writes. Orbax would otherwise wait for the others.
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


def _empty(like):
    """Returns uninitialised arrays of the same shapes and types."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)


def read_extra(directory, step):
    """Returns the JSON that was saved with the state of one checkpoint; see `read`."""
    with _read_only(pathlib.Path(directory), step) as checkpoint:
        return _json_of(checkpoint)["extra"]


@contextlib.contextmanager
def _read_only(directory, step):
    """Yields the directory of an intact checkpoint; every error but OtherStateError becomes a ValueError."""
    try:
        _verify(directory / str(step))
        yield directory / str(step)
    except OtherStateError:
        raise
    except Exception as error:  # a damaged file can make Orbax and TensorStore raise anything
        raise ValueError(
            f"checkpoint {step} in {directory} cannot be read: {_first_line(error)}; "
            "nothing was changed; move it away, or choose another checkpoint by its step"
        ) from error


class _LastAndBest:
    """A preservation policy for Orbax: keep the latest checkpoints, and the one with the lowest error."""

    def __init__(self, keep_last, errors):
        self._keep_last, self.errors = keep_last, errors  # step -> error, or None where none was measured

    def should_preserve(self, checkpoints, *, context):
        del context
        there = [checkpoint.step for checkpoint in checkpoints]
        measured = {step: self.errors[step] for step in there if self.errors.get(step) is not None}
        kept = {*sorted(there)[-self._keep_last :], min(measured, key=measured.get, default=None)}
        return [step in kept for step in there]


def _errors(directory):
    """Returns {step: error of its evaluation}, without steps that have none, or none that can be read."""
    errors = {}
    for step in steps(directory):
        checkpoint = pathlib.Path(directory) / str(step)
        later = checkpoint / LATER_ERROR
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            errors[step] = json.loads(later.read_text()) if later.exists() else _json_of(checkpoint)["error"]
    return {step: error for step, error in errors.items() if error is not None}


def _json_of(checkpoint):
    """Returns the JSON that `Checkpoints.save` wrote next to the state."""
    return json.loads((checkpoint / "extra" / "metadata").read_text())


def _checksums(checkpoint):
    """Returns {file with values, relative to the directory `checkpoint`: CRC-32 of its bytes}."""
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
    """Returns why a save failed: the system's message for the error number in TensorStore's long message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else _first_line(error)


# `Checkpoints` reports a failed save in one line. Orbax and TensorStore print a thousand lines from their own
# threads, about each file that they could not write.
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
