"""The record of a run in its workdir: config, environment, metrics, progress.

    config.json        the resolved config; a workdir belongs to one config
    environment.json   commit, versions, devices, XLA's flags and data of each start
    inputs.npz         image shape, class names and pixel statistics, for `cnn_cases.predict`
    metrics.jsonl      one row per line: {"step": ..., "running/loss": ..., "validation/error": ...}
    tensorboard/       the same figures as event files
    result.json        written once, at the end
    profile/           if the config sets profile_steps, for TensorBoard and Perfetto
    lock               held by the process that trains; names that process

`checkpoint` adds checkpoints/, newest_checkpoint and, if it finds a damaged one, damaged/.

A damaged file is an error that names the file; the remedy depends on the file.

If several processes share a run, only process 0 writes; environment.json has the devices of all processes.

`running/` figures are means over the steps since the last row, in training mode and with augmentation; the
figures of a split are an evaluation of the whole split. Its loss is the config's, with label smoothing and
without side branches; that of a protocol, "<split>/<protocol>/loss", is -log of the true class's probability,
as in `cnn_cases.evaluate`. Rows hold nothing that depends on the clock, so two runs of one config leave the
same metrics.jsonl.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import zlib

import jax
from flax import traverse_util
from tqdm import tqdm

from cnn_cases import settings
from cnn_cases.training import disk
from cnn_cases.training.provenance import environment, what_runs


@contextlib.contextmanager
def _hidden(name):
    """Makes it seem inside as if the package `name` were not installed, unless it is already imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None
    try:
        yield
    finally:
        del sys.modules[name]


with _hidden("torch"):  # tensorboardX would import it, which takes over a second, to plot its tensors
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

GO_ON = "; to train its network further, start a new run from it with --config.start.workdir"
ANEW = "delete it and start the run again, which rewrites it"
PUT_BACK = "restore an intact copy, or use another workdir"
_LEFT_BEHIND = ("metrics.jsonl", "result.json", "newest_checkpoint", "runs")  # by a run or study that began
SECONDS_A_LINE = 60  # between progress lines, where no terminal shows a bar
# Keys that affect no figure. Another machine may keep its data elsewhere, and read them with more processes;
# and max_damaged only decides whether a run ends, not which records are left out.
OF_THE_MACHINE = (
    "data.data_dir",
    "data.stream.workers",
    "data.stream.buffer",
    "data.stream.max_damaged",
    "profile_steps",
)


