"""The config of a study: its checks, the runs that it defines, and lookups in it.

A study is the ConfigDict of a file in configs/studies, which `expand` turns into runs, or the dict that the
study's record holds, which `config_of`, `values_of` and `lookup` take:

    base      a training config
    grid      pairs of a key of `base` and its values; every point of the grid is run
    seeds     the seeds with which each point is run
    adjust    optional: further settings that some points need, as pairs of (key of the grid, value) and
              ((key, value), ...). Each further key is one of `base`, or a setting that the point's network
              has and the network of `base` does not
    compare   optional: the key of the grid whose values are compared in pairs of runs (see `comparison`)
    against   optional: the key of the grid, with numbers as values, against which a figure shows the final
              errors (see `final_errors`)

Points are dicts {key of the grid: value}.
"""

import collections
import copy
import itertools
import os
import re
from typing import Any, NamedTuple

from flax import traverse_util
from ml_collections import ConfigDict

from cnn_cases import settings

LONGEST_NAME = 255  # bytes of a file's name, on Linux and macOS


class Run(NamedTuple):
    """One run of a study: its name, its point of the grid, and its whole config."""

    name: str
    point: dict
    config: Any


def expand(study):
    """The runs of a study; runs that differ only in the seed are next to each other.

    Args:
      study: a ConfigDict.

    Raises:
      ValueError: the base is not a training config, the grid has an unknown key or a value of the wrong
        type, or there is nothing to run.
    """
    if not isinstance(study, ConfigDict):
        raise ValueError(f"a study must be a ConfigDict, not {study!r}")
    check(study)
    settings.check(study.base, "base.")
    short = short_names([*dict(study.grid), "seed"])
    runs = []
    for point in points_of(study):
        for seed in study.seeds:
            config = copy.deepcopy(study.base)
            own = point | {"seed": seed}
            for key, value in own.items():
                _override(config, "grid", key, value)
            for key, value in adjustments(study, point):
                group, _, setting = key.rpartition(".")
                if group == "model" and setting not in config.model:
                    with config.unlocked():
                        config.model[setting] = value  # `make_model` checks whether the network has it
                else:
                    _override(config, "adjust", key, value)
            name = "_".join(f"{short[key]}-{value}" for key, value in own.items())
            runs.append(Run(re.sub(r"[/\\\[\]*?]", "-", name), point, config))
    name, times = collections.Counter(run.name for run in runs).most_common(1)[0]
    if times > 1:
        raise ValueError(f"grid: {times} runs would have the name {name}; change the values that make it")
    for run in runs:  # now, not when its directory is to be made, after hours of other runs
        if len(os.fsencode(run.name)) > LONGEST_NAME:
            raise ValueError(
                f"grid: the name of a run would have more than {LONGEST_NAME} bytes, which is too long for "
                f"its directory: {run.name[:60]}...; use fewer keys or shorter values"
            )
    return runs


def expand_saved(saved):
    """Does the same for a study as read from JSON; raises ValueError if this code cannot read it."""
    return expand(ConfigDict(settings.from_json(settings.completed(saved))))


def _override(config, where, key, value):
    try:
        settings.override(config, key, value)
    except ValueError as error:
        raise ValueError(f"{where}: {key} = {value!r} does not fit the base config: {error}") from None


def check(study):
    """Raises ValueError unless a study has what `expand` takes; does not check its base."""
    missing = settings.STUDY_KEYS - set(study)
    if missing:
        raise ValueError(f"this is no study config: {' and '.join(sorted(missing))} missing")
    for key in set(study) - settings.STUDY_KEYS - {"adjust", "compare", "against"}:
        raise ValueError(
            f"{key} is unknown; a study has base, grid and seeds, and can have adjust, compare and against"
        )
    grid, seeds = study["grid"], study["seeds"]
    if not (_are_pairs(grid) and all(isinstance(values, tuple) for _, values in grid)):
        raise ValueError(
            f"grid = {grid} must be pairs of a key and the values it takes, all of them tuples, as in "
            "(('model.depth', (20, 56)),)"
        )
    if not (isinstance(seeds, tuple) and all(type(seed) is int for seed in seeds)):
        raise ValueError(f"seeds = {seeds} must be a tuple of whole numbers, as in (0, 1, 2)")
    keys = [key for key, _ in grid]
    if "seed" in keys:
        raise ValueError("grid: seed cannot be a key of it; list the seeds in `seeds`")
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"grid: {', '.join(sorted(twice))} must appear once, with all its values")
    for key, values in (*((f"grid: {key}", values) for key, values in grid), ("seeds", seeds)):
        if not all(map(_is_plain, values)):
            raise ValueError(f"{key} = {values} must have numbers, strings, booleans or tuples of them")
        if not values or any(value in values[:index] for index, value in enumerate(values)):
            raise ValueError(f"{key} = {values} must have values, and none of them twice")
    if "adjust" in study:
        _check_adjust(study["adjust"], keys)
    compared(study)
    against(study)


