"""The studies whose records are directly in results/, in one table next to the published results.

    python -m cnn_cases.studies.ledger              prints the table in Markdown
    python -m cnn_cases.studies.ledger --write      writes it into docs/results.md, and its rows with a
                                                    published figure into README.md, between the markers

A row consists of runs that differ only in the seed: they have the same recipe (the config without the seed,
the location of the data, and what is saved and logged) and the same code (`records.code_of`: the checksum of
the training code, packages, kinds of devices). Runs with other codes or recipes are in other rows and are
never averaged together. Where numbers of devices or threads differ, the row says "several".

A published figure is shown only for runs of the paper's length. A run that was trained on fewer or more
images, counting repetitions, says so in its steps and has no published figure. The docstring of the run's
config lists the other departures from the paper.
"""

import argparse
import collections
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple
from urllib import parse

from flax import traverse_util

from cnn_cases import parsing, settings, tables
from cnn_cases.studies import plan, records
from cnn_cases.training import disk, logbook
from configs import common

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = ROOT / "README.md", ROOT / "docs/results.md"
# {the line of a document after which the table begins: whether it is the short table}.
BEGINNINGS = {
    "<!-- Compared with the papers: written by `python -m cnn_cases.studies.ledger --write`. -->": True,
    "<!-- All results: written by `python -m cnn_cases.studies.ledger --write`. -->": False,
}
END = "<!-- End of the results. -->"

# The parts of a config that no result depends on: groups, and keys with their groups.
ASIDE = (
    "seed",
    "checkpoint",
    "log_every_steps",
    "evaluation.every_steps",
    *logbook.OF_THE_MACHINE,
)


class Published(NamedTuple):
    """A published figure, and the runs to compare it with.

    Attributes:
      where: {key of a config: value}. A key that a record lacks is newer than it, and counts as 0 or empty.
      error: in percent.
      examples: training images in the paper, counting repetitions.
      source: paper and table.
      metric: the metric of a run to compare.
      recalled: whether the figure is from memory and was not checked against the paper.
    """

    where: dict[str, Any]
    error: float
    examples: int
    source: str
    metric: str = "test/error"
    recalled: bool = False


LENET = {"data.name": "mnist", "model.name": "lenet5_1998", "data.augment.elastic": 0}
UNDISTORTED = {f"data.augment.{name}": 0 for name in ("shift", "scale", "shear", "squeeze")}
CROPS = {"data.name": "cifar10", "data.augment.flip": True, "data.augment.pad": 4}
RESNET = CROPS | {"model.name": "resnet_cifar", "model.plain": False, "model.shortcut": "A"}
PREACT = CROPS | {"model.name": "resnet_preact_cifar"}
NIN = {"data.name": "cifar10", "model.name": "nin", "model.variant": "cifar"}
IMAGENET = {"data.name": "imagenet2012"}
IMAGENET_RESNET = IMAGENET | {"model.name": "resnet"}
EPOCH = common.IMAGENET2012_TRAIN  # images
LONGER = 1.05  # times a paper's examples, which allows for rounding to whole epochs and batches