class Logbook:
    """The log of one run."""

    def __init__(self, workdir, config, *, data, inputs, num_steps, show_progress, devices=None):
        """Opens or creates the log of `workdir`.

        Args:
          workdir: a directory.
          config: the resolved config, as a dict that JSON can hold.
          data: identifies the data of this run; a value that JSON can hold.
          inputs: the content of inputs.npz.
          num_steps: length of the run, for the progress bar.
          show_progress: print a line at each evaluation; also draw a bar on a terminal, or print a line per
            minute elsewhere.
          devices: those that the run uses, in all processes; None for all that there are.

        Raises:
          ValueError: the workdir belongs to another config or other data, is in use, or cannot be written.
        """
        self._workdir = pathlib.Path(workdir)
        self._rows_path = self._workdir / "metrics.jsonl"
        self._lock = disk.lock(self._workdir)  # first: two simultaneous starts must not both claim it
        try:
            check_owner(self._workdir, config)
            starts = read_environments(self._workdir)
            if starts and starts[-1].get("data", data) != data:
                raise ValueError(
                    f"workdir = {workdir} was started with other data: {starts[-1]['data']} then, {data} now "
                    "(number and checksum of the examples of each split, step and checksum of the checkpoint "
                    "that it starts from); see data.data_dir and start.workdir"
                )
            here = environment(devices) | {"data": data}
            warn_of_changes(self._workdir, starts, here)
        except BaseException:
            self._lock.close()
            raise
        self._of_this_start = config, [*starts, here], inputs  # what `start` has to write
        self._rows = self._tensorboard = None
        self._profiles_before = None  # during a profile: the profiles that existed before it
        self._show_progress, self._next_line = show_progress, time.monotonic() + SECONDS_A_LINE
        self._bar = tqdm(
            total=num_steps,
            desc=self._workdir.name,
            unit=" steps",
            disable=not (show_progress and is_watched()),
            leave=False,
            dynamic_ncols=True,
        )

    def start(self, step, rows=None):
        """Continues after `step`, wherever the log ends: rows of later steps are dropped.

        Args:
          step: number of steps done.
          rows: what `flush` returned at that step; None before the first step.

        Raises:
          ValueError: the rows up to `step` have changed, or no row can be written.
        """
        self.stop_profile()  # one may still be running if the run rewinds
        path = self._rows_path
        rows = rows or _mark(b"")
        kept = path.read_bytes()[: rows["bytes"]] if path.exists() else b""
        if _mark(kept) != rows:
            raise ValueError(
                f"{path} is damaged: its rows up to step {step} are not as they were when step {step} was "
                "saved; restore an intact copy, or use another workdir to start over"
            )
        if self._of_this_start:  # only after all checks have passed
            config, starts, inputs = self._of_this_start
            claim(self._workdir, config)
            with disk.writing(self._workdir):
                disk.write_json(self._workdir / "environment.json", starts)
                disk.write_bytes(self._workdir / "inputs.npz", inputs)
            self._of_this_start = None
        with disk.writing(self._workdir):
            if self._rows is not None:
                self._rows.close()
            disk.write_text(path, kept.decode())
            self._rows = path.open("a")
            self._tensorboard = self._tensorboard or _Events(self._workdir / "tensorboard")
            self._tensorboard.begin(step + 1)
        self._mark = _mark(kept)
        self._bar.update(step - self._bar.n)
        self._bar.unpause()  # the time left is estimated from here

    def write(self, step, values):
        """Adds a row, {name: number}.

        Raises:
          ValueError: the row cannot be written.
        """
        row = json.dumps({"step": step} | values) + "\n"
        with disk.writing(self._workdir):
            self._rows.write(row)
            self._rows.flush()
            self._mark = _mark(row.encode(), self._mark)
            for name, value in values.items():
                self._tensorboard.write(step, summary=summary.scalar(name, value))

    def progress(self, step, values, images_per_second, seconds_left):
        """Shows the progress of the run: as a bar on a terminal, elsewhere as at most one line per minute."""
        shown = {
            "loss": f"{values['running/loss']:.4f}",
            "error": f"{values['running/error']:.2%}",
            "images/s": f"{images_per_second:,.{0 if images_per_second >= 10 else 1}f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if not is_watched() and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_A_LINE
            figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            left = datetime.timedelta(seconds=round(seconds_left))
            self.say(f"step {step}/{self._bar.total}: {figures}, {left} left")

    def say(self, message):
        """Prints one line for the user, if progress is shown."""
        if self._show_progress:
            with contextlib.suppress(OSError):  # a closed pipe or a full disk is no reason to stop
                tqdm.write(message, file=sys.stderr)

    def start_profile(self):
        """Starts a profile of the devices and the host."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # thousands of Python calls would hide all other events
        directory = self._workdir / "profile"
        before = self._profiles()
        jax.profiler.start_trace(directory, create_perfetto_trace=True, profiler_options=options)
        self._profiles_before = before

    def _profiles(self):
        return set((self._workdir / "profile").glob("plugins/profile/*"))

    def stop_profile(self):
        """Ends and writes the profile, if one is running."""
        if self._profiles_before is not None:
            before, self._profiles_before = self._profiles_before, None
            try:
                jax.profiler.stop_trace()
            except (RuntimeError, OSError) as error:
                for half in self._profiles() - before:
                    shutil.rmtree(half, ignore_errors=True)
                logging.getLogger(__name__).warning(
                    "%s: the profile could not be written: %s", self._workdir, error
                )

    def flush(self):
        """Flushes all rows to the disk.

        Returns:
          The number of bytes of all rows and their CRC-32, by which `start` recognises the same rows.

        Raises:
          ValueError: the rows cannot be written, or are no longer in the workdir.
        """
        with disk.writing(self._workdir):
            os.fsync(self._rows.fileno())
            self._tensorboard.flush()
            # A deleted file stays open, and everything written to it is lost.
            if not self._rows_path.exists() or not os.path.samestat(
                self._rows_path.stat(), os.fstat(self._rows.fileno())
            ):
                raise ValueError(
                    f"{self._rows_path} was deleted or replaced while this run was writing to it; progress "
                    "since the last checkpoint is lost"
                )
        return self._mark

    def close(self):
        """Closes the log."""
        self.stop_profile()
        with contextlib.suppress(OSError):
            self._bar.close()
        # Unwritten rows remain only if an earlier write failed, which has been reported.
        for file in (self._rows, self._tensorboard):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._lock.close()


class _Events(event_file_writer.EventsWriter):
    """A TensorBoard event file.

    tensorboardX's SummaryWriter writes from a thread, which dies on a full disk; later writes then wait
    forever.
    """

    def __init__(self, directory):
        """Creates a new file, whose name contains the time in seconds and the host."""
        directory.mkdir(exist_ok=True)
        super().__init__(str(directory / "events"))

    def begin(self, first_step):
        """Makes TensorBoard discard all earlier events from `first_step` on."""
        status = event_pb2.SessionLog.SessionStatus.START
        self.write(first_step, session_log=event_pb2.SessionLog(status=status))
        self.flush()

    def write(self, step, **content):
        self.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))


def claim(workdir, config, suits=None):
    """Makes `workdir`, of a run or of a study, belong to `config`; see `check_owner`.

    A config that differs but is compatible, for example in where the data are, replaces the existing one.

    Raises:
      ValueError: it belongs to another config, its config.json is damaged or gone, or it cannot be written.
    """
    check_owner(workdir, config, suits)
    path = pathlib.Path(workdir) / "config.json"
    config = _as_json(config)
    if path.exists() and disk.read_json(path, dict, PUT_BACK) == config:
        return
    with disk.writing(workdir):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_json(path, config)


def check_owner(workdir, config, suits=None):
    """Raises ValueError if `workdir` belongs to a config other than `config`; the message shows what differs.

    It also does so if config.json is damaged, or missing although a run or a study left other files.

    Args:
      workdir: a directory.
      config: as a dict that JSON can hold.
      suits: a function of the existing config, as JSON returns it: whether `config` is compatible although
        the two differ in more than OF_THE_MACHINE. None: it is not.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        left = [name for name in _LEFT_BEHIND if (path.parent / name).exists()]
        if left:
            raise ValueError(
                f"workdir = {workdir} holds {left[0]}, but no config.json, so its config is unknown; "
                "restore config.json, or use another workdir"
            )
        return
    known = settings.completed(disk.read_json(path, dict, PUT_BACK))
    kinds = ["study" if settings.is_study(one) else "run" for one in (known, config)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"workdir = {workdir} belongs to a {kinds[0]}; use another workdir for this {kinds[1]}"
        )
    given = settings.completed(_as_json(config))
    lines = differences(known, given, aside=OF_THE_MACHINE, sides=("saved", "given"))
    if lines and not (suits and suits(known)):
        raise ValueError(
            f"workdir = {workdir} belongs to another config:\n  "
            + "\n  ".join(lines)
            + "\nUse another workdir, or the config that this one was started with"
            + GO_ON * any(line.startswith("num_steps:") for line in lines)
        )


def _as_json(config):
    return json.loads(json.dumps(config))  # turns tuples into lists


def is_watched():
    """Returns whether this process prints to a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def differences(old, new, aside=(), sides=("there", "here")):
    """Returns how two nested dicts differ, in lines such as "optimizer.momentum: 0.9 there, 0.5 here".

    Args:
      old, new: dicts, for example of configs.
      aside: suffixes of the names of keys to leave out.
      sides: what the lines call the two dicts.
    """
    old, new = (traverse_util.flatten_dict(one, sep=".") for one in (old, new))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        is_same = name in old and name in new and old[name] == new[name]
        if not is_same and not name.endswith(aside):
            there, here = (repr(one[name]) if name in one else "nothing" for one in (old, new))
            lines.append(f"{name}: {there} {sides[0]}, {here} {sides[1]}")
    return lines


def read_rows(path):
    """Returns the rows of a metrics file, without a last line that a kill cut short.

    Raises:
      ValueError: another line is not a row; the message gives its number.
    """
    path = pathlib.Path(path)
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{path} is damaged in line {number}: {error}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path} is damaged in line {number}: it has no step")
        rows.append(row)
    return rows


def _mark(data, before=None):
    """Returns the number of bytes and CRC-32 of `data` appended to data with the mark `before`."""
    before = before or {"bytes": 0, "crc32": 0}
    return {"bytes": before["bytes"] + len(data), "crc32": zlib.crc32(data, before["crc32"])}


def read_environments(workdir):
    """Returns what `environment` reported at each start of a run.

    Raises:
      ValueError: the file is damaged.
    """
    path = pathlib.Path(workdir) / "environment.json"
    remedy = "restore an intact copy, or, if the run has not ended, delete it: the next start rewrites it"
    starts = disk.read_json(path, list, remedy) if path.exists() else []
    if not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path} is damaged (it is not a list of starts); {remedy}")
    return starts


def warn_of_changes(workdir, starts, here):
    """Warns if a run's last start had other code or packages, since its figures might now differ.

    Args:
      workdir: of the run.
      starts: from `read_environments`.
      here: the current `environment`.
    """
    there = what_runs(starts[-1]) if starts else {}
    lines = differences(there, {name: here[name] for name in there}, sides=("then", "now"))
    if lines:
        logging.getLogger(__name__).warning(
            "%s was last started with other code or packages: %s", workdir, "; ".join(lines)
        )


def warn_of_devices(workdir, config, starts, number):
    """Warns if the number of devices has changed since a run's last start and its steps depend on it.

    Args:
      workdir: of the run.
      config: its config.
      starts: from `read_environments`.
      number: the current number of devices.
    """
    there = len(starts[-1]["devices"]) if starts else number
    if there != number and (config.num_microbatches > 1 or not config.sync_batch_norm):
        logging.getLogger(__name__).warning(
            "%s: the number of devices has changed since the last start: %d then, %d now. With "
            "sync_batch_norm = %s and num_microbatches = %d the training steps depend on it",
            workdir,
            there,
            number,
            config.sync_batch_norm,
            config.num_microbatches,
        )


def noted_start(workdir):
    """Returns the `transfer.identity` that a run's last start recorded; None if it recorded none."""
    starts = read_environments(workdir)
    return starts[-1].get("data", {}).get("start") if starts else None


def read_result(workdir):
    """Returns the content of a run's result.json; None if the run has not ended.

    Raises:
      ValueError: it is damaged.
    """
    path = pathlib.Path(workdir) / "result.json"
    if not path.exists():
        return None
    result = disk.read_json(path, dict, ANEW)
    needed = {"finished": {"step", "metrics", "seconds"}, "diverged": {"step", "checkpoint"}}
    status = str(result.get("status"))
    if status not in needed or not needed[status] <= result.keys():
        raise ValueError(f"{path} is damaged (it is not the result of a run); {ANEW}")
    return result


def write_result(workdir, result):
    """Writes a run's result.json; raises ValueError if that is not possible."""
    with disk.writing(workdir):
        disk.write_json(pathlib.Path(workdir) / "result.json", result)
