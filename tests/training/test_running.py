import numpy as np
import pytest

from cnn_cases.training.running import DivergedError, RunningMetrics
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


def test_a_step_that_goes_wrong_within_a_call_has_its_own_number():
    call = {name: np.array([1.0, np.nan, 1.0, 1.0]) for name in metrics_of(1.0)}
    running = RunningMetrics([], [], [])
    assert running.add(8, call | {"skipped": np.array([False, True, False, False])}) == [
        "step 6: skipped, with loss nan, error nan, grad_norm nan"
    ]
    assert (running.nonfinite, len(running.window)) == ([6], 3)
    with pytest.raises(DivergedError) as caught:
        running.add(12, call | {"skipped": np.zeros(4, bool)})
    assert caught.value.step == 10
