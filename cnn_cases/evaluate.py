"""Evaluates a checkpoint of a run of train.py, or an ensemble of several runs, with a chosen test protocol.

    python -m cnn_cases.evaluate --workdir=runs/x [--protocol=ten_crop] [--split=test] [--step=best]
    python -m cnn_cases.evaluate --workdir=runs/x --workdir=runs/y --out=runs/both

`cnn_cases/data/views.py` explains the protocols. An ensemble averages the probabilities of its networks
(Krizhevsky et al. 2012, section 6, and most papers after it). The results are written to --out, by default a
directory in <workdir>/evaluation/ that is named after split, protocol and step:

    metrics.json     accuracy, top-5 accuracy, loss (-log of the true class's probability, for any loss of
                     the run), and how they were computed
    confusion.csv    the confusion matrix: a row for each true class, a column for each predicted class
    confusion.png    the same as a figure, coloured by fractions of each row
    mistakes.png     the mistakes with the highest probabilities

The checkpoints are only read. Repeating an evaluation overwrites its files, with the same results.
"""

import math
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from cnn_cases import command, preview, saved_runs, settings, tables
from cnn_cases.data import feeds
from cnn_cases.training import checkpoint, devices, disk, predictions, programs, provenance

NUM_MISTAKES = 24
MANY_CLASSES = 20  # with more, a confusion matrix has no room for numbers and for every name


class Network(NamedTuple):
    """A network to be evaluated.

    Attributes:
      workdir, config, program: of its run.
      step: of its checkpoint.
      state: the content of the checkpoint, without the optimizer's state.
      num_views: number of views of each example.
    """

    workdir: Any
    config: Any
    program: Any
    step: int
    state: Any
    num_views: int


def evaluate_checkpoint(workdir, *others, protocol="", split="", which="last", data_dir="", out=""):
    """Evaluates a checkpoint of one run, or one of each of several runs as an ensemble, and writes the files.

    Reads all networks before the first prediction, so that no missing file stops it after an hour.

    Args:
      workdir: of a run of train.py.
      others: workdirs of further runs with the same examples; their networks may differ.
      protocol: a key of `views.PROTOCOLS`; "" for the protocol in the first run's config.
      split: a name in data.splits; "" for "test", or "validation" if the first run has no test split.
      which: "last", "best" or a step, for all runs.
      data_dir: see `saved_runs.load_config`.
      out: the directory to write to; "" for a directory in the workdir, for a single run only.

    Returns:
      The content of metrics.json, and the directory.

    Raises:
      ValueError: there is no such run, split, protocol or checkpoint, a checkpoint is damaged, the data are
        not those of the run, a run is named twice, or the runs have different examples.
      OSError: the directory cannot be created or written to.
    """
    workdirs = [workdir, *others]
    configs = [saved_runs.load_config(one, data_dir) for one in workdirs]
    first = configs[0]
    protocol = protocol or first.evaluation.protocol
    split = split or ("test" if "test" in settings.parts(first) else "validation")
    if others and not out:
        raise ValueError("out = '': an ensemble needs --out, the directory for its evaluation")
    _check_together(workdirs, configs, split)
    networks = [
        _read(one, config, split, protocol, which) for one, config in zip(workdirs, configs, strict=True)
    ]
    tested = {"split": split, "examples_of": _examples(first, split), "protocol": protocol}
    steps = [{"workdir": str(network.workdir), "step": network.step} for network in networks]
    tested |= {"networks": steps} if others else steps[0]
    if out:
        _check_free(out, tested)
    default = f"{split}_{protocol}_{networks[0].step}"
    out = pathlib.Path(out or pathlib.Path(workdir) / "evaluation" / default)
    out.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    answers = [_ask(network, split, protocol) for network in networks]
    seconds = time.monotonic() - started
    label = answers[0][1]
    for network, (_, other) in zip(networks, answers, strict=True):
        if not np.array_equal(other, label):  # a stream leaves out what it cannot read
            raise ValueError(f"workdir = {network.workdir} has other labels in {split!r} than {workdir}")
    probabilities = np.mean([one for one, _ in answers], axis=0)
    if others:
        pairs = zip(steps, answers, strict=True)
        tested["networks"] = [network | _scores(one, label) for network, (one, _) in pairs]
    metrics = {
        **tested,
        "views_per_example": networks[0].num_views,
        "num_examples": len(label),
        **_scores(probabilities, label),
        "seconds": round(seconds, 2),
        "environment": provenance.environment(),
    }
    names = feeds.class_names(first.data.name, first.data.data_dir)
    write_report(out, metrics, names, probabilities, label, networks[0].program.feed.examples(split))
    return metrics, out