PUBLISHED = (
    Published(LENET | UNDISTORTED, 0.95, 20 * 60_000, "LeCun et al. 1998, section III"),
    Published(
        LENET | {"data.augment.shift": 2}, 0.8, 20 * 60_000, "LeCun et al. 1998, section III", recalled=True
    ),
    # The figure for 110 layers is the mean of five runs, of which the best had 6.43.
    *(
        Published(RESNET | {"model.depth": depth}, error, 64_000 * 128, "He et al. 2015, table 6")
        for depth, error in ((20, 8.75), (32, 7.51), (44, 7.17), (56, 6.97), (110, 6.61), (1202, 7.93))
    ),
    # Medians of five runs. The length with batches of 64 is from the authors' code (resnet-1k-layers).
    *(
        Published(
            PREACT | {"model.depth": depth, "batch_size": batch_size},
            error,
            examples,
            "He et al. 2016, table 4",
            recalled=True,
        )
        for depth, batch_size, error, examples in (
            (164, 128, 5.46, 64_000 * 128),
            (1001, 128, 4.92, 64_000 * 128),
            (1001, 64, 4.62, 200 * 50_000),
        )
    ),
    # The paper does not give the length; these are the steps of `nin_cifar10`.
    Published(
        NIN | {"data.augment.flip": False}, 10.41, 80_000 * 128, "Lin et al. 2013, table 1", recalled=True
    ),
    Published(
        NIN | {"data.augment.flip": True}, 8.81, 80_000 * 128, "Lin et al. 2013, table 1", recalled=True
    ),
    Published(
        IMAGENET | {"model.name": "alexnet", "model.variant": "two_groups"},
        40.7,
        90 * EPOCH,
        "Krizhevsky et al. 2012, table 2",
        metric="test/ten_crop/error",
        recalled=True,
    ),
    *(
        Published(
            IMAGENET | {"model.name": "vgg", "model.variant": variant, "model.batch_norm": False},
            24.8,
            74 * EPOCH,
            "Simonyan, Zisserman 2014, table 4",
            metric="test/multi_scale_dense/error",
            recalled=True,
        )
        for variant in "DE"
    ),
    *(
        Published(
            IMAGENET_RESNET | {"model.depth": depth, "model.plain": plain, "model.shortcut": shortcut},
            error,
            600_000 * 256,
            f"He et al. 2015, table {number}",
            metric="test/ten_crop/error",
        )
        for number, depth, plain, shortcut, error in (
            (2, 18, True, "A", 27.94),
            (2, 34, True, "A", 28.54),
            (2, 18, False, "A", 27.88),
            (2, 34, False, "A", 25.03),
            (3, 34, False, "B", 24.52),
            (3, 34, False, "C", 24.19),
            (3, 50, False, "B", 22.85),
            (3, 101, False, "B", 21.75),
            (3, 152, False, "B", 21.43),
        )
    ),
)


class Row(NamedTuple):
    """Runs that differ only in the seed.

    Attributes:
      names: the names of their records.
      point: {key of the grid: value}.
      config: the full config of the point.
      environments: of the runs.
      runs: as in the record.
    """

    names: list
    point: dict
    config: dict
    environments: list
    runs: list


def read_records(directory):
    """Reads the JSON files of a directory, and separates studies from other files.

    Returns:
      {name: record} of the studies, and the names of the files that hold something else.

    Raises:
      ValueError: the directory is missing or has no JSON file, or a file is damaged.
    """
    paths = sorted(pathlib.Path(directory).glob("*.json"))
    if not paths:
        raise ValueError(f"results = {directory} holds no records; name a directory with *.json of studies")
    studies, others = {}, []
    for path in paths:
        try:
            record = records.read(path)
        except ValueError as error:
            raise ValueError(f"{error}; repair or remove it") from error
        if record is None:
            others.append(path.name)
        else:
            studies[path.name] = record
    return studies, others


def collect(studies):
    """The rows of all records, in the order of the records and of their grids.

    Args:
      studies: from `read_records`.

    Raises:
      ValueError: two records hold the same run, or one holds it twice.
    """
    rows, records_of = {}, {}
    for name, record in studies.items():
        study = settings.completed(record["config"])  # an older record lacks newer keys
        for run in record["runs"]:
            point = records.point_of(record, run)
            config = plan.config_of(study, point)
            group = json.dumps(recipe(config), sort_keys=True), records.codes_of(record, run)
            row = rows.setdefault(group, Row([], point, config, [], []))
            if records_of.get((group, run["seed"])) == name:
                raise ValueError(
                    f"{name}: seed {run['seed']} of {network(config)} ran more than once, at points that "
                    "differ only in keys on which no result should depend; remove this record"
                )
            if (group, run["seed"]) in records_of:
                raise ValueError(
                    f"seed {run['seed']} of {network(config)} is in {records_of[group, run['seed']]} and "
                    f"in {name}; remove one of the records"
                )
            records_of[group, run["seed"]] = name
            if name not in row.names:
                row.names.append(name)
            row.runs.append(run)
            row.environments.extend(records.starts_of(record, run))
    return list(rows.values())


