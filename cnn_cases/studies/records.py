"""The record of a study: how it is read and checked, and how its runs are told apart and grouped.

A record is a dict that JSON can hold, made by `sweep.make_record`:

    config          the config of the study (see `plan`)
    environments    the distinct environments in which its runs started: commit, code, versions, devices, data
    runs            one dict per run: its point of the grid {key: value}, seed, config_hash (since 2026-12),
                    status ("finished", "diverged"), step (the last), metrics (if finished), seconds, date (of
                    its end), environments (indices of those in which it was started and resumed), curves
                    {"running/error", "running/loss", "<split>/error", "<split>/loss": [[step, value]]}

Errors are fractions.
"""

import collections
import hashlib
import json
import math
import pathlib
import reprlib
import zlib

from cnn_cases import settings
from cnn_cases.studies import plan

# Settings of JAX that change the numbers of a run, as `provenance.environment` names them.
JAX_DEFAULTS = {
    "matmul_precision": None,
    "random_numbers": "threefry2x32",
    "partitionable": True,
    "x64": False,
}


def read(path):
    """The record in a JSON file; None if the file holds something else.

    Raises:
      ValueError: the file is not JSON, or is a record with a missing or impossible part.
    """
    try:
        record = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not (isinstance(record, dict) and {"config", "environments", "runs"} <= record.keys()):
        return None
    if not (isinstance(record["config"], dict) and settings.is_study(record["config"])):
        return None
    try:
        # JSON turns tuples among the grid's values into lists, but points are looked up by these values.
        study = settings.from_json(record["config"])
        plan.check(study)
        _check_parts(record, study)
        for run in plan.expand_saved(record["config"]):
            if min(run.config.num_steps, run.config.batch_size) < 1:
                raise ValueError(f"config: num_steps and batch_size of {run.name} must be 1 or more")
        runs = [
            run | {key: settings.from_json(run[key]) for key, _ in study["grid"]} for run in record["runs"]
        ]
        record |= {"config": study, "runs": runs}
        _check_runs(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def _check_parts(record, study):
    """Raises ValueError unless the parts of a record, and of its study's base, are present."""
    keys = {"seed", "status", "step", "curves", "environments", *(key for key, _ in study["grid"])}
    parts = {"environments": {"commit", "versions", "devices", "cpus"}, "runs": keys}
    for part, needed in parts.items():
        if not (isinstance(record[part], list) and record[part]):
            raise ValueError(f"{part} = {record[part]!r} must be a list, and must not be empty")
        for number, one in enumerate(record[part]):
            if not isinstance(one, dict):
                raise ValueError(f"{part}[{number}] = {one!r} must have keys")
            own = {"metrics"} if one.get("status") == "finished" else set()
            missing = sorted((needed | own) - one.keys())
            if missing:
                raise ValueError(f"{part}[{number}] has no {missing[0]}")
    for number, environment in enumerate(record["environments"]):
        for key, allowed in _wrong_in_environment(environment):
            raise ValueError(f"environments[{number}]: {key} = {environment[key]!r} must be {allowed}")
    for key in ("model.name", "data.name", "data.splits.train", "num_steps", "batch_size"):
        if plan.lookup(study["base"], key) is None:  # `expand_saved` would complete it with a default
            raise ValueError(f"config: base has no {key}")


def _wrong_in_environment(environment):
    """Yields the errors of an environment: a key, and what would be allowed."""
    # Older environments lack all but the commit.
    for key in ("commit", "code", "matmul_precision", "random_numbers"):
        if not isinstance(environment.get(key), str | None):
            yield key, "a text or null"
    for key in ("partitionable", "x64"):
        if not isinstance(environment.get(key), bool | None):
            yield key, "true or false"
    versions, devices = environment["versions"], environment["devices"]
    # A package that another one stands in for has no version.
    if not (isinstance(versions, dict) and all(isinstance(one, str | None) for one in versions.values())):
        yield "versions", "names of packages with their versions"
    if not (isinstance(devices, list) and all(isinstance(one, str) for one in devices)):
        yield "devices", "a list of texts"
    if not isinstance(environment["cpus"], int):
        yield "cpus", "a whole number"


def _check_runs(record):
    """Raises ValueError if a run has an impossible value or is recorded twice."""
    seen = set()
    for number, run in enumerate(record["runs"]):
        for key, value, allowed in _wrong(record, run):
            raise ValueError(f"runs[{number}]: {key} = {reprlib.repr(value)} must be {allowed}")
        identity = (*point_of(record, run).values(), run["seed"], codes_of(record, run))
        if identity in seen:
            raise ValueError(
                f"runs[{number}] is a duplicate, of the same code and with seed {run['seed']}; remove one"
            )
        seen.add(identity)


def _wrong(record, run):
    """Yields the errors of a run: a key, its value, and what would be allowed."""
    study, numbers = record["config"], range(len(record["environments"]))
    if run["status"] not in ("finished", "diverged"):
        yield "status", run["status"], "'finished' or 'diverged'"
    for key, values in (*study["grid"], ("seed", study["seeds"])):
        if run[key] not in values:
            yield key, run[key], f"one of {', '.join(map(repr, values))}"
    if "config_hash" in run:
        here = config_hash(study, point_of(record, run), run["seed"])
        if run["config_hash"] != here:
            yield "config_hash", run["config_hash"], f"{here}, that of the record's config"
    if not _is_number(run["step"]):
        yield "step", run["step"], "a number"
    if not isinstance(run.get("date", ""), str):
        yield "date", run["date"], "a text"
    starts = run["environments"]
    are_numbers = isinstance(starts, list) and all(type(start) is int for start in starts)
    if not (are_numbers and starts and all(start in numbers for start in starts)):
        yield "environments", starts, f"numbers of environments, which are below {len(numbers)}"
    figures = [("curves", _is_curve, "pairs of a step and a finite number")]
    if run["status"] == "finished":
        figures.append(("metrics", _is_number, "a finite number"))
    for part, is_possible, allowed in figures:
        if not isinstance(run[part], dict):
            yield part, run[part], "named figures"
        for name, value in run[part].items():
            if not is_possible(value):
                yield f"{part}: {name}", value, allowed


def config_hash(study, point, seed):
    """Identifies the config of a run, as text; a record whose config was changed later no longer has it.

    Args:
      study: the config of a record.
      point: {key of the grid: value}.
      seed: of the run.
    """
    config = plan.config_of(study, point) | {"seed": seed}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def _is_curve(value):
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in value
    )


