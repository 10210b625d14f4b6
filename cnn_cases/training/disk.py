"""Files that are written as a whole or not at all, and directories that are for one process at a time."""

import contextlib
import fcntl
import json
import logging
import os
import platform


@contextlib.contextmanager
def writing(workdir):
    """Raises ValueError, naming the workdir, where the disk says no: its own words may name no file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"workdir = {workdir} cannot be written: {error}") from error


def lock(workdir):
    """Keeps other processes from training in `workdir`, a pathlib.Path, which is made if it is not there.

    The lock is the kernel's: it goes with the process, however that ends, so that none is ever left behind.

    Returns:
      An open file; the lock is given back when it is closed.

    Raises:
      ValueError: another process has it (the message names that one and its host), or the workdir cannot be
        written.
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = file.read().strip() or "another process"
        raise ValueError(
            f"workdir = {workdir} is in use by {holder}; wait for its end, or use another workdir"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): see to it that one process alone uses it", workdir, error
        )
    try:
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
    except ValueError:
        with contextlib.suppress(OSError):  # what could not be written cannot be now
            file.close()
        raise
    return file


def read_json(path, kind, remedy):
    """What a JSON file holds.

    Args:
      path: of the file.
      kind: the type that it should hold, dict or list.
      remedy: what to do about a damaged one, for the message.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged (it holds no {kind.__name__}); {remedy}")
    return value


def write_json(path, value):
    """Writes a JSON file as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Writes a file as a whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """Writes a file as a whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def sync(path):
    """Brings a file, or the names in a directory, to the disk, where they outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
