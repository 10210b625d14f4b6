"""The short version of `python -m benchmarks.faults`."""

import random
import signal
from types import SimpleNamespace

import jax

from benchmarks import faults
from cnn_cases.training import loop, programs

OVERRIDES = {
    "model.depth": 8,
    "num_steps": 40,
    "log_every_steps": 5,
    "evaluation.every_steps": 10,
    "checkpoint.every_steps": 10,
}


def test_a_training_that_was_killed_and_one_that_was_stopped_leave_what_an_undisturbed_one_does(tmp_path):
    planned = [(signal.SIGKILL, "save"), (signal.SIGTERM, "row")]
    outcome = faults.torment(tmp_path, planned, OVERRIDES)
    assert [(one["signal"], one["exit_code"]) for one in outcome["blows"]] == [
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
