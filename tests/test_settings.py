"""Every mistake in the keys or the types of a config has one message, which names the key."""

import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from cnn_cases import settings
from configs import common
from configs.studies import depth_digits


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("optimizer", "momentum", "0.9", r"optimizer\.momentum = '0\.9' \(str\) must be a float"),
        (
            "optimizer",
            "momentum",
            float("nan"),
            r"optimizer\.momentum = nan \(float\) must be a float \(finite",
        ),
        ("optimizer", "momentum", 1e39, r"optimizer\.momentum = 1e\+39 \(float\) must be a float \(finite"),
        ("optimizer", "momentum", True, r"optimizer\.momentum = True \(bool\) must be a float"),
        ("optimizer", "nesterov", 1, r"optimizer\.nesterov = 1 \(int\) must be a bool"),
        ("optimizer", "momentun", 0.9, r"optimizer\.momentun is unknown; did you mean optimizer\.momentum\?"),
        ("checkpoint", "xyz", 0.9, r"checkpoint\.xyz is unknown; known: best_on, every_steps, keep_last"),
        ("data", "augment", 3, r"data\.augment = 3 \(int\) must be a ConfigDict with brightness, contrast"),
        ("data", "border", False, r"data\.border = False \(bool\) must be an int"),
        ("data", "border", 1e3, r"data\.border = 1000\.0 \(float\) must be an int"),
        ("data", "border", 2**63, r"data\.border = 9\d* \(int\) must be an int \(of 64 bits\)"),
        ("data", "border", np.int64(2), r"data\.border = .*2\)? \(int64\) must be an int"),
        ("data", "splits", {"test": "test"}, r"data\.splits\.train is missing"),
        ("data", "splits", {3: "test"}, r"data\.splits\.3 is unknown"),
        ("data", "splits", {"train": "train", 3: "test"}, "config has keys that are not strings"),
        ("evaluation", "splits", "test", r"evaluation\.splits = 'test' \(str\) must be a tuple of strs"),
        ("evaluation", "splits", (1,), r"evaluation\.splits = \(1,\) \(tuple\) must be a tuple of strs"),
        ("model", "depth", {20}, r"model\.depth = \{20\} \(set\) must be a value that JSON can hold"),
        ("model", "num_classes", 10, r"model\.num_classes cannot be set: there are as many classes as"),
        ("model", "dtype", "bfloat16", r"model\.dtype cannot be set: the compute type is dtype"),
        ("model", "axis_name", None, r"model\.axis_name cannot be set: sync_batch_norm says whether"),
        ("model", "name", ["lenet5"], r"model\.name = \['lenet5'\] \(list\) must be a str"),
    ],
)
def test_a_mistake_is_named(section, key, value, message):
    config = common.get_config().to_dict()
    config[section][key] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        settings.check(ConfigDict(config))


@pytest.mark.parametrize(
    ("key", "near"),
    [("seed", "seeds"), ("batch_size", "base.batch_size"), ("base.modl.depth", "base.model.depth")],
)
def test_a_mistaken_key_of_a_study_leads_to_the_nearest(key, near):
    with pytest.raises(ValueError, match=f"there is no such key; did you mean {re.escape(near)}\\?$"):
        settings.check_key(depth_digits.get_config(), key)


def test_a_key_that_is_near_none_of_a_study_is_refused_with_the_keys_of_the_study():
    with pytest.raises(ValueError, match=r"there is no such key; known: base, grid, seeds$"):
        settings.check_key(depth_digits.get_config(), "gird")


@pytest.mark.parametrize("value", [(256,), (256, 256, 256), (256.0, 256.0), [256, 256]])
def test_a_pair_is_a_tuple_of_two(value):
    config = common.get_config().to_dict()
    config["data"]["crop"]["shorter_side"] = value
    with pytest.raises(ValueError, match=r"data\.crop\.shorter_side = .* must be a tuple of two ints"):
        settings.check(ConfigDict(config))


def test_an_int_will_do_for_a_float_and_other_splits_and_settings_of_models_are_let_through():
    config = common.get_config().to_dict()
    config["optimizer"]["learning_rate"] = 1
    config["schedule"]["boundaries"] = (0.5, 1)
    config["data"]["splits"]["few"] = "train[:10]"
    config["model"]["depth"] = 20
    settings.check(ConfigDict(config))


def test_every_key_is_asked_for():
    for path in paths(settings.KEYS):
        config = common.get_config().to_dict()
        part = config
        for name in path[:-1]:
            part = part[name]
        del part[path[-1]]
        expected = "it has no model" if path == ("model",) else f"^{'.'.join(path)} is missing"
        with pytest.raises(ValueError, match=expected):
            settings.check(ConfigDict(config))


def paths(keys, before=()):
    for key, kind in keys.items():
        if key is not ...:
            yield (*before, key)
        if isinstance(kind, dict):
            yield from paths(kind, (*before, key))


@pytest.mark.parametrize("config", [None, {"num_steps": 1}, 3])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match=r"config = .* must be a ConfigDict"):
        settings.check(config)


def test_a_study_is_told_where_it_belongs():
    with pytest.raises(ValueError, match=r"config is a study, for python -m cnn_cases\.studies\.sweep"):
        settings.check(depth_digits.get_config())
