"""What a run leaves behind for people: config, environment, metrics, progress.

    config.json        the resolved config; a workdir belongs to one
    environment.json   commit, versions, devices and data of each start
    inputs.npz         what the network is shown, for `cnn_cases.predict`
    metrics.jsonl      one row a line: {"step": ..., "running/loss": ..., "validation/error": ...}
    tensorboard/       the same figures as event files
    result.json        written once, at the end
    profile/           where the config asks for one, for TensorBoard and Perfetto
    lock               held by the process that trains; it says which one

A file that is damaged is an error that names it; what to do about it depends on the file.

Of several processes that do one training, process 0 alone writes; environment.json has the devices of all.

`running/` figures are means over the steps since the last row, in training mode and with augmentation; the
figures of a split are an evaluation of the whole of it. Rows hold nothing that depends on the clock, so
two runs of one config leave equal files.
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
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from cnn_cases import settings
from cnn_cases.training import disk
from cnn_cases.training.provenance import environment, what_runs

GO_ON = "; to train its network further, start a run of its own from it: --config.start.workdir"
ANEW = "delete it, and start the run again: it is written anew"
PUT_BACK = "put a whole copy of it back, or use another workdir"
_LEFT_BEHIND = ("metrics.jsonl", "result.json", "newest_checkpoint", "runs")  # by runs and studies that began
SECONDS_A_LINE = 60  # where no terminal shows a bar
# Keys on which no figure depends: another machine may have its data elsewhere, and more processes for them;
# and where more records may be damaged, no others are left out, but one too many ends a run.
OF_THE_MACHINE = (
    "data.data_dir",
    "data.stream.workers",
    "data.stream.buffer",
    "data.stream.max_damaged",
    "profile_steps",
)


class Logbook:
    """The log of one run."""

    def __init__(self, workdir, config, *, data, inputs, num_steps, title, show_progress):
        """Opens or creates the log of `workdir`.

        Args:
          workdir: a directory.
          config: the resolved config, as a dict that JSON can hold.
          data: what tells the data of this run from others, as JSON can hold it.
          inputs: the content of inputs.npz.
          num_steps: length of the run, for the progress bar.
          title: of the progress bar.
          show_progress: print a line at each evaluation; and on a terminal draw a bar, elsewhere print a line
            a minute.

        Raises:
          ValueError: the workdir belongs to another config or to other data, is in use, or cannot be written.
        """
        self._workdir = pathlib.Path(workdir)
        self._rows_path = self._workdir / "metrics.jsonl"
        self._lock = disk.lock(self._workdir)  # first: two that start at once must not both claim it
        try:
            check_owner(self._workdir, config)
            starts = read_environments(self._workdir)
            if starts and starts[-1].get("data", data) != data:
                raise ValueError(
                    f"workdir = {workdir} was begun with other data: {starts[-1]['data']} there, {data} "
                    "here (number and checksum of the examples of each split, step and checksum of what it "
                    "starts from); see data.data_dir and start.workdir"
                )
            here = environment() | {"data": data}
            warn_of_changes(self._workdir, starts, here)
        except BaseException:
            self._lock.close()
            raise
        self._of_this_start = config, [*starts, here], inputs  # what `start` has to write
        self._rows = self._tensorboard = None
        self._profiles_before = None  # while one is under way: those that were there
        self._show_progress, self._next_line = show_progress, time.monotonic() + SECONDS_A_LINE
        self._bar = tqdm(
            total=num_steps,
            desc=title,
            unit=" steps",
            disable=not (show_progress and is_watched()),
            leave=False,
            dynamic_ncols=True,
        )

    def start(self, step, rows=None):
        """Goes on after `step`, wherever the log ends: rows of later steps are dropped.

        Args:
          step: number of steps done.
          rows: what `flush` returned at that step; None for none, before the first step.

        Raises:
          ValueError: the rows up to `step` are not what they were, or no row can be written.
        """
        self.stop_profile()  # one that was under way where the run went back
        path = self._rows_path
        rows = rows or _mark(b"")
        kept = path.read_bytes()[: rows["bytes"]] if path.exists() else b""
        if _mark(kept) != rows:
            raise ValueError(
                f"{path} is damaged: its rows up to step {step} are not those that were there when step "
                f"{step} was saved; put a whole copy of it back, or use another workdir to start anew"
            )
        if self._of_this_start:  # now that nothing refuses it
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
        self._bar.unpause()  # the time left is reckoned from here

    def write(self, step, values):
        """Adds a row: {name: number}.

        Raises:
          ValueError: it cannot be written.
        """
        row = json.dumps({"step": step} | values) + "\n"
        with disk.writing(self._workdir):
            self._rows.write(row)
            self._rows.flush()
            self._mark = _mark(row.encode(), self._mark)
            for name, value in values.items():
                self._tensorboard.write(step, summary=summary.scalar(name, value))

    def progress(self, step, values, images_per_second, seconds_left):
        """Shows where the run stands: on a terminal as a bar, elsewhere as a line a minute at most."""
        shown = {
            "loss": f"{values['running/loss']:.4f}",
            "error": f"{values['running/error']:.2%}",
            "images/s": f"{images_per_second:,.0f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if not is_watched() and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_A_LINE
            figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            left = datetime.timedelta(seconds=round(seconds_left))
            self.say(f"step {step}/{self._bar.total}: {figures}, {left} left")

    def say(self, message):
        """One line for the person who watches; nothing where no progress is shown."""
        if self._show_progress:
            with contextlib.suppress(OSError):  # a pipe whose reader is gone, a full disk: no reason to stop
                tqdm.write(message, file=sys.stderr)

    def start_profile(self):
        """Starts to note what the devices and the host do."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # thousands of Python's own calls would hide all others
        directory = self._workdir / "profile"
        before = self._profiles()
        jax.profiler.start_trace(directory, create_perfetto_trace=True, profiler_options=options)
        self._profiles_before = before

    def _profiles(self):
        return set((self._workdir / "profile").glob("plugins/profile/*"))

    def stop_profile(self):
        """Writes what was noted, if anything is."""
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
        """Brings all rows to the disk.

        Returns:
          What `start` needs to know that it finds the same rows again: how many bytes, and their CRC-32.

        Raises:
          ValueError: they cannot be written, or are not in the workdir any more.
        """
        with disk.writing(self._workdir):
            os.fsync(self._rows.fileno())
            self._tensorboard.flush()
            # An open file lives on when it is deleted, and all that is written goes nowhere.
            if not self._rows_path.exists() or not os.path.samestat(
                self._rows_path.stat(), os.fstat(self._rows.fileno())
            ):
                raise ValueError(
                    f"{self._rows_path} was deleted or replaced by somebody else while this run wrote to it; "
                    "what it did since its last checkpoint is lost"
                )
        return self._mark

    def close(self):
        """Ends the log."""
        self.stop_profile()
        with contextlib.suppress(OSError):
            self._bar.close()
        # Something is left to write only where writing has failed before, which has been told.
        for file in (self._rows, self._tensorboard):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._lock.close()


