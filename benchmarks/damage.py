"""What damage a run survives: `python -m benchmarks.damage [--only=WORD] [--out=FILE.json]`.

A real `train.py` process is killed after it has saved a few checkpoints. For each kind of damage, a copy of
what it left is damaged and started again, by the same command. The possible outcomes:

unharmed    it resumes from the newest checkpoint
fell back   it reports that the newest checkpoint is damaged or gone, and resumes from the one before
refused     exit code 2 and one line that says what is wrong; the checkpoints are byte for byte as they were

A run on a full disk is refused after it has trained, so what it left is judged by the next start, on a larger
disk.

If it resumes, all that the run leaves at its end is compared with an undisturbed run, as in
`benchmarks.faults`. A start from step 0, or anything else, counts as wrong.

Full and read-only disks are small file systems in memory, which only root may mount; the report lists what
was left out for other users.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import children, faults, record
from cnn_cases.training import checkpoint

CONFIG = "configs/lenet5_digits.py"
# keep_last is one more than the default, so that undamaged checkpoints remain.
OVERRIDES = {
    "data.image_size": 16,
    "batch_size": 32,
    "num_steps": 60,
    "schedule.warmup_steps": 0,
    "log_every_steps": 5,
    "evaluation.every_steps": 10,
    "evaluation.batch_size": 400,
    "checkpoint.every_steps": 10,
    "checkpoint.keep_last": 3,
}
# {pattern of a kind of file in a checkpoint: whether values come from it}.
KINDS = {
    "checksums.json": True,
    "extra/metadata": True,
    "state/_METADATA": True,
    "state/manifest.ocdbt": True,
    "state/d/*": True,
    "state/ocdbt.process_0/manifest.ocdbt": True,
    "state/ocdbt.process_0/d/*": True,
    "_CHECKPOINT_METADATA": False,
    "commit_success.txt": False,
    "state/commit_success.txt": False,
}
TIMEOUT_SECONDS = 300


def truncate(path):
    """Leaves half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    """Empties a file."""
    path.write_bytes(b"")


