"""Checks the keys of a training config and the types of their values.

`configs/common.py` lists the keys with their defaults and units; a key has the type of its default. This
module checks only names and types, once, before anything is built. The code that uses a value checks its
range.
"""

import difflib
import json
import reprlib

import numpy as np
from flax import traverse_util

from configs import common

# Devices compute in float32, so configs may hold only finite float32 numbers.
LARGEST_FLOAT = float(np.finfo(np.float32).max)
TUPLES = {  # type of the elements, and their number; None for any
    "start.layers": (str, None),
    "data.crop.shorter_side": (int, 2),
    "data.crop.area": (float, 2),
    "data.crop.aspect": (float, 2),
    "optimizer.rate_patterns": (str, None),
    "optimizer.rate_factors": (float, None),
    "optimizer.frozen": (str, None),
    "schedule.boundaries": (float, None),
    "schedule.factors": (float, None),
    "evaluation.splits": (str, None),
    "evaluation.final_splits": (str, None),
    "profile_steps": (int, None),
}


def _kinds(section, prefix=""):
    """Maps each key to the type of its default, or each section to such a dict."""
    return {
        key: _kinds(default, f"{prefix}{key}.")
        if isinstance(default, dict)
        else TUPLES.get(f"{prefix}{key}", type(default))
        for key, default in section.items()
    }


# An int is accepted for a float, but a bool is not a number. `...` stands for any other key, and `object` for
# any value that JSON, the format of saved configs, can hold.
KEYS = _kinds(common.get_config().to_dict())
KEYS["model"] = {"name": str, ...: object}  # `models` has the types of the architecture's own fields
KEYS["data"]["splits"] = {"train": str, ...: str}
STUDY_KEYS = {"base", "grid", "seeds"}  # `plan` explains them, and others that are optional
NOT_OF_MODEL = {  # fields of a model that other keys, or the data, determine
    "num_classes": "there are as many classes as the data set has",
    "dtype": "the compute type is dtype, without model.",
    "axis_name": "sync_batch_norm says whether devices share their batch statistics",
}


def from_json(value):
    """Turns the lists in a config from JSON, or in a part of it, back into tuples."""
    if isinstance(value, dict):
        return {key: from_json(part) for key, part in value.items()}
    return tuple(map(from_json, value)) if isinstance(value, list) else value


def is_study(config):
    """Whether a dict is the config of a study, not of a training run."""
    return config.keys() >= STUDY_KEYS


def parts(config):
    """The splits of a training config, {role: TFDS split expression}, without those that are ""."""
    return {role: split for role, split in config.data.splits.items() if split}


def completed(saved):
    """Completes a config from JSON with the defaults of configs/common.py for newer keys.

    Args:
      saved: the dict of a run's or a study's config; any other dict is returned unchanged.
    """
    if is_study(saved) and isinstance(saved["base"], dict):
        return saved | {"base": completed(saved["base"])}
    if not {"model", "data"} <= saved.keys():
        return saved
    defaults = common.get_config().to_dict()
    # A saved config has all settings of its model, and "" for a split that it lacks.
    defaults["model"], defaults["data"]["splits"] = {}, dict.fromkeys(defaults["data"]["splits"], "")
    return _updated(json.loads(json.dumps(defaults)), saved)


def _updated(old, new):
    """Merges the nested dict `new` into `old`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _updated(old[key], value) if key in old else value for key, value in new.items()}


def override(config, key, value):
    """Sets a key of a config to another value.

    Args:
      config: a ConfigDict, such as those of `configs/`.
      key: the full name, such as "data.augment.flip".
      value: of the same type as the old value.

    Raises:
      ValueError: the config has no such key, or the value has another type.
    """
    check_key(config, key)
    try:
        config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as error:
        old = _flat(config)[key]
        raise ValueError(f"it must be {_words(type(old))}, as {old!r} is") from error


def check_key(config, key):
    """Raises ValueError, which suggests other keys, unless a config has a key with this full name."""
    known = _flat(config)
    if key in known:
        return
    in_a_group = [one for one in known if one.endswith(f".{key}")]  # such as a study's base
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8) or in_a_group
    beside = [one for one in known if one.startswith((f"{key}.", f"{key.rpartition('.')[0]}."))]
    beside = beside or (list(config) if is_study(config.to_dict()) else [])
    hint = f"known: {', '.join(beside)}" if beside else "configs/common.py lists the keys"
    raise ValueError(f"there is no such key; {f'did you mean {near[0]}?' if near else hint}")


def _flat(config):
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def check(config, prefix=""):
    """Raises ValueError unless a config has just the keys of a training config, with values of their types.

    Args:
      config: a ConfigDict, such as those of `configs/`.
      prefix: put before the names of keys in messages, if the config is part of another one.
    """
    what = prefix.removesuffix(".") or "config"
    if not hasattr(config, "to_dict"):
        raise ValueError(f"{what} = {_show(config)} must be a ConfigDict, as configs/common.py makes it")
    try:
        values = config.to_dict()
    except TypeError as error:  # keys that cannot be sorted
        raise ValueError(f"{what} has keys that are not strings: {error}") from error
    if is_study(values):
        raise ValueError(f"{what} is a study, for python -m cnn_cases.studies.sweep, or .depth_curves")
    if "model" not in values:
        raise ValueError(
            f"{what} is not a training config: it has no model, only {', '.join(map(str, values))}"
        )
    _check_section(prefix, values, KEYS)
    for key, reason in NOT_OF_MODEL.items():
        if key in values["model"]:
            raise ValueError(f"{prefix}model.{key} cannot be set: {reason}; leave it out")


def _check_section(prefix, section, keys):
    others = keys.get(...)
    known = [key for key in keys if key is not ...]
    for key in section:
        if key not in known and not (others and isinstance(key, str)):
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{prefix}{key} is unknown; {hint}")
    for key in known:
        if key not in section:
            raise ValueError(f"{prefix}{key} is missing")
    for key, value in section.items():
        kind = keys.get(key, others)
        if not isinstance(kind, dict):
            if not _is(value, kind):
                raise ValueError(f"{prefix}{key} = {_show(value)} must be {_words(kind)}")
        elif isinstance(value, dict):
            _check_section(f"{prefix}{key}.", value, kind)
        else:
            names = ", ".join(name for name in kind if name is not ...)
            raise ValueError(f"{prefix}{key} = {_show(value)} must be a ConfigDict with {names}")


def _is(value, kind):
    if isinstance(kind, tuple):
        element, number = kind
        of_length = isinstance(value, tuple) and number in (None, len(value))
        return of_length and all(_is(part, element) for part in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if kind is object:
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            return False
    return isinstance(value, kind)


def _words(kind):
    if isinstance(kind, tuple):
        element, number = kind
        return f"a tuple of {'two ' if number else ''}{element.__name__}s"
    words = {
        int: "an int (of 64 bits)",
        float: "a float (finite, of 32 bits)",
        object: "a value that JSON can hold",
    }
    return words.get(kind, f"a {kind.__name__}")


def _show(value):
    """A value and its type, which the value alone may not show: '0.9' (str)."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"
