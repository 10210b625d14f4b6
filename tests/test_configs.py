"""Every config builds, and every key is read."""

import functools
import importlib
import io
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from cnn_cases.data import feeds
from cnn_cases.studies import sweep
from cnn_cases.training import loop
from cnn_cases.training.state import init_state
from configs import common

ROOT = pathlib.Path(__file__).parent.parent / "configs"
TRAINING = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("__init__", "common"))
STUDIES = sorted(path.stem for path in (ROOT / "studies").glob("*.py") if path.stem != "__init__")


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


# Of the stored images; a config builds without its data set.
IMAGES = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "imagenette/320px-v2": ((None, None, 3), 10),
    "imagenet2012": ((None, None, 3), 1000),
}


class Images:
    """A data set of two blank images."""

    def __init__(self, name):
        self.shape, self.num_classes = IMAGES[name]

    def load_split(self, name, split, data_dir, image_size, border):
        del name, split, data_dir
        height, width, channels = self.shape
        if image_size:
            height = width = image_size
        image = np.zeros((2, height + 2 * border, width + 2 * border, channels), np.uint8)
        return image, np.zeros(2, np.int32), self.num_classes

    def open_split(self, name, split, data_dir):
        del name, split, data_dir
        file = io.BytesIO()
        Image.new("RGB", (40, 30)).save(file, "PNG")
        label = SimpleNamespace(num_classes=self.num_classes)
        image = SimpleNamespace(shape=self.shape)
        return [{"image": file.getvalue(), "label": 0}] * 2, {"image": image, "label": label}


def blank(config, monkeypatch):
    """Puts blank images in the place of the config's data set, and batches of two."""
    images = Images(config.data.name)
    monkeypatch.setattr(feeds.sources, "load_split", images.load_split)
    monkeypatch.setattr(feeds.sources, "open_split", images.open_split)
    monkeypatch.setattr(feeds.sources, "check_disjoint", lambda *_: None)
    # The whitening of 32x32x3 pixels takes half a minute; tests/data/test_pixels.py has smaller ones.
    monkeypatch.setattr(
        feeds.sources, "computed_once", lambda _, __, key, compute: {} if "zca" in key else compute()
    )
    config.batch_size = 2
    config.num_microbatches = 1


@pytest.mark.parametrize("name", TRAINING)
def test_a_config_builds_a_state(name, monkeypatch):
    config = load(name)
    blank(config, monkeypatch)
    program = loop.make_program(config, jax.devices()[:1])
    state = jax.eval_shape(lambda: init_state(program.model, program.tx, program.feed.image_shape, 0))
    assert state.params


PARTED = ["lenet5_mnist", "nin_cifar10", "resnet_cifar10", "resnet_preact_cifar10"]


