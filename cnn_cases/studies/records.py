"""What a study leaves for later readers: its record, and how its runs are told apart and put together.

A record is a dict that JSON can hold, made by `sweep.make_record`:

    config          of the study: base, grid and seeds, and adjust and compare, where it has them
    environments    commit, code, versions, devices and data of the starts of its runs, each once
    runs            one dict a run: its point of the grid {key: value}, seed, status ("finished", "diverged"),
                    step (the last), metrics (of a finished one), seconds, date (of its end), environments
                    (the numbers of those in which it was started and resumed), curves {"running/error",
                    "running/loss", "<split>/error", "<split>/loss": [[step, value]]}

Errors are fractions. Runs that began before 2026-11-25 lack the losses and the numbers of environments.
"""

import collections
import json
import pathlib
import zlib

from cnn_cases import settings


def read(path):
    """The record in a JSON file; None where the file holds something else.

    Raises:
      ValueError: the file is no JSON, or a record from which something is missing.
    """
    try:
        record = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not (isinstance(record, dict) and {"config", "environments", "runs"} <= record.keys()):
        return None
    study = record["config"]
    if not (isinstance(study, dict) and settings.is_study(study)):
        return None
    # The values of a grid can be tuples, of which JSON made lists, and points are looked up by their values.
    study = settings.from_json(study)
    _check(record, study, path)
    runs = [run | {key: settings.from_json(run[key]) for key, _ in study["grid"]} for run in record["runs"]]
    return record | {"config": study, "runs": runs}


def _check(record, study, path):
    keys = {"seed", "status", "step", "curves", *(key for key, _ in study["grid"])}
    for part, needed in (("environments", {"commit", "versions"}), ("runs", keys)):
        if not record[part]:
            raise ValueError(f"{path}: {part} = [] must not be empty")
        for number, one in enumerate(record[part]):
            own = {"metrics"} if one.get("status") == "finished" else set()
            missing = sorted((needed | own) - one.keys())
            if missing:
                raise ValueError(f"{path}: {part}[{number}] has no {missing[0]}")
    try:
        compared(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def lookup(config, key):
    """The value of a key such as "data.augment.flip"; None where a config does not have it."""
    value = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def values(record, key):
    """The values of a key in the runs of a study: those of the grid, or the one of the base."""
    study = record["config"]
    return tuple(dict(study["grid"]).get(key, (lookup(study["base"], key),)))


def text_of(value):
    """The value of a key in a table or a legend: `20`, `conv* and dense*`; `none` where it is empty."""
    return (" and ".join(map(text_of, value)) if isinstance(value, tuple) else str(value)) or "none"


def adjustments(study, point):
    """Yields the pairs of a key and its value that `adjust` of a study has for a point of its grid.

    Args:
      study: the config of a study, or that of a record.
      point: {key of the grid: value}.

    Raises:
      ValueError: `adjust` names a key that is not of the grid.
    """
    for (key, value), pairs in study.get("adjust", ()):
        if key not in point:
            raise ValueError(f"adjust: {key} is no key of the grid, which has {', '.join(point)}")
        if point[key] == value:  # a part of the grid may be run, without it
            yield from pairs


def compared(study):
    """What a study compares in pairs: a key of its grid, the first value of it, and the others, each with it.

    Args:
      study: the config of a study, or that of a record.

    Returns:
      (key, first value, tuple of the others); None where it has no `compare`, or one value alone.

    Raises:
      ValueError: `compare` is no key of the grid.
    """
    if "compare" not in study:
        return None
    key, grid = study["compare"], dict(study["grid"])
    if key not in list(grid):
        raise ValueError(
            f"compare = {key!r} must be a key of the grid, which has {', '.join(grid) or 'none'}"
        )
    first, *others = grid[key] or (None,)
    return (key, first, tuple(others)) if others else None


def code_of(environment):
    """What tells the code of one run from that of another, as a tuple: code, packages, kinds of devices.

    The code is a checksum of what a training runs; older environments have the commit alone.
    """
    code = environment.get("code", environment["commit"])
    return code, *sorted(environment["versions"].items()), *_kinds_of_devices(environment)


def _kinds_of_devices(environment):
    return tuple(sorted(set(environment.get("devices", ()))))


def split_by_code(record):
    """A record in parts, each of the runs that one code made: no mean should be taken over several.

    The code is that of `code_of`, at every start of a run; and the data, where runs that should have had the
    same had others. An older record does not say which run had which and stays whole.

    Returns:
      {what tells a code from the others, in words: record}; {"": record} where all runs had the same.
    """
    environments = record["environments"]
    versions = [environment["versions"] for environment in environments]
    packages = sorted({name for one in versions for name in one})
    changed = [name for name in packages if len({one.get(name) for one in versions}) > 1]
    several_kinds = len(set(map(_kinds_of_devices, environments))) > 1

    def starts_of(run):
        return [environments[number] for number in run.get("environments", range(len(environments)))]

    def data_of(environment):
        return json.dumps(environment.get("data"))

    other_data = any(
        len({data_of(start) for run in runs for start in starts_of(run)}) > 1
        for runs in group_by_point(record).values()
    )

    def words(environment):
        commit = environment["commit"]
        parts = [commit[:7] + commit[40:] if commit else "no commit"]  # with what follows of local changes
        parts += [f"{name} {environment['versions'].get(name)}" for name in changed]
        if several_kinds:
            parts.append(f"on {', '.join(_kinds_of_devices(environment)) or 'unknown'}")
        if other_data:
            parts.append(f"data {zlib.crc32(data_of(environment).encode()):08x}")
        return " ".join(parts)

    names, parts = {}, collections.defaultdict(list)
    for run in record["runs"]:
        starts = starts_of(run)
        key = tuple(dict.fromkeys((code_of(start), data_of(start) * other_data) for start in starts))
        name = names.setdefault(key, " then ".join(dict.fromkeys(map(words, starts))))
        parts[name].append(run)
    if len(parts) == 1:
        return {"": record}
    return {code: record | {"runs": runs} for code, runs in parts.items()}


def group_by_point(record):
    """{point of the grid, as a tuple of values: its runs}."""
    keys = [key for key, _ in record["config"]["grid"]]
    points = collections.defaultdict(list)
    for run in record["runs"]:
        points[tuple(run[key] for key in keys)].append(run)
    return dict(points)


def names_of_points(record, without=None):
    """{point, as a tuple of values: what a legend calls it, such as "depth 8, plain True"}.

    Args:
      record: of a study.
      without: a key of the grid that the names leave out.
    """
    keys = [key for key, _ in record["config"]["grid"]]
    short = short_names(keys)
    return {
        point: ", ".join(
            f"{short[key]} {text_of(value)}" for key, value in zip(keys, point, strict=True) if key != without
        )
        for point in group_by_point(record)
    }


def short_names(keys):
    """{key: its last parts, as many as tell it from the others}: of model.depth mostly `depth`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-number:]) for number in range(1, len(parts))]
        others = [f".{other}" for other in keys if other != key]
        unlike = (tail for tail in tails if not any(other.endswith(f".{tail}") for other in others))
        names[key] = next(unlike, key)
    return names