def _check_free(out, tested):
    """Raises ValueError if a directory already holds a different evaluation."""
    path = pathlib.Path(out) / "metrics.json"
    there = disk.read_json(path, dict, "move it away") if path.exists() else tested
    alone = [{key: network[key] for key in ("workdir", "step")} for network in there.get("networks") or ()]
    there = there | ({"networks": alone} if alone else {})
    unlike = [key for key, value in tested.items() if key not in there or there[key] != value]
    if unlike:
        raise ValueError(
            f"out = {out} already holds another evaluation (different {unlike[0]}); name another directory"
        )


def _check_together(workdirs, configs, split):
    """Raises ValueError unless all runs are distinct and have the same examples in a split."""
    places, sources = [], []
    for workdir, config in zip(workdirs, configs, strict=True):
        if pathlib.Path(workdir).resolve() in places:
            raise ValueError(f"workdir = {workdir} is given twice and would count twice in the ensemble")
        parts = settings.parts(config)
        if split not in parts:
            raise ValueError(
                f"split = {split!r} is not in data.splits of {workdir}, which has {', '.join(parts)}"
            )
        places.append(pathlib.Path(workdir).resolve())
        data_dir = config.data.data_dir
        where = f" in {pathlib.Path(data_dir).expanduser().resolve()}" if data_dir else ""
        sources.append(_examples(config, split) + where)
        if sources[-1] != sources[0]:
            raise ValueError(
                f"workdir = {workdir}: its split {split!r} is {sources[-1]}, that of {workdirs[0]} "
                f"{sources[0]}; an ensemble is tested on the same examples (see --data_dir)"
            )


def _examples(config, split):
    """The data set and the TFDS expression of a split, as text."""
    return f"{config.data.name} {config.data.splits[split]}"


def _read(workdir, config, split, protocol, which):
    """Reads the `Network` of a run."""
    checkpoints = pathlib.Path(workdir) / "checkpoints"
    checkpoint.find(checkpoints, which)  # fails before the data are read
    program = programs.make_program(config, saved_runs.usable_devices(config))
    saved_runs.check_data(workdir, saved_runs.read_starts(workdir), program.feed, ("train", split))
    like = program.shapes_of_state()
    try:
        num_views = len(programs.check_protocol(program, like, protocol))
    except ValueError as error:
        raise ValueError(f"workdir = {workdir}: {error}") from error
    step, state = checkpoint.find_and_read(checkpoints, which, like)
    # Only training needs the optimizer's state, which is half of the checkpoint or more.
    return Network(workdir, config, program, step, state.replace(opt_state=()), num_views)


def _ask(network, split, protocol):
    """Predicts a split: (probabilities [N, K], averaged over views, label int [N])."""
    probabilities, label = programs.predict(
        network.program,
        devices.replicate(network.state, network.program.devices),
        split,
        protocol,
        batch_size=network.config.evaluation.batch_size,
        show_progress=True,
    )
    lost = np.isnan(probabilities).any(axis=1).sum()
    if lost:
        raise ValueError(
            f"{network.workdir}: step {network.step} predicts NaN for {lost} of {len(label)} images; choose "
            "another checkpoint (--step), or find where NaN first appears: python -m cnn_cases.replay"
        )
    return probabilities, label


def _scores(probabilities, label):
    """Accuracy, top-5 accuracy if there are more than five classes, and loss."""
    scores = predictions.scores(probabilities, label)
    return {
        "accuracy": 1 - scores["error"],
        **({"top_5_accuracy": 1 - scores["top_5_error"]} if "top_5_error" in scores else {}),
        "loss": scores["loss"],
    }


def write_report(out, metrics, names, probabilities, label, examples):
    """Writes the four files that the docstring of this module lists.

    Args:
      out: an existing directory.
      metrics: the content of metrics.json.
      names: of the K classes.
      probabilities: [N, K], averaged over views.
      label: int [N].
      examples: an iterable of the N (image, label) in the same order.
    """
    predicted = probabilities.argmax(axis=1)
    counts = confusion(predicted, label, len(names))
    disk.write_json(out / "metrics.json", metrics)
    disk.write_text(out / "confusion.csv", confusion_csv(counts, names))
    title = f"{metrics['examples_of']}, {describe_network(metrics)}, {metrics['protocol']}"
    title += f": {(predicted != label).sum():,} of {len(label):,} are wrong"
    mistakes = surest_mistakes(probabilities, label, NUM_MISTAKES)
    images = pick(examples, mistakes)
    sure = probabilities.max(axis=1)
    shown = [(images[n], names[label[n]], names[predicted[n]], sure[n]) for n in mistakes]
    draw_confusion(counts, names, title).savefig(out / "confusion.png", dpi=150)
    draw_mistakes(shown, title).savefig(out / "mistakes.png", dpi=150)