def junk(path):
    """Replaces the contents of a file by about as many bytes that are not text."""
    path.write_bytes(b"\xff\x00\xfe" * (path.stat().st_size // 3))


def remove(path):
    """Deletes a file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def spoil_a_line(path):
    """Replaces a line in the middle of a file by nonsense of the same length."""
    lines = path.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    lines[middle] = b"#" * (len(lines[middle]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))


def cut_the_last_line(path):
    """Appends an incomplete line, as a kill leaves it; the rows of the last save stay."""
    with path.open("ab") as file:
        file.write(b'{"step": 1000, "running/lo')


def steps_of(workdir):
    """The steps of the committed checkpoints of a run, the newest last."""
    return checkpoint.steps(workdir / "checkpoints")


def noted(workdir):
    """The step that the run has noted as that of its newest checkpoint; 0 without a note."""
    note = workdir / checkpoint.NEWEST
    return int(note.read_text()) if note.exists() else 0


def newest(workdir):
    """The directory of the newest checkpoint."""
    return workdir / "checkpoints" / str(steps_of(workdir)[-1])


class Run:
    """How a process ended: its exit `code`, and the `lines` of its output without ordinary progress."""

    def __init__(self, code, text):
        self.code = code
        resumed = re.search(r": resuming after step (\d+)$", text, re.MULTILINE)
        self.step = int(resumed[1]) if resumed else 0
        ordinary = re.compile(r"step \d+/\d+: |.*: resuming after step \d+$|.*, on \d+ x .+$|.*: train/loss ")
        self.lines = [line for line in text.splitlines() if not ordinary.match(line)]


class Workshop:
    """Runs to damage, in a directory, and the outcomes.

    `undisturbed` is a run that ended normally, `stopped` one that SIGKILL ended after a few checkpoints.
    """

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        # Compiled once for all runs: what is tested happens before and after the steps.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = os.environ | cache
        self.undisturbed, self.stopped = self.directory / "undisturbed", self.directory / "stopped"
        self.train(self.undisturbed)
        while steps_of(self.stopped)[-1:] in ([], [OVERRIDES["num_steps"]]):  # the kill came too late
            shutil.rmtree(self.stopped, ignore_errors=True)
            with children.ended(self.start(self.stopped)) as (process,):
                # A kill between a checkpoint's commit and its note would leave the note one behind.
                _until(lambda: noted(self.stopped) >= 30, process)

    def start(self, workdir):
        """Starts a process that trains in `workdir`."""
        return faults.start(workdir, OVERRIDES, subprocess.PIPE, environment=self.environment, config=CONFIG)

    def train(self, workdir):
        """Trains in `workdir` until the process ends; returns its `Run`."""
        return self.wait(self.start(workdir))

    def wait(self, process):
        """Waits for a process; returns its `Run`."""
        with children.ended(process):
            try:
                out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                return Run(-signal.SIGKILL, f"did not end within {TIMEOUT_SECONDS} s")
        return Run(process.returncode, out + errors)

    def judge(self, workdir, run, before, newest_step):
        """Judges the outcome of damage to a run.

        Args:
          workdir: the run's workdir.
          run: the `Run` after the damage.
          before: `contents` of the checkpoints after the damage, before that `Run`.
          newest_step: step of the newest checkpoint before the damage.

        Returns:
          {"outcome", "exit_code", "went_on_from", "message"}.
        """
        text = "\n".join(run.lines)
        told = [
            line
            for line in run.lines
            if "error: " in line or " is damaged (" in line or " is missing; " in line
        ]
        outcome = "something else: " + (text[-400:] or f"exit code {run.code}")
        if run.code == 2 and len(run.lines) == 1 and run.lines[0].startswith("error: "):
            outcome = "refused"
            if contents(workdir / "checkpoints") != before:
                outcome = "something else: it refused, and changed the checkpoints"
        elif run.code == 0:
            found = faults.differences(self.undisturbed, workdir)
            if found:
                outcome = f"something else: {', '.join(found)} differ from an undisturbed run"
            elif run.step == newest_step:
                outcome = "unharmed"
            elif run.step == 0:
                outcome = "something else: started again from step 0"
            elif any(f"resuming from step {run.step}" in line for line in told):
                outcome = "fell back"
            else:
                outcome = f"something else: went on from step {run.step} and did not say why"
        message = _without_places(told[0], self.directory) if told else ""
        return {
            "outcome": outcome,
            "exit_code": run.code,
            "went_on_from": run.step if run.code == 0 else None,
            "message": message,
        }

    def damage(self, do, *, of="stopped"):
        """Damages a copy of a run by `do(workdir)`, starts it again, and judges the outcome."""
        workdir = self.directory / "copy"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(self.directory / of, workdir)
        step = steps_of(workdir)[-1]
        do(workdir)
        before = contents(workdir / "checkpoints")
        return {"newest_checkpoint": step} | self.judge(workdir, self.train(workdir), before, step)


def contents(directory):
    """{file below a directory: its bytes}, without uncommitted checkpoints."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if "checkpoint-tmp" not in str(path)
    }


def _until(condition, process):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the process ended too early: {process.communicate()}")
        time.sleep(faults.POLL_SECONDS)


def _without_places(line, directory):
    line = line.replace(str(directory), "WORKDIR").replace(platform.node(), "HOST")
    line = re.sub(r"process \d+ on", "process PID on", line)
    line = re.sub(r"^[WE]\d{4} .*?\] ", "warning: ", line)
    return line[:300]


def of_files():
    """Yields (name, allowed outcome, do, of which run) for damage to files."""
    damages = {"truncated": truncate, "a bit flipped": flip, "emptied": empty, "removed": remove}
    for pattern, needed in KINDS.items():
        for word, damage in damages.items():

            def do(workdir, pattern=pattern, damage=damage):
                damage(max(newest(workdir).glob(pattern), key=lambda path: path.stat().st_size))

            yield f"newest checkpoint: {pattern} {word}", "fell back" if needed else "unharmed", do, "stopped"
    for item in ("state", "extra", "state/ocdbt.process_0", ""):
        name = f"newest checkpoint: {item + '/' if item else 'all of it'} removed"
        yield name, "fell back", lambda workdir, item=item: remove(newest(workdir) / item), "stopped"

    def all_of(damage, pattern):
        def do(workdir):
            for path in (workdir / "checkpoints").glob(pattern):
                damage(path)

        return do

    yield (
        "all checkpoints: state/manifest.ocdbt truncated",
        "refused",
        all_of(truncate, "*/state/manifest*"),
        "stopped",
    )
    yield (
        "all checkpoints: extra/metadata a bit flipped",
        "refused",
        all_of(flip, "*/extra/metadata"),
        "stopped",
    )
    yield "all checkpoints: removed", "refused", all_of(remove, "*"), "stopped"
    yield "checkpoints/ removed", "refused", lambda workdir: remove(workdir / "checkpoints"), "stopped"

    def half_written(suffix):
        def do(workdir):
            whole = newest(workdir)
            half = whole.with_name(f"{int(whole.name) + 5}{suffix}")
            shutil.copytree(whole / "extra", half / "extra")
            shutil.copytree(whole / "state" / "d", half / "state" / "d")

        return do

    yield (
        "a checkpoint half-written, under its temporary name",
        "unharmed",
        half_written(".orbax-checkpoint-tmp"),
        "stopped",
    )
    yield "a checkpoint half-written, under its name", "unharmed", half_written(""), "stopped"

    text = {"truncated": truncate, "emptied": empty, "no text": junk}
    for file in ("config.json", "environment.json", "metrics.jsonl", "newest_checkpoint", "result.json"):
        of = "undisturbed" if file == "result.json" else "stopped"
        gone = "refused" if file in ("config.json", "metrics.jsonl") else "unharmed"
        for word, damage in (text | {"removed": remove}).items():
            if (file, word) == ("newest_checkpoint", "truncated"):
                continue  # a shorter number
            allowed = gone if word == "removed" else "refused"
            yield f"{file} {word}", allowed, lambda w, f=file, d=damage: d(w / f), of
    rows = {"a line in the middle spoiled": spoil_a_line, "a bit flipped": flip}
    for word, damage in rows.items():
        yield f"metrics.jsonl {word}", "refused", lambda w, d=damage: d(w / "metrics.jsonl"), "stopped"
    yield (
        "metrics.jsonl cut short in its last line",
        "unharmed",
        lambda w: cut_the_last_line(w / "metrics.jsonl"),
        "stopped",
    )
    for word, damage in (text | {"removed": remove}).items():
        yield f"inputs.npz {word}", "unharmed", lambda w, d=damage: d(w / "inputs.npz"), "stopped"
    yield "lock removed", "unharmed", lambda w: remove(w / "lock"), "stopped"
    yield "lock no text", "unharmed", lambda w: junk(w / "lock"), "stopped"


def workdir_is_a_file(shop):
    """A workdir that is a file."""
    path = shop.directory / "file"
    path.write_text("not a directory")
    run = shop.train(path)
    return shop.judge(path, run, {}, 0)


def deleted_meanwhile(shop, what):
    """Deletes the workdir, or a part of it, while its run trains."""
    workdir = shop.directory / "deleted"
    shutil.rmtree(workdir, ignore_errors=True)
    with children.ended(shop.start(workdir)) as (process,):
        _until(lambda: steps_of(workdir)[-1:] >= [20], process)
        process.send_signal(signal.SIGSTOP)
        remove(workdir / what)
        before = contents(workdir / "checkpoints")
        process.send_signal(signal.SIGCONT)
        run, after = shop.wait(process), contents(workdir / "checkpoints")
    outcome = shop.judge(workdir, run, after, 0)
    # It saves until it finds out, and deletes the oldest checkpoints then.
    changed = [name for name, data in before.items() if after.get(name, data) != data]
    if changed or (before and not after):
        outcome["outcome"] = f"something else: it changed {', '.join(changed) or 'all checkpoints'}"
    return outcome


def two_at_once(shop):
    """Starts a second process while a first one has the workdir; then kills the first and starts a third."""
    workdir = shop.directory / "two"
    shutil.copytree(shop.stopped, workdir)
    step, before = steps_of(workdir)[-1], contents(workdir / "checkpoints")
    (workdir / "lock").unlink()
    with children.ended(shop.start(workdir)) as (first,):
        _until(lambda: (workdir / "lock").exists() and (workdir / "lock").read_text(), first)
        first.send_signal(signal.SIGSTOP)
        second = shop.train(workdir)
    outcome = shop.judge(workdir, second, before, step)
    if f"process {first.pid} on {platform.node()}" not in "".join(second.lines):
        outcome["outcome"] = "something else: the message does not name the first process"
    step = steps_of(workdir)[-1]
    return outcome | {"then": shop.judge(workdir, shop.train(workdir), {}, step)}


@contextlib.contextmanager
def small_disk(shop, size):
    """A directory with a separate in-memory file system of `size` bytes."""
    place = shop.directory / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def remount(place, options):
    """Changes the mount options of a `small_disk`."""
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def full_disk(shop, size):
    """Starts a run on a disk of `size` bytes; then enlarges the disk and resumes the run."""
    with small_disk(shop, size) as place:
        workdir = place / "run"
        run = shop.train(workdir)
        steps = steps_of(workdir)
        before = contents(workdir / "checkpoints")
        outcome = shop.judge(workdir, run, before, 0)
        remount(place, "size=16m")
        again = shop.train(workdir)
        then = shop.judge(workdir, again, before, steps[-1] if steps else 0)
        return {"newest_checkpoint": steps[-1] if steps else None} | outcome | {"then": then}


def full_at_a_restart(shop):
    """Starts a stopped run on a full disk; then makes room and starts it again."""
    with small_disk(shop, "4m") as place:
        workdir = place / "run"
        shutil.copytree(shop.stopped, workdir)
        step, before = steps_of(workdir)[-1], contents(workdir / "checkpoints")
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        outcome = shop.judge(workdir, shop.train(workdir), before, step)
        (place / "filler").unlink()
        return outcome | {"then": shop.judge(workdir, shop.train(workdir), before, step)}


def read_only(shop, is_new):
    """Starts a new or a stopped run on a read-only disk; then makes the disk writable and starts it again."""
    with small_disk(shop, "16m") as place:
        workdir = place / "run"
        if not is_new:
            shutil.copytree(shop.stopped, workdir)
        step = 0 if is_new else steps_of(workdir)[-1]
        before = contents(workdir / "checkpoints")
        remount(place, "ro")
        outcome = shop.judge(workdir, shop.train(workdir), before, step)
        remount(place, "rw")
        return outcome | {"then": shop.judge(workdir, shop.train(workdir), before, step)}


def of_disks_and_processes():
    """Yields (name, allowed outcome, do, whether it mounts) for damage to more than files."""
    yield "the workdir is a file", "refused", workdir_is_a_file, False
    yield (
        "the workdir deleted while it trains",
        "refused",
        functools.partial(deleted_meanwhile, what=""),
        False,
    )
    yield (
        "metrics.jsonl deleted while it trains",
        "refused",
        functools.partial(deleted_meanwhile, what="metrics.jsonl"),
        False,
    )
    yield "a second process on the workdir; then the first killed", "refused", two_at_once, False
    for size in ("4k", "12k", "16k", "20k", "160k", "320k", "520k"):
        yield (
            f"a disk of {size}B, then a larger one",
            "refused",
            functools.partial(full_disk, size=size),
            True,
        )
    yield "the disk full at a restart, then not", "refused", full_at_a_restart, True
    for is_new in (True, False):
        name = f"the disk read-only at {'the first start' if is_new else 'a restart'}, then not"
        yield name, "refused", functools.partial(read_only, is_new=is_new), True


def can_mount():
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as place:
        try:
            subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", place], check=True)
        return True


def inflict(shop, only=""):
    """Inflicts each kind of damage whose name contains `only`.

    Returns:
      [{"damage", "allowed", "is_right", and what `Workshop.judge` returns}], and the names of those left out.
    """
    tasks = [
        (name, allowed, functools.partial(shop.damage, do, of=of)) for name, allowed, do, of in of_files()
    ]
    left_out, mounts = [], can_mount()
    for name, allowed, do, needs_mount in of_disks_and_processes():
        if needs_mount and not mounts:
            left_out.append(name)
        else:
            tasks.append((name, allowed, functools.partial(do, shop)))
    found = []
    for name, allowed, do in tasks:
        if only not in name:
            continue
        outcome = do()
        is_right = outcome["outcome"] == allowed
        if "then" in outcome:
            is_right = is_right and outcome["then"]["outcome"] == "unharmed"
        found.append({"damage": name, "allowed": allowed} | outcome | {"is_right": is_right})
        print(
            f"{'ok   ' if is_right else 'WRONG'} {name}: {outcome['outcome']}; {outcome['message']}",
            flush=True,
        )
    return found, left_out


def main():
    """Inflicts the damage, prints the outcomes, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damage", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only damages whose name has this in it")
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which it writes the section 'damage'"
    )
    options = parser.parse_args()
    if options.only and options.out:
        parser.error("--out replaces the results of all kinds of damage; leave --only out")
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as directory:
        found, left_out = inflict(Workshop(directory), options.only)
    if not found:
        parser.error(f"--only={options.only!r} matches no kind of damage that is possible on this machine")
    wrong = [one["damage"] for one in found if not one.pop("is_right")]
    print(
        f"{len(found)} damages; wrong: {', '.join(wrong) or 'none'}; "
        f"left out: {', '.join(left_out) or 'none'}"
    )
    if options.out:
        figures = {"config": CONFIG, "overrides": OVERRIDES, "damages": found}
        figures |= {"wrong": wrong, "left_out": left_out}
        record.write_section(options.out, "damage", "python -m benchmarks.damage", figures)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
