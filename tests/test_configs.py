"""Every config builds, and every key is read."""

import dataclasses
import functools
import importlib
import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

from benchmarks.fuzz import TRAINING, Images, load
from cnn_cases import models, settings
from cnn_cases.studies import plan
from cnn_cases.training import loop, programs
from configs import common

STUDIES_DIR = pathlib.Path(__file__).parent.parent / "configs" / "studies"
STUDIES = sorted(path.stem for path in STUDIES_DIR.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", TRAINING)
def test_a_config_builds_a_state(name):
    config = load(name)
    config.batch_size, config.num_microbatches = 2, 1
    with Images(config.data.name).in_place():
        program = programs.make_program(config, jax.devices()[:1])
    assert program.shapes_of_state().params


@pytest.mark.parametrize("name", TRAINING)
def test_every_setting_of_the_network_can_be_overridden(name):
    settings_of_model = load(name).model.to_dict()
    fields = {field.name for field in dataclasses.fields(models.MODELS[settings_of_model["name"]])}
    set_by_others = {*settings.NOT_OF_MODEL, "parent", "name"}
    assert settings_of_model.keys() - {"name"} == fields - set_by_others


PARTED = ["lenet5_mnist", "nin_cifar10", "resnet_cifar10", "resnet_preact_cifar10"]


@pytest.mark.parametrize("name", PARTED)
def test_training_on_everything_has_to_be_asked_for(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    held_out, full = get_config(), get_config("full_train")
    assert held_out.data.splits.validation.startswith("train[")
    assert "test" not in held_out.evaluation.splits
    assert full.data.splits.to_dict() == {"train": "train", "validation": "", "test": "test"}
    programs.check_numbers(full, 1)
    with pytest.raises(ValueError, match="training_set = 'all' is unknown; known: held_out, full_train"):
        get_config("all")


@pytest.mark.parametrize("name", TRAINING)
def test_each_split_can_be_named_on_the_command_line(name):
    assert set(load(name).data.splits) == {"train", "validation", "test"}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_names_its_runs_apart(name):
    study = load(f"studies.{name}")
    runs = plan.expand(study)
    points = len(study.seeds)
    for _, values in study.grid:
        points *= len(values)
    assert len({run.name for run in runs}) == len(runs) == points


@pytest.mark.parametrize("name", TRAINING)
def test_every_config_can_be_run_in_both_dtypes(name):
    study = importlib.import_module("configs.studies.dtypes").get_config(name)
    runs = plan.expand(study)
    assert [run.config.dtype for run in runs] == ["float32"] * 5 + ["bfloat16"] * 5
    for run in runs:
        expected = load(name)
        expected.update(dtype=run.config.dtype, seed=run.config.seed)
        assert run.config == expected


@pytest.mark.parametrize("name", TRAINING)
def test_every_config_can_be_run_with_several_seeds(name):
    study = importlib.import_module("configs.studies.seeds").get_config(name)
    assert study.base == load(name)
    assert [run.config.seed for run in plan.expand(study)] == [0, 1, 2]


def test_a_config_of_several_seeds_is_named_with_its_choice_or_refused():
    get_config = importlib.import_module("configs.studies.seeds").get_config
    assert get_config("resnet_cifar10:full_train").base.data.splits.to_dict() == {
        "train": "train",
        "validation": "",
        "test": "test",
    }
    with pytest.raises(
        ValueError, match="'resnet' is no file of configs/; after the colon may follow: alexnet_digits, "
    ):
        get_config("resnet")


def test_the_deepest_nets_on_cifar10_start_slowly_and_the_short_schedule_is_a_tenth():
    get_config = importlib.import_module("configs.studies.depth_cifar10").get_config
    for run in plan.expand(get_config()):
        deepest = run.config.model.depth == 110
        assert run.config.schedule.warmup_steps == (400 if deepest else 0)
    short = get_config("short").base
    assert short.num_steps * 10 == get_config().base.num_steps
    assert short.optimizer == get_config().base.optimizer
    with pytest.raises(ValueError, match="schedule = 'shrot' is unknown; known: paper, short"):
        get_config("shrot")


@pytest.mark.parametrize("name", [*TRAINING, *(f"studies.{name}" for name in STUDIES)])
def test_a_config_is_locked_and_says_how_to_run_it(name):
    config = load(name)
    assert config.is_locked
    with pytest.raises((AttributeError, KeyError)):
        config.a_key_that_nobody_reads = 1
    head = importlib.import_module(f"configs.{name}").__doc__
    assert re.search(r"\nCommand: (make data DATASET=\S+\n +)?python ", head)


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


def test_the_defaults_are_of_their_types_and_no_tuple_is_one_of_anything():
    defaults = common.get_config()
    settings.check(defaults)
    types = dict(leaves(settings.KEYS))
    assert set(types) | {"data.splits.validation", "data.splits.test"} == set(flat(defaults))
    tuples = {key for key in types if isinstance(_value(defaults, key), tuple)}
    assert tuples == set(settings.TUPLES)


def _value(config, key):
    return functools.reduce(lambda part, name: part[name], key.split("."), config)


def leaves(keys, prefix=""):
    for key, kind in keys.items():
        if isinstance(kind, dict):
            yield from leaves(kind, f"{prefix}{key}.")
        elif key is not ...:
            yield prefix + key, kind


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
    program = programs.make_program(config, jax.devices()[:1])
    reader = Reader(config, seen)
    programs.make_program(reader, jax.devices()[:1])
    loop.train_and_evaluate(reader, tmp_path, program=program, show_progress=False)
    assert set(flat(config)) - seen == set()