def _is_number(value):
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False


def code_of(environment):
    """Identifies the code of a run, as a tuple: code, packages and settings of JAX, kinds of devices.

    The code is a checksum of the training code; older environments have only the commit.
    """
    code = environment.get("code", environment["commit"])
    return code, *sorted(_packages(environment).items()), *_kinds_of_devices(environment)


def data_of(environment):
    """Identifies the data of a run, as text; "null" for older environments."""
    return json.dumps(environment.get("data"))


def _packages(environment):
    """{package: version} of those that have one, and {setting of JAX: value} of those that were changed."""
    versions = {name: version for name, version in environment["versions"].items() if version}
    settings = {name: environment.get(name, default) for name, default in JAX_DEFAULTS.items()}
    return versions | {name: value for name, value in settings.items() if value != JAX_DEFAULTS[name]}


def _kinds_of_devices(environment):
    return tuple(sorted(set(environment["devices"])))


def point_of(record, run):
    """The point of the grid at which a run is: {key: value}."""
    return {key: run[key] for key, _ in record["config"]["grid"]}


def starts_of(record, run):
    """The environments in which a run was started and resumed, in order."""
    return [record["environments"][number] for number in run["environments"]]


def codes_of(record, run):
    """Identifies the code and the data at all starts of a run, as a set."""
    return frozenset((code_of(start), data_of(start)) for start in starts_of(record, run))


def split_by_code(record):
    """Splits a record by the code of its runs: no mean should be taken over several codes.

    The code is that of `code_of` at every start of a run. It includes the data if runs whose configs name the
    same data, and the same start, did not have the same.

    Returns:
      {what distinguishes a code, in words: record}; {"": record} if all runs had the same code.
    """
    had = collections.defaultdict(set)
    for run in record["runs"]:
        config = plan.config_of(record["config"], point_of(record, run))
        named = json.dumps([config["data"], plan.lookup(config, "start")], sort_keys=True)
        had[named].update(map(data_of, starts_of(record, run)))
    other_data = any(len(each) > 1 for each in had.values())
    parts = collections.defaultdict(list)
    for run in record["runs"]:
        codes = ((code_of(start), data_of(start) * other_data) for start in starts_of(record, run))
        parts[tuple(dict.fromkeys(codes))].append(run)
    if len(parts) == 1:
        return {"": record}
    starts = [starts_of(record, runs[0]) for runs in parts.values()]
    names = _names_of_codes(starts, record["environments"], other_data)
    return {name: record | {"runs": runs} for name, runs in zip(names, parts.values(), strict=True)}


def _names_of_codes(codes, environments, other_data):
    """Says what distinguishes codes, each given as the starts of one of its runs, in words."""
    packages = list(map(_packages, environments))
    names = sorted({name for one in packages for name in one})
    changed = [name for name in names if len({one.get(name) for one in packages}) > 1]
    several_kinds = len(set(map(_kinds_of_devices, environments))) > 1

    def words(start):
        commit = start["commit"]
        parts = [commit[:7] + commit[40:] if commit else "no commit"]  # with the suffix for local changes
        parts += [f"{name} {_packages(start).get(name, JAX_DEFAULTS.get(name))}" for name in changed]
        if several_kinds:
            parts.append(f"on {', '.join(_kinds_of_devices(start)) or 'unknown'}")
        if other_data:
            parts.append(f"data {zlib.crc32(data_of(start).encode()):08x}")
        return " ".join(parts)

    names = [" then ".join(dict.fromkeys(map(words, starts))) for starts in codes]
    # Words can be the same without a commit, or with two sets of local changes to one.
    sums = [f" ({', '.join(dict.fromkeys(str(start.get('code')) for start in starts))})" for starts in codes]
    return [name + code * (names.count(name) > 1) for name, code in zip(names, sums, strict=True)]


def num_diverged(runs):
    """How many of the runs diverged."""
    return sum(run["status"] == "diverged" for run in runs)


def final_metrics(runs):
    """The final metrics, {name: value}, of those of the runs that finished."""
    return [run["metrics"] for run in runs if run["status"] == "finished"]


def group_by_point(record):
    """{point of the grid, as a tuple of values: its runs}."""
    points = collections.defaultdict(list)
    for run in record["runs"]:
        points[tuple(point_of(record, run).values())].append(run)
    return dict(points)


def names_of_points(record, without=None):
    """{point, as a tuple of values: its name in a legend, such as "depth 8, plain True"}.

    Args:
      record: the record of a study.
      without: a key of the grid to leave out of the names.
    """
    keys = [key for key, _ in record["config"]["grid"]]
    short = plan.titles_of(keys)
    return {
        point: ", ".join(
            f"{short[key]} {plan.text_of(value)}"
            for key, value in zip(keys, point, strict=True)
            if key != without
        )
        for point in group_by_point(record)
    }