def recipe(config):
    """A config without the parts that no result depends on, as {dotted key: value}."""
    flat = traverse_util.flatten_dict(config, sep=".")
    groups = tuple(f"{key}." for key in ASIDE)
    if not plan.lookup(config, "start.workdir"):
        groups += ("start.",)
    return {key: value for key, value in flat.items() if key not in ASIDE and not key.startswith(groups)}


def counterpart(config, metric):
    """The published figure for a config's network, data and metric, or None.

    The papers trained all layers of their networks, from scratch.
    """
    if plan.lookup(config, "start.workdir") or plan.lookup(config, "optimizer.frozen"):
        return None
    if plan.lookup(config, "data.name") == "imagenet2012":  # papers report on its validation images
        metric = metric.replace("validation/", "test/")
    for one in PUBLISHED:
        pairs = [(plan.lookup(config, key), value) for key, value in one.where.items()]
        if one.metric == metric and all(
            there == value or (there is None and not value) for there, value in pairs
        ):
            return one
    return None


def metric_of(row):
    """The error to show: on the test set if there is one, by the config's protocol if that was measured."""
    measured = records.final_metrics(row.runs)
    names = measured[0] if measured else ("test/error",)
    protocol = plan.lookup(row.config, "evaluation.protocol")
    wanted = (f"test/{protocol}/error", "test/error", f"validation/{protocol}/error", "validation/error")
    return next((name for name in wanted if name in names), "test/error")


def network(config):
    """`resnet_cifar, depth 20, plain`: the model's name and its settings, without those that are off.

    It also names the compute type unless it is float32, the layers that started from another run, and the
    frozen ones, if any.
    """
    words = [config["model"]["name"]]
    for key, value in config["model"].items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)  # 0 need not mean off
        if key != "name" and (value or is_number):
            words.append(key if value is True else f"{key} {value}")
    if plan.lookup(config, "dtype") not in (None, "float32"):
        words.append(config["dtype"])
    if plan.lookup(config, "start.workdir"):
        start = config["start"]
        words.append(f"{plan.text_of(start['layers'])} of {start['workdir']} ({start['step']})")
    if plan.lookup(config, "optimizer.frozen"):
        words.append(f"{plan.text_of(config['optimizer']['frozen'])} frozen")
    return ", ".join(words)


def hardware(environments):
    """`cpu (2 threads)` or `4 x NVIDIA H100`; "several" where they differ."""
    kinds = set()
    for environment in environments:
        devices = collections.Counter(environment["devices"])
        for kind, count in devices.items():
            cpus = environment["cpus"]
            threads = f" ({cpus} thread{'s' * (cpus > 1)})" if kind == "cpu" else ""
            kinds.add((f"{count} x " if count > 1 else "") + kind + threads)
    return kinds.pop() if len(kinds) == 1 else "several"


def dates(runs):
    """`2026-11-26`, the day on which the runs ended, or the first and the last; empty if none is recorded."""
    days = sorted({run["date"] for run in runs if "date" in run})
    return " to ".join(dict.fromkeys(days[:1] + days[-1:]))


TITLES = (
    "network",
    "data",
    "steps",
    "error",
    "%",
    "seeds",
    "published %",
    "difference",
    "devices",
    "date",
    "record",
)


# Keys shown in another column.
_SHOWN_ELSEWHERE = (
    "model.",
    "dtype",
    "start.",
    "optimizer.frozen",
    "data.name",
    "data.splits.train",
    "num_steps",
)
SHORT = tuple(title for title in TITLES if title not in ("steps", "devices", "date"))


