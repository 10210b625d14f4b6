"""The short version of `python -m benchmarks.fuzz`."""

import functools
import pathlib
import random
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from cnn_cases import settings as config_settings


def wrong(outcomes):
    return [outcome for outcome in outcomes if outcome.what not in fuzz.RIGHT]


# The numbers drawn are hypothesis's, which shortens them to the simplest mistake that still goes wrong.
numbers = st.randoms(use_true_random=False)
quick = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_a_wrong_config_trains_or_is_refused_by_its_key():
    outcomes = []

    @quick(max_examples=30)
    @given(numbers)
    def fuzz_configs(rng):
        with tempfile.TemporaryDirectory() as directory:
            outcomes.append(fuzz.try_config(rng, pathlib.Path(directory, "run")))
        assert not wrong(outcomes[-1:])

    fuzz_configs()
    assert {outcome.what for outcome in outcomes} == set(fuzz.RIGHT)


def test_a_wrong_study_expands_or_is_refused_by_its_key():
    outcomes = []

    @quick(max_examples=40)
    @given(numbers)
    def fuzz_studies(rng):
        outcomes.append(fuzz.try_study(rng))
        assert not wrong(outcomes[-1:])

    fuzz_studies()
    assert {outcome.what for outcome in outcomes} == set(fuzz.RIGHT)


def test_what_is_let_through_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(config_settings, "check", lambda *_: None)
    rng = random.Random("unchecked")
    workdir = tmp_path / "run"
    found = {fuzz.try_config(rng, workdir, ["lenet5_digits"]).what for _ in range(20)}
    assert {"TypeError", "AttributeError"} & found


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ValueError("model.depth = 3 must be 8"), "refused"),
        (ValueError("3 must be 8"), "refused without a name"),
        (KeyError("depth"), "KeyError"),
        (TimeoutError("depth"), "TimeoutError"),
    ],
)
def test_only_a_message_that_names_the_key_is_right(error, what):
    def fail():
        raise error

    assert fuzz.judge(fail, ["model.depth"])[0] == what
