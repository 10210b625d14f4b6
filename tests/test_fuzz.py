"""The short version of `python -m benchmarks.fuzz`."""

import random

import pytest

from benchmarks import fuzz
from cnn_cases import settings


def wrong(outcomes):
    return [outcome for outcome in outcomes if outcome.what not in fuzz.RIGHT]


@pytest.mark.parametrize("seed", range(2))
def test_a_wrong_config_trains_or_is_refused_by_its_key(seed, tmp_path):
    rng = random.Random(f"suite {seed}")
    outcomes = [fuzz.try_config(rng, tmp_path / str(number)) for number in range(20)]
    assert not wrong(outcomes)
    assert {outcome.what for outcome in outcomes} == set(fuzz.RIGHT)


def test_a_wrong_study_expands_or_is_refused_by_its_key():
    rng = random.Random("suite")
    outcomes = [fuzz.try_study(rng) for _ in range(60)]
    assert not wrong(outcomes)
    assert {outcome.what for outcome in outcomes} == set(fuzz.RIGHT)


def test_what_is_let_through_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "check", lambda *_: None)
    rng = random.Random("unchecked")
    found = {
        outcome.what for outcome in (fuzz.try_config(rng, tmp_path, ["lenet5_digits"]) for _ in range(20))
    }
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