def confusion(predicted, label, num_classes):
    """The confusion matrix. predicted, label int [N] -> int [K, K], rows true, columns predicted."""
    pairs = label.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def surest_mistakes(probabilities, label, count):
    """Indices of the `count` wrong predictions (or fewer) with the highest probabilities, highest first."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != label)
    order = np.argsort(-probabilities[wrong].max(axis=1), kind="stable")
    return wrong[order[:count]].tolist()


def pick(examples, numbers):
    """Returns {number: image} of the examples with the given numbers; stops reading after the last."""
    images = {}
    for number, (image, _) in enumerate(examples):
        if len(images) == len(numbers):
            break
        if number in numbers:
            images[number] = image
    return images


def confusion_csv(counts, names):
    """The confusion matrix as CSV: a row for each true class, a column for each predicted class."""
    rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    return tables.comma_separated([["true \\ predicted", *names], *rows])


def draw_confusion(counts, names, title):
    """Draws the confusion matrix; if there are few classes, with counts in the cells and all names.

    The colour shows the fraction of a row on a square-root scale, which makes rare mistakes visible.
    """
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(names) <= MANY_CLASSES
    side = max(4.5, 0.5 * len(names) + 2) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    scale = PowerNorm(0.5, 0, 1)
    drawn = axis.imshow(fractions, cmap="Blues", norm=scale, interpolation="nearest" if few else "auto")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8, label="fraction of the true class")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    ticks = np.arange(0, len(names), 1 if few else math.ceil(len(names) / MANY_CLASSES))
    shown = [shorten(names[tick]) for tick in ticks]
    upright = max(map(len, shown)) > 2
    axis.set_xticks(ticks, shown, rotation=90 if upright else 0)
    axis.set_yticks(ticks, shown)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(title, fontsize=10)
    if few:
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if scale(fractions[row, column]) > 0.6 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    return figure


def draw_mistakes(mistakes, heading):
    """Draws a sheet of images with their true class, predicted class and probability.

    Args:
      mistakes: a list of (image uint8 [H, W, C], true name, predicted name, probability).
      heading: title of the sheet.
    """
    titles = [
        f"true {shorten(true)}\nsaid {shorten(predicted)}\n{probability:.1%}"
        for _, true, predicted, probability in mistakes
    ]
    return preview.draw_sheet([image for image, *_ in mistakes], titles, heading)


def shorten(name):
    """Cuts a class name to at most 16 characters."""
    return name if len(name) <= 16 else name[:15] + "…"


def describe_network(metrics):
    """The step of the evaluated checkpoint, or the number of networks, as text."""
    return f"step {metrics['step']}" if "step" in metrics else f"{len(metrics['networks'])} networks"


def table(metrics):
    """Formats the metrics as a short text."""
    lines = [
        f"split {metrics['split']!r} ({metrics['examples_of']}), {metrics['num_examples']:,} examples",
        *(
            f"  {network['workdir']}, step {network['step']}: accuracy {network['accuracy']:.2%}, "
            f"loss {network['loss']:.4f}"
            for network in metrics.get("networks", ())
        ),
        f"{describe_network(metrics)}, protocol {metrics['protocol']!r}, "
        f"views of each: {metrics['views_per_example']}, {metrics['seconds']} s",
        f"  accuracy         {metrics['accuracy']:8.2%}",
    ]
    if "top_5_accuracy" in metrics:
        lines.append(f"  top-5 accuracy   {metrics['top_5_accuracy']:8.2%}")
    lines.append(f"  loss             {metrics['loss']:8.4f}")
    return "\n".join(lines)


def main():
    """Evaluates according to the flags, and prints the metrics."""
    given = flags.FLAGS
    metrics, out = evaluate_checkpoint(
        *given.workdir,
        protocol=given.protocol,
        split=given.split,
        which=given.step,
        data_dir=given.data_dir,
        out=given.out,
    )
    print(table(metrics))
    print(f"results: {out}")


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "workdir",
        None,
        "The directory of a run of train.py; repeat it for each run of an ensemble.",
        required=True,
    )
    flags.DEFINE_string(
        "protocol", "", "Which views of each image are averaged; default: evaluation.protocol."
    )
    flags.DEFINE_string("split", "", "A part of data.splits; default: test, or validation without one.")
    flags.DEFINE_string("step", "last", "Which checkpoint: its step, 'last' or 'best'.")
    saved_runs.define_data_dir()
    flags.DEFINE_string("out", "", "Where to write; default: <workdir>/evaluation/<split>_<protocol>_<step>.")
    command.run(main)
