"""The short version of `python -m benchmarks.faults`."""

import collections
import random
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import faults
from cnn_cases.training import checkpoint, loop, programs

OVERRIDES = {
    "model.depth": 8,
    "num_steps": 40,
    "log_every_steps": 5,
    "evaluation.every_steps": 10,
    "checkpoint.every_steps": 10,
}


def test_a_training_that_was_killed_and_one_that_was_stopped_leave_what_an_undisturbed_one_does(tmp_path):
    planned = [(signal.SIGKILL, "compile"), (signal.SIGKILL, "save"), (signal.SIGTERM, "row")]
    outcome = faults.torment(tmp_path, planned, OVERRIDES)
    assert [(one["signal"], one["exit_code"]) for one in outcome["blows"]] == [
        ("SIGKILL", -9),
        ("SIGKILL", -9),
        ("SIGTERM", 143),
    ]
    assert outcome["differences"] == []


def test_what_differs_is_found(config, tmp_path):
    program = programs.make_program(config, jax.devices()[:1])
    for name, config.seed in (("one", 0), ("other", 1)):
        loop.train_and_evaluate(config, tmp_path / name, program=program, show_progress=False)
    found = faults.differences(tmp_path / "one", tmp_path / "other")
    assert {"the rows of metrics.jsonl", "the curves of TensorBoard", "the final figures"} <= set(found)
    assert any("params" in line for line in found)


def test_another_best_checkpoint_and_a_single_bit_are_found(config, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    program = programs.make_program(config, jax.devices()[:1])
    loop.train_and_evaluate(config, one, program=program, show_progress=False)
    shutil.copytree(one, other)
    assert faults.differences(one, other) == []
    for workdir, step in ((one, 12), (other, 8)):
        (workdir / f"checkpoints/{step}" / checkpoint.LATER_ERROR).write_text("-1.0")
    assert faults.differences(one, other) == ["the best checkpoint: step 12 and 8"]
    states = iter([{"bias": np.float32([0.0, 1.0])}, {"bias": np.float32([-0.0, 1.0])}])
    monkeypatch.setattr(faults.checkpoint, "read", lambda *_: next(states))
    assert "['bias']" in faults.differences(one, other)


def test_a_signal_that_is_ignored_long_before_the_end_ends_the_harness(tmp_path, monkeypatch):
    code = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
workdir = pathlib.Path(sys.argv[1])
workdir.mkdir()
with (workdir / "metrics.jsonl").open("w") as rows:
    for step in range(1, 9):
        rows.write(f'{{"step": {step}, "running/loss": 1.0}}\\n')
        rows.flush()
        time.sleep(0.1)
"""

    def start(workdir, *_, **__):
        return subprocess.Popen([sys.executable, "-c", code, workdir])

    monkeypatch.setattr(faults, "start", start)
    signals = collections.deque([(signal.SIGTERM, "row")])
    with pytest.raises(RuntimeError, match=r"after step \d did not end the process"):
        faults.disturb(tmp_path / "run", {"num_steps": 40}, signals, random.Random(0))


def test_a_draft_that_a_killed_process_left_is_no_save(tmp_path):
    saves = tmp_path / "checkpoints"
    (saves / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    polls = iter(range(6))

    def poll():
        number = next(polls, None)
        if number == 2:
            (saves / "20.orbax-checkpoint-tmp").rmdir()
        if number == 4:
            (saves / "20.orbax-checkpoint-tmp").mkdir()
        return None if number is not None else 0

    process = SimpleNamespace(poll=poll)
    assert faults.wait_for(process, tmp_path, "save", 0, random.Random(0))
    assert next(polls) == 5


@pytest.mark.parametrize(
    ("number", "moment", "code", "saved", "kept", "is_right"),
    [
        (signal.SIGKILL, "row", -9, None, [10], True),
        (signal.SIGKILL, "row", 1, None, [10], False),
        (signal.SIGTERM, "row", 143, 20, [10, 20], True),
        (signal.SIGTERM, "row", 143, None, [10, 20], False),  # without a word
        (signal.SIGTERM, "row", 143, 20, [10], False),  # without saving
        (signal.SIGTERM, "row", 1, 20, [10, 20], False),
        (signal.SIGTERM, "row", -15, None, [10], False),
        (signal.SIGTERM, "start", -15, None, [], True),
        (signal.SIGTERM, "start", 143, None, [], True),
        (signal.SIGTERM, "start", 143, 20, [10], False),
    ],
)
def test_a_process_has_to_end_as_the_signal_asks(number, moment, code, saved, kept, is_right):
    assert faults._is_right(number, moment, code, saved, kept) == is_right


def test_a_signal_that_does_nothing_ends_the_harness(tmp_path, monkeypatch):
    def survive(workdir, overrides, signals, rng):
        del workdir, overrides, signals, rng
        return []

    monkeypatch.setattr(faults, "differences", lambda *_: [])
    with pytest.raises(RuntimeError, match="3 runs in a row ended as if they had not been sent"):
        faults.torment(tmp_path, [(signal.SIGTERM, "row")], OVERRIDES, disturb=survive)


def test_a_run_that_left_something_else_ends_the_harness(tmp_path, monkeypatch):
    def strike(workdir, overrides, signals, rng):
        del workdir, overrides, rng
        return [signals.popleft()] if signals else []

    monkeypatch.setattr(faults, "differences", lambda *_: ["the final figures"])
    outcome = faults.torment(tmp_path, [(signal.SIGTERM, "row")] * 2, OVERRIDES, disturb=strike)
    assert outcome["differences"] == ["the final figures"]
    assert outcome["runs"] == len(outcome["blows"]) == 1


@pytest.mark.parametrize(("moment", "rows"), [("row", 3), ("evaluation", 5)])
def test_an_evaluation_comes_after_a_row_of_training(moment, rows, tmp_path):
    written = []

    def poll():
        kind = "validation/loss" if len(written) % 2 else "running/loss"
        written.append(f'{{"step": {len(written)}, "{kind}": 1.0}}\n')
        (tmp_path / "metrics.jsonl").write_text("".join(written))

    rng = SimpleNamespace(uniform=lambda *_: 0.0, randint=lambda *_: 3)  # the third such row
    assert faults.wait_for(SimpleNamespace(poll=poll), tmp_path, moment, 0, rng)
    assert len(written) == rows + 1  # and the one that asks whether the process is still there
