"""Files that are written completely or not at all, and directories that only one process at a time uses."""

import contextlib
import fcntl
import json
import logging
import os
import platform


@contextlib.contextmanager
def writing(workdir):
    """Turns an OSError, whose message may name no file, into a ValueError that names the workdir."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"workdir = {workdir} cannot be written: {error}") from error


def lock(workdir):
    """Keeps other processes from training in `workdir`, a pathlib.Path, which is created if needed.

    The kernel releases the lock when the process ends, however it ends, so that no stale lock remains.

    Returns:
      An open file; closing it releases the lock.

    Raises:
      ValueError: another process has the lock (the message names the process and its host), or the workdir
        cannot be written.
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
            f"workdir = {workdir} is in use by {holder}; wait until it ends, or use another workdir"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): make sure that only one process uses it", workdir, error
        )
    try:
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
    except ValueError:
        with contextlib.suppress(OSError):  # closing tries again to write what could not be written
            file.close()
        raise
    return file


def read_json(path, kind, remedy):
    """Returns the content of a JSON file.

    Args:
      path: of the file.
      kind: the expected type of the content, dict or list.
      remedy: what to do about a damaged file, for the error message.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged (it holds no {kind.__name__}); {remedy}")
    return value


def write_json(path, value):
    """Writes a JSON file completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Writes a file completely or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """Writes a file completely or not at all."""
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
    """Flushes a file, or the names in a directory, to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
