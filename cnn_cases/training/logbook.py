"""What a run leaves behind for people: config, environment, metrics, progress.

    config.json        the resolved config; a workdir belongs to one
    environment.json   commit, versions and devices of each start
    metrics.jsonl      one row a line: {"step": ..., "running/loss": ..., "validation/error": ...}
    tensorboard/       the same figures as event files
    result.json        written once, at the end
    profile/           where the config asks for one, for TensorBoard and Perfetto
    lock               held by the process that trains; it says which one

Of several processes that do one training, process 0 alone writes; environment.json has the devices of all.

`running/` figures are means over the steps since the last row, in training mode and with augmentation; the
figures of a split are an evaluation of the whole of it. Rows hold nothing that depends on the clock, so
two runs of one config leave equal files.
"""

import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import subprocess
import sys

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


class Logbook:
    """The log of one run."""

    def __init__(self, workdir, config, *, num_steps, title, show_progress):
        """Opens or creates the log of `workdir`.

        Args:
          workdir: a directory.
          config: the resolved config, as a dict that JSON can hold.
          num_steps: length of the run, for the progress bar.
          title: of the progress bar.
          show_progress: print a line at each evaluation, and on a terminal draw a bar.

        Raises:
          ValueError: the workdir belongs to another config, is in use, or cannot be written.
        """
        self._workdir = pathlib.Path(workdir)
        claim(self._workdir, config)
        self._lock = _lock(self._workdir)
        environments = self._workdir / "environment.json"
        starts = json.loads(environments.read_text()) if environments.exists() else []
        write_json(environments, [*starts, environment()])
        self._rows_path = self._workdir / "metrics.jsonl"
        self._rows = self._tensorboard = None
        self._is_profiling = False
        self._show_progress = show_progress
        self._bar = tqdm(
            total=num_steps,
            desc=title,
            unit=" steps",
            disable=not (show_progress and sys.stderr.isatty()),
            leave=False,
            dynamic_ncols=True,
        )

    def start(self, step):
        """Goes on after `step`, wherever the log ends: rows of later steps are dropped."""
        self._close_rows()
        rows = [row for row in read_rows(self._rows_path) if row["step"] <= step]
        write_text(self._rows_path, "".join(json.dumps(row) + "\n" for row in rows))
        self._rows = self._rows_path.open("a")
        self._tensorboard = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=step + 1)
        self._bar.update(step - self._bar.n)
        self._bar.unpause()  # the time left is reckoned from here

    def write(self, step, values):
        """Adds a row: {name: number}."""
        self._rows.write(json.dumps({"step": step} | values) + "\n")
        self._rows.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def progress(self, step, values, images_per_second):
        """Shows where the run stands; on a terminal as a bar."""
        shown = {
            "loss": f"{values['running/loss']:.4f}",
            "accuracy": f"{1 - values['running/error']:.2%}",
            "images/s": f"{images_per_second:,.0f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, message):
        """One line for the person who watches; nothing where no progress is shown."""
        if self._show_progress:
            tqdm.write(message, file=sys.stderr)

    def start_profile(self):
        """Starts to note what the devices and the host do."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # thousands of Python's own calls would hide all others
        directory = self._workdir / "profile"
        jax.profiler.start_trace(directory, create_perfetto_trace=True, profiler_options=options)
        self._is_profiling = True

    def stop_profile(self):
        """Writes what was noted, if anything is."""
        if self._is_profiling:
            self._is_profiling = False
            jax.profiler.stop_trace()

    def flush(self):
        """Brings all rows to the disk."""
        os.fsync(self._rows.fileno())
        self._tensorboard.flush()

    def close(self):
        """Ends the log."""
        self.stop_profile()
        self._bar.close()
        self._close_rows()
        self._lock.close()

    def _close_rows(self):
        if self._rows is not None:
            self._rows.close()
            self._tensorboard.close()


def claim(workdir, config):
    """Makes `workdir` belong to `config`.

    Raises:
      ValueError: it belongs to another config (the message shows what differs), or it cannot be written.
    """
    path = pathlib.Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        lines = differences(json.loads(path.read_text()), config)
        if lines:
            raise ValueError(
                f"workdir = {workdir} belongs to another config:\n  "
                + "\n  ".join(lines)
                + "\nUse another workdir, or the config that this one was started with"
            )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
    except OSError as error:
        raise ValueError(f"workdir = {workdir} cannot be written: {error}") from error


def _lock(workdir):
    """Keeps other processes from training in `workdir`.

    The lock is the kernel's: it goes with the process, however that ends, so that none is ever left behind.

    Returns:
      An open file; the lock is given back when it is closed.

    Raises:
      ValueError: another process has it; the message names that one and its host.
    """
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
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def differences(old, new, prefix=""):
    """How two nested dicts differ, in lines such as "optimizer.momentum: 0.9 there, 0.5 here"."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        there, here = old.get(key, "nothing"), new.get(key, "nothing")
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: {there!r} there, {here!r} here")
    return lines


def environment():
    """What a result may depend on besides its config."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _commit():
    """The commit of this code, with "-dirty" after local changes; None outside a git checkout."""
    here = pathlib.Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_rows(path):
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_json(path, value):
    """Writes a JSON file as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Writes a file as a whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
