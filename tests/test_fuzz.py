"""The short version of `python -m benchmarks.fuzz`."""

import functools
import json
import pathlib
import random
import tempfile
from unittest import mock

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

    @quick(max_examples=5)
    @given(numbers)
    def fuzz_config(name, rng):
        with tempfile.TemporaryDirectory() as directory:
            outcomes.append(fuzz.try_config(rng, pathlib.Path(directory, "run"), name))
        assert not wrong(outcomes[-1:])

    for name in fuzz.TRAINING:
        fuzz_config(name)
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
    found = {fuzz.try_config(rng, workdir, "lenet5_digits").what for _ in range(20)}
    assert {"TypeError", "AttributeError"} & found


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (8, 8, 1), 10),
        ("cifar10:3.0.2", (32, 32, 3), 10),
        ("imagenette/320px-v2", (None, None, 3), 10),
        ("kmnist", (28, 28, 1), 10),  # no config has it yet
    ],
)
def test_blank_images_are_like_those_of_any_data_set(name, shape, classes):
    images = fuzz.Images(name)
    assert (images.shape, images.num_classes) == (shape, classes)


def test_a_network_whose_smallest_depth_is_not_listed_keeps_its_depth(monkeypatch):
    assert fuzz.shortened("resnet_digits")["model"]["depth"] == 8
    monkeypatch.setattr(fuzz, "SMALLEST_DEPTHS", {})
    assert fuzz.shortened("resnet_digits")["model"]["depth"] == 20


@pytest.mark.parametrize(("given", "told"), [([], ""), (["--minutes=90"], " --minutes=90")])
def test_the_command_of_a_record_has_the_time_that_was_given(given, told, tmp_path, monkeypatch):
    trained = fuzz.Outcome(kinds=[], keys=[], name="", what="trained", message="")
    monkeypatch.setattr(fuzz, "try_config", lambda *_: trained)
    monkeypatch.setattr(fuzz, "jax", mock.Mock())  # whose cache would be one that ends with the benchmark
    out = tmp_path / "record.json"
    monkeypatch.setattr("sys.argv", ["fuzz", "--inputs=2", *given, f"--out={out}"])
    with pytest.raises(SystemExit, match="0"):
        fuzz.main()
    command = json.loads(out.read_text())["configs"]["command"]
    assert command == f"python -m benchmarks.fuzz --inputs=2{told} --seed=0"


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