class _Events:
    """An event file of TensorBoard.

    tensorboardX's SummaryWriter writes from a thread, which dies on a full disk and leaves those who have
    more to write waiting for ever.
    """

    def __init__(self, directory):
        """Makes a file of a name of its own, after the second and the host."""
        directory.mkdir(exist_ok=True)
        self._file = event_file_writer.EventsWriter(str(directory / "events"))
        self.write(0, file_version="brain.Event:2")

    def begin(self, first_step):
        """Has TensorBoard forget `first_step` and what follows, of all that was written before."""
        status = event_pb2.SessionLog.SessionStatus.START
        self.write(first_step, session_log=event_pb2.SessionLog(status=status))
        self.flush()

    def write(self, step, **content):
        self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


def claim(workdir, config, suits=None):
    """Makes `workdir`, of a run or of a study, belong to `config`; see `check_owner`.

    A config that differs and suits all the same, as in where the data lie, takes the place of the other.

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
    """Raises ValueError if `workdir` belongs to another config than `config`; the message shows what differs.

    Likewise where its config.json is damaged, or gone from beside what a run or a study has left.

    Args:
      workdir: a directory.
      config: as a dict that JSON can hold.
      suits: a function of the config that is there, as JSON gives it: whether `config` suits all the same,
        where they differ in more than OF_THE_MACHINE. None: it does not.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        left = [name for name in _LEFT_BEHIND if (path.parent / name).exists()]
        if left:
            raise ValueError(
                f"workdir = {workdir} holds {left[0]}, but no config.json, so nobody knows what it is of; "
                "put it back, or use another workdir"
            )
        return
    known = settings.completed(disk.read_json(path, dict, PUT_BACK))
    kinds = ["study" if settings.is_study(one) else "run" for one in (known, config)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"workdir = {workdir} belongs to a {kinds[0]}; give this {kinds[1]} one of its own")
    lines = differences(known, settings.completed(_as_json(config)), aside=OF_THE_MACHINE)
    if lines and not (suits and suits(known)):
        raise ValueError(
            f"workdir = {workdir} belongs to another config:\n  "
            + "\n  ".join(lines)
            + "\nUse another workdir, or the config that this one was started with"
            + GO_ON * any(line.startswith("num_steps:") for line in lines)
        )