def _check_adjust(adjust, keys):
    if not (
        _are_pairs(adjust, tuple)
        and all(_are_pairs((where,)) and _are_pairs(pairs) for where, pairs in adjust)
    ):
        raise ValueError(
            f"adjust = {adjust} must be pairs of (key of the grid, value) and of pairs of a key and "
            "its value there"
        )
    for (key, _), pairs in adjust:
        if key not in keys:
            raise ValueError(f"adjust: {key} is no key of the grid, which has {', '.join(keys)}")
        for changed, value in pairs:
            if changed in (*keys, "seed"):  # otherwise a run would not match its name
                raise ValueError(f"adjust: {changed} = {value!r} must be set by the grid or the seeds")


def _are_pairs(value, first=str):
    """Whether a value is a tuple of pairs whose first part is a key, or has another type."""
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], first) for pair in value
    )


def _is_plain(value):
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def points_of(study):
    """The points of a study's grid, in order."""
    grid = dict(study["grid"])
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def adjustments(study, point):
    """Yields the (key, value) pairs of a study's `adjust` that apply to a point of its grid."""
    for (key, value), pairs in study.get("adjust", ()):
        if point[key] == value:  # never, if the part of the grid that is run lacks the value
            yield from pairs


def config_of(study, point):
    """The config of a point of a study, as `expand` makes it: base, point and adjustments."""
    flat = traverse_util.flatten_dict(study["base"], sep=".")
    return traverse_util.unflatten_dict(flat | point | dict(adjustments(study, point)), sep=".")


def values_of(study, key):
    """The distinct values of a key over the points of a study's grid, in order."""
    return tuple(dict.fromkeys(lookup(config_of(study, point), key) for point in points_of(study)))


def lookup(config, key):
    """The value of a key such as "data.augment.flip"; None if a config does not have it."""
    value = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def compared(study):
    """What a study compares in pairs: each further value of a key of its grid with the first value.

    Returns:
      (key, first value, tuple of the further values); None without `compare`, or if the key has one value.

    Raises:
      ValueError: `compare` is not a key of the grid.
    """
    if "compare" not in study:
        return None
    first, *others = _values_of_named(study, "compare")
    return (study["compare"], first, tuple(others)) if others else None


def against(study):
    """The key of a study's grid against which its final errors are drawn.

    None without `against`, or if the key has one value.

    Raises:
      ValueError: `against` is not a key of the grid, or not all of its values are numbers.
    """
    if "against" not in study:
        return None
    values = _values_of_named(study, "against")
    if not all(type(value) in (int, float) for value in values):
        raise ValueError(f"against = {study['against']!r} must have numbers in the grid, not {values}")
    return study["against"] if len(values) > 1 else None


def _values_of_named(study, name):
    """The values of the key of its grid that a study's `name` is."""
    key, grid = study[name], dict(study["grid"])
    if key not in list(grid):
        raise ValueError(f"{name} = {key!r} must be a key of the grid, which has {', '.join(grid) or 'none'}")
    return grid[key]


def short_names(keys):
    """{key: its last parts, as many as make it unique}: for model.depth usually `depth`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-number:]) for number in range(1, len(parts))]
        others = [f".{other}" for other in keys if other != key]
        unlike = (tail for tail in tails if not any(other.endswith(f".{tail}") for other in others))
        names[key] = next(unlike, key)
    return names


_VAGUE = re.compile(r"start\.|data\.splits\.|.*\.name$")  # `workdir`, `train` or `name` alone say too little


def titles_of(keys):
    """{key: its name in a table or a legend}."""
    short = short_names(keys)
    return {key: key.replace("data.splits.", "splits.") if _VAGUE.match(key) else short[key] for key in keys}


def text_of(value):
    """The value of a key in a table or a legend: `20`, `conv* and dense*`; `none` if it is empty."""
    return (" and ".join(map(text_of, value)) if isinstance(value, tuple) else str(value)) or "none"
