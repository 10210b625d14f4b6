"""A process that loses another one has to say so, and to end with the code for it."""

import signal
from unittest import mock

import pytest

from benchmarks import processes
from cnn_cases.training.processes import LOST


@pytest.mark.parametrize(
    ("code", "said", "is_right"),
    [
        (LOST, "error: another process is lost", True),
        (-signal.SIGABRT, "terminate called after throwing an instance", True),
        (LOST, "Traceback (most recent call last):", False),
        (1, "error: another process is lost", False),
    ],
)
def test_the_others_have_to_say_why_they_ended(code, said, is_right, tmp_path):
    jobs = [mock.Mock(poll=lambda: code) for _ in range(processes.COUNT)]
    for index in range(processes.COUNT):
        (tmp_path / f"run.{index}.log").write_text(f"{said}\n")

    def strike():
        return processes._strike(jobs, tmp_path / "run", signal.SIGKILL, "step", 2)

    if is_right:
        blow = strike()
        assert (blow["signal"], blow["exit_codes"], blow["messages"]) == ("SIGKILL", [code] * 3, [said])
    else:
        with pytest.raises(RuntimeError, match="not as it should be"):
            strike()
    assert [job.send_signal.mock_calls for job in jobs] == [[], [], [mock.call(signal.SIGKILL)], []]