def table(rows, place="results", short=False):
    """Lists of cells, the header first. Differences are in percentage points, ours minus the published.

    Args:
      rows: from `collect`.
      place: where the records are, for links to them.
      short: whether to keep only the columns of SHORT and the rows with a published figure.
    """
    lines = [list(TITLES)]
    for row in rows:
        metric = metric_of(row)
        values = [100 * metrics[metric] for metrics in records.final_metrics(row.runs) if metric in metrics]
        published = counterpart(row.config, metric)
        steps, batch_size = row.config["num_steps"], row.config["batch_size"]
        steps_cell = f"{steps:,}"
        length = steps * batch_size / published.examples if published else 1
        if not 1 <= length < LONGER:
            word = "shortened" if length < 1 else "lengthened"
            steps_cell += f" ({word}: the paper's are {round(published.examples / batch_size):,})"
            published = None
        if short and not published:
            continue
        others = [
            f"{key} {plan.text_of(value)}"
            for key, value in row.point.items()
            if value not in ("", ()) and not key.startswith(_SHOWN_ELSEWHERE)
        ]
        diverged = records.num_diverged(row.runs)
        lines.append(
            [
                ", ".join([network(row.config), *others]),
                _data(row.config["data"]),
                steps_cell,
                metric.removesuffix("/error").replace("/", ", "),
                tables.mean_and_deviation(values, digits=2),
                str(len(values)) + (f" ({diverged} diverged)" if diverged else ""),
                _published_cell(published),
                f"{sum(values) / len(values) - published.error:+.2f}" if published and values else "",
                hardware(row.environments),
                dates(row.runs),
                ", ".join(
                    f"[{name.removesuffix('.json')}]({place}/{parse.quote(name)})" for name in row.names
                ),
            ]
        )
    shown = [TITLES.index(title) for title in (SHORT if short else TITLES)]
    return [[line[number] for number in shown] for line in lines]


# Settings of augmentations that do nothing by themselves.
_SETTINGS = ("lighting_basis", "elastic_sigma")


def _data(data):
    """`cifar10 (train[:45000]), flip, pad`: the data set, its training part, the augmentations."""
    words = data["name"]
    if data["splits"]["train"] != "train":
        words += f" ({data['splits']['train']})"
    augmented = sorted(key for key, value in data["augment"].items() if value and key not in _SETTINGS)
    return ", ".join([words, *augmented])


def _published_cell(published):
    if published is None:
        return ""
    label = ", as recalled" if published.recalled else ""
    return f"{published.error} ({published.source}{label})"


def markdown(rows, place="results", short=False):
    """The table in Markdown, with columns of words aligned to the left."""
    lines = table(rows, place, short)
    words = [number for number, title in enumerate(lines[0]) if title not in ("steps", "%", "difference")]
    return tables.markdown(lines, words=words)


def fill(document, rows, results):
    """The text of a document, with the part between its two markers replaced by the table.

    Args:
      document: a pathlib.Path.
      rows: from `collect`.
      results: the directory of the records.

    Raises:
      ValueError: the document does not have exactly one of BEGINNINGS, once, with END after it.
    """
    text = document.read_text()
    beginnings = [marker for marker in BEGINNINGS if marker in text]
    head, _, rest = text.partition(beginnings[0] if beginnings else END)
    _, _, tail = rest.partition(END)
    if len(beginnings) != 1 or text.count(beginnings[0]) != 1 or rest.count(END) != 1:
        raise ValueError(
            f"{document} must have one of these lines: {' or '.join(BEGINNINGS)}; and then {END}"
        )
    place = pathlib.PurePath(os.path.relpath(results, document.parent)).as_posix()
    ledger = markdown(rows, place, BEGINNINGS[beginnings[0]])
    return f"{head}{beginnings[0]}\n\n{ledger}\n{END}{tail}"


def main(arguments=None):
    """Prints the ledger or writes it; on failure ends with one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m cnn_cases.studies.ledger", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--results", type=parsing.path, default=ROOT / "results", help="the records; default: %(default)s"
    )
    parser.add_argument("--write", action="store_true", help="into the documents, and print nothing")
    parser.add_argument("--documents", nargs="+", type=parsing.path, default=DOCUMENTS, help="their files")
    options = parser.parse_args(arguments)
    with parsing.one_message():
        studies, others = read_records(options.results)
        rows = collect(studies)
        texts = [(path, fill(path, rows, options.results)) for path in options.documents if options.write]
        for path, text in texts:
            disk.write_text(path, text)
        if not options.write:
            print(markdown(rows, os.path.relpath(options.results)), end="")
    if others:
        print(f"left out, as no studies: {', '.join(others)}", file=sys.stderr)


if __name__ == "__main__":
    main()