def _as_json(config):
    return json.loads(json.dumps(config))  # tuples are lists there


def is_watched():
    """Whether a terminal shows what this process says."""
    return sys.stderr is not None and sys.stderr.isatty()


def differences(old, new, prefix="", aside=()):
    """How two nested dicts differ, in lines such as "optimizer.momentum: 0.9 there, 0.5 here".

    Args:
      old, new: dicts, as of configs.
      prefix: of the keys' names in the lines.
      aside: ends of the names of keys that are left out.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        there, here = old.get(key, "nothing"), new.get(key, "nothing")
        name = f"{prefix}{key}"
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{name}.", aside)
        elif there != here and not name.endswith(aside):
            lines.append(f"{name}: {there!r} there, {here!r} here")
    return lines


def read_rows(path):
    """The rows of a metrics file; a last line that a kill cut short is left out.

    Raises:
      ValueError: another line is no row; the message has its number.
    """
    path = pathlib.Path(path)
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path} is damaged in line {number}: {error}") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path} is damaged in line {number}: it has no step")
        rows.append(row)
    return rows


def _mark(data, before=None):
    """Number of bytes and CRC-32 of `data`, behind data of which `before` is the mark."""
    before = before or {"bytes": 0, "crc32": 0}
    return {"bytes": before["bytes"] + len(data), "crc32": zlib.crc32(data, before["crc32"])}


def read_environments(workdir):
    """What `environment` said at each start of a run.

    Raises:
      ValueError: the file is damaged.
    """
    path = pathlib.Path(workdir) / "environment.json"
    remedy = (
        "put a whole copy of it back, or delete it, if the run has not ended: the next start writes it anew"
    )
    starts = disk.read_json(path, list, remedy) if path.exists() else []
    if not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path} is damaged (it is no list of starts); {remedy}")
    return starts


def warn_of_changes(workdir, starts, here):
    """Tells where a run's last start had other code or packages, so that its figures might be others here.

    Args:
      workdir: of the run.
      starts: of `read_environments`.
      here: of `environment`.
    """
    there = what_runs(starts[-1]) if starts else {}
    lines = differences(there, {name: here[name] for name in there})
    if lines:
        logging.getLogger(__name__).warning(
            "%s was last started with other code or packages: %s", workdir, "; ".join(lines)
        )


def warn_of_devices(workdir, config, starts, number):
    """Tells where the number of devices is not that of a run's last start, and its steps depend on it.

    Args:
      workdir: of the run.
      config: its config.
      starts: of `read_environments`.
      number: of devices here.
    """
    there = len(starts[-1]["devices"]) if starts else number
    if there != number and (config.num_microbatches > 1 or not config.sync_batch_norm):
        logging.getLogger(__name__).warning(
            "%s was last started on another number of devices: %d there, %d here. With sync_batch_norm = %s "
            "and num_microbatches = %d its steps depend on it",
            workdir,
            there,
            number,
            config.sync_batch_norm,
            config.num_microbatches,
        )


def noted_start(workdir):
    """`transfer.identity` of what the last start of a run started from; None where nothing is noted."""
    starts = read_environments(workdir)
    return starts[-1].get("data", {}).get("start") if starts else None


def read_result(workdir):
    """The content of a run's result.json; None where the run has not ended.

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
        raise ValueError(f"{path} is damaged (it is no result of a run); {ANEW}")
    return result


def write_result(workdir, result):
    """Writes a run's result.json; raises ValueError where that is not possible."""
    with disk.writing(workdir):
        disk.write_json(pathlib.Path(workdir) / "result.json", result)