@pytest.mark.parametrize("name", PARTED)
def test_training_on_everything_has_to_be_asked_for(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    held_out, full = get_config(), get_config("full_train")
    assert held_out.data.splits.validation.startswith("train[")
    assert "test" not in held_out.evaluation.splits
    assert full.data.splits.to_dict() == {"train": "train", "test": "test"}
    loop._check_numbers(full, 1)
    with pytest.raises(ValueError, match="protocol 'all' is unknown; known: held_out, full_train"):
        get_config("all")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_names_its_runs_apart(name):
    study = load(f"studies.{name}")
    runs = sweep.expand(study)
    points = len(study.seeds)
    for _, values in study.grid:
        points *= len(values)
    assert len({run.name for run in runs}) == len(runs) == points


@pytest.mark.parametrize("name", TRAINING)
def test_every_config_can_be_run_with_several_seeds(name):
    study = importlib.import_module("configs.studies.seeds").get_config(name)
    assert study.base == load(name)
    assert [run.config.seed for run in sweep.expand(study)] == [0, 1, 2]


def test_a_config_of_several_seeds_is_named_with_its_choice_or_refused():
    get_config = importlib.import_module("configs.studies.seeds").get_config
    assert get_config("resnet_cifar10:full_train").base.data.splits.to_dict() == {
        "train": "train",
        "test": "test",
    }
    with pytest.raises(
        ValueError, match=r"seeds\.py:resnet: name a config after the colon, one of alexnet_digits"
    ):
        get_config("resnet")


def test_the_deepest_nets_on_cifar10_start_slowly_and_the_short_schedule_is_a_tenth():
    get_config = importlib.import_module("configs.studies.depth_cifar10").get_config
    for run in sweep.expand(get_config()):
        deepest = run.config.model.depth == 110
        assert run.config.schedule.warmup_steps == (400 if deepest else 0)
    short = get_config("short").base
    assert short.num_steps * 10 == get_config().base.num_steps
    assert short.optimizer == get_config().base.optimizer
    with pytest.raises(ValueError, match="schedule 'shrot' is unknown; known: paper, short"):
        get_config("shrot")


@pytest.mark.parametrize("name", [*TRAINING, *(f"studies.{name}" for name in STUDIES)])
def test_a_config_is_locked_and_says_how_to_run_it(name):
    config = load(name)
    assert config.is_locked
    with pytest.raises((AttributeError, KeyError)):
        config.a_key_that_nobody_reads = 1
    assert "Command: python" in importlib.import_module(f"configs.{name}").__doc__


@pytest.mark.parametrize("name", TRAINING)
def test_a_config_adds_keys_to_the_model_alone(name):
    keys = set(flat(common.get_config()))
    added = {key for key in flat(load(name)) if not key.startswith(("model.", "data.splits."))} - keys
    assert not added


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


# Of the types that a key can have, for a config refuses others itself.
VALUES = {
    bool: st.booleans(),
    int: st.sampled_from([-1, 0, 1, 2, 3, 17, 10**6, 10**12]),
    float: st.sampled_from([-1.0, 0.0, 1e-9, 0.5, 1.0, 2.0, 1e9, float("inf"), float("nan")]),
    str: st.sampled_from(["", "nonsense", "digits", "train", "../x"]),
    tuple: st.sampled_from([(), ("x",), (0.0,), (0.5, 0.25), (-1.0, 2.0), (float("nan"), 1.0), (3, 2, 1)]),
}
# What these name is looked for in the data set or on the disk, of which there is none here.
ELSEWHERE = ("data.name", "data.data_dir", "data.splits.")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_a_wrong_value_is_refused_by_its_key_or_does_no_harm(data):
    config = load(data.draw(st.sampled_from(TRAINING)))
    keys = [key for key in flat(config) if not key.startswith(ELSEWHERE)]
    key = data.draw(st.sampled_from(keys))
    with pytest.MonkeyPatch.context() as monkeypatch:
        blank(config, monkeypatch)
        old = functools.reduce(lambda part, name: part[name], key.split("."), config)
        value = data.draw(VALUES[type(old)])
        config.update_from_flattened_dict({key: value})
        refusal = key
        try:
            loop.make_program(config, jax.devices()[:1])
        except ValueError as error:
            refusal = str(error)
        assert key.split(".")[-1] in refusal


class Reader:
    """A config that notes which of its keys are read."""

    def __init__(self, config, seen, prefix=""):
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getattr__(self, key):
        value = self._config[key]
        if isinstance(value, ConfigDict):
            return Reader(value, self._seen, f"{self._prefix}{key}.")
        self._seen.add(self._prefix + key)
        return value

    __getitem__ = __getattr__

    def __iter__(self):
        return iter(self._config)

    def keys(self):
        return self._config.keys()

    def items(self):
        return [(key, self[key]) for key in self._config]

    def to_dict(self):
        return self._config.to_dict()


def test_every_key_is_read(config, tmp_path):
    seen = set()
    program = loop.make_program(config, jax.devices()[:1])
    reader = Reader(config, seen)
    loop.make_program(reader, jax.devices()[:1])
    loop.train_and_evaluate(reader, tmp_path, program=program, show_progress=False)
    assert set(flat(config)) - seen == set()
