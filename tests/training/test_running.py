import pytest

from cnn_cases.training.running import RunningMetrics
from tests.conftest import metrics_of


def test_a_row_holds_the_mean_of_the_steps_since_the_last_row():
    running = RunningMetrics([], [], [])
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        running.add(step, metrics_of(loss))
    names = ("running/loss", "running/error", "running/grad_norm")
    assert running.take() == pytest.approx(dict.fromkeys(names, 3))
    running.add(4, metrics_of(5.0))
    assert running.take()["running/loss"] == 5
    assert running.take() == {}
