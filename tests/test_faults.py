"""The short version of `python -m benchmarks.faults`."""

import collections
import signal

from benchmarks import faults

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


def test_what_differs_is_found(tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        faults.disturb(
            tmp_path / name, OVERRIDES | {"num_steps": 10, "seed": seed}, collections.deque(), None
        )
    found = faults.differences(tmp_path / "one", tmp_path / "other")
    assert {"the rows of metrics.jsonl", "the curves of TensorBoard", "the final figures"} <= set(found)
    assert any("params" in line for line in found)
