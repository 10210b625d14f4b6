"""Tests one checkpoint of a run of train.py, or an ensemble of several runs, as papers do or otherwise.

    python -m cnn_cases.evaluate --workdir=runs/x [--protocol=ten_crop] [--split=test] [--step=best]
    python -m cnn_cases.evaluate --workdir=runs/x --workdir=runs/y --out=runs/both

`cnn_cases/data/views.py` explains the protocols. An ensemble's probabilities are the mean of those of its
networks (Krizhevsky et al. 2012, section 6, and most papers after it). What comes out lies in --out, or else
in a directory of <workdir>/evaluation/ that is named by split, protocol and step:

    metrics.json     accuracy, top-5 accuracy, loss (-log of the right class's probability, whatever the loss
                     of the training was), and how they came about
    confusion.csv    how many examples of each class (a row) were taken for which (a column)
    confusion.png    the same as a figure, the colours as fractions of each row
    mistakes.png     the mistakes of which the network was surest

The checkpoints are only read. An evaluation that is done again overwrites its files, with the same figures.
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
    """A network that is to be asked.

    Attributes:
      workdir, config, program: of its run.
      step: of its checkpoint.
      state: what the checkpoint holds, without the optimizer's part.
      num_views: of each example.
    """

    workdir: Any
    config: Any
    program: Any
    step: int
    state: Any
    num_views: int


def evaluate_checkpoint(workdir, *others, protocol="", split="", which="last", data_dir="", out=""):
    """Evaluates one checkpoint, or one of each of several runs as an ensemble, and writes its files.

    All networks are read before the first is asked, so that nothing fails after an hour of predictions.

    Args:
      workdir: of a run of train.py.
      others: of further ones, which may have different networks and must have the same examples.
      protocol: a key of `views.PROTOCOLS`; "" for that of the first run's config.
      split: a part of data.splits; "" for "test", or "validation" where the first run has none.
      which: "last", "best" or a step, of all runs.
      data_dir: see `saved_runs.load_config`.
      out: the directory to write to; "" for one in the workdir, if there is one run.

    Returns:
      What metrics.json holds, and the directory.

    Raises:
      ValueError: there is no such run, split, protocol or checkpoint, a checkpoint is damaged, the data are
        not those of the run, a run is named twice, or the runs' examples are not the same.
      OSError: the directory cannot be made or written to.
    """
    workdirs = [workdir, *others]
    configs = [saved_runs.load_config(one, data_dir) for one in workdirs]
    first = configs[0]
    protocol = protocol or first.evaluation.protocol
    split = split or ("test" if "test" in settings.parts(first) else "validation")
    if others and not out:
        raise ValueError("out = '' is for one run; say where the evaluation of an ensemble is to lie")
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
    """Raises ValueError where a directory has the evaluation of something else."""
    path = pathlib.Path(out) / "metrics.json"
    there = disk.read_json(path, dict, "move it away") if path.exists() else tested
    alone = [{key: network[key] for key in ("workdir", "step")} for network in there.get("networks") or ()]
    there = there | ({"networks": alone} if alone else {})
    unlike = [key for key, value in tested.items() if key not in there or there[key] != value]
    if unlike:
        raise ValueError(
            f"out = {out} has another evaluation, of another {unlike[0]}; name another directory"
        )


def _check_together(workdirs, configs, split):
    """Raises ValueError unless the runs are different ones, and have the same examples in a split."""
    places, sources = [], []
    for workdir, config in zip(workdirs, configs, strict=True):
        if pathlib.Path(workdir).resolve() in places:
            raise ValueError(f"workdir = {workdir} is named twice, and would have two votes")
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
    """The data set, and the part of it that a split is."""
    return f"{config.data.name} {config.data.splits[split]}"


def _read(workdir, config, split, protocol, which):
    """The `Network` of a run."""
    checkpoints = pathlib.Path(workdir) / "checkpoints"
    checkpoint.find(checkpoints, which)  # before the data are read
    program = programs.make_program(config, saved_runs.usable_devices(config))
    saved_runs.check_data(workdir, saved_runs.read_starts(workdir), program.feed, ("train", split))
    like = program.shapes_of_state()
    try:
        num_views = len(programs.check_protocol(program, like, protocol))
    except ValueError as error:
        raise ValueError(f"workdir = {workdir}: {error}") from error
    step, state = checkpoint.find_and_read(checkpoints, which, like)
    # The optimizer's part, the half of it or more, is for training alone.
    return Network(workdir, config, program, step, state.replace(opt_state=()), num_views)


def _ask(network, split, protocol):
    """(probabilities [N, K], averaged over views, label int [N]) of the examples of a split."""
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
            f"{network.workdir}: step {network.step} answers {lost} of {len(label)} images with NaN; take "
            "another checkpoint (--step), or see where it begins: python -m cnn_cases.replay"
        )
    return probabilities, label


def _scores(probabilities, label):
    """Accuracy, top-5 accuracy where there are more than five classes, and loss."""
    scores = predictions.scores(probabilities, label)
    return {
        "accuracy": 1 - scores["error"],
        **({"top_5_accuracy": 1 - scores["top_5_error"]} if "top_5_error" in scores else {}),
        "loss": scores["loss"],
    }


def write_report(out, metrics, names, probabilities, label, examples):
    """Writes the four files that the head of this module names.

    Args:
      out: the directory, which exists.
      metrics: for metrics.json.
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
    for name, figure in (
        ("confusion", draw_confusion(counts, names, title)),
        ("mistakes", draw_mistakes(shown, title)),
    ):
        figure.savefig(out / f"{name}.png", dpi=150)


def confusion(predicted, label, num_classes):
    """How often each class was taken for which. predicted, label int [N] -> int [K, K], true by predicted."""
    pairs = label.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def surest_mistakes(probabilities, label, count):
    """The numbers of at most `count` examples with the likeliest wrong answers, the surest first."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != label)
    order = np.argsort(-probabilities[wrong].max(axis=1), kind="stable")
    return wrong[order[:count]].tolist()


def pick(examples, numbers):
    """{number: image} of some of the examples; the rest of them after the last is not looked at."""
    images = {}
    for number, (image, _) in enumerate(examples):
        if len(images) == len(numbers):
            break
        if number in numbers:
            images[number] = image
    return images


def confusion_csv(counts, names):
    """The table as text: a row for each true class, a column for each predicted one."""
    rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    return tables.comma_separated([["true \\ predicted", *names], *rows])


def draw_confusion(counts, names, title):
    """The confusion matrix; counts in the cells and every class named where there are few classes.

    The colour is the fraction of a row, on a scale of square roots, on which rare mistakes can be seen.
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
    """A sheet of images under what they are, what they were taken for, and how surely.

    Args:
      mistakes: a list of (image uint8 [H, W, C], true name, predicted name, probability).
      heading: of the sheet.
    """
    titles = [
        f"true {shorten(true)}\nsaid {shorten(predicted)}\n{probability:.1%}"
        for _, true, predicted, probability in mistakes
    ]
    return preview.draw_sheet([image for image, *_ in mistakes], titles, heading)


def shorten(name):
    """A class's name with room beside others."""
    return name if len(name) <= 16 else name[:15] + "…"


def describe_network(metrics):
    """Which checkpoint was tested, or how many."""
    return f"step {metrics['step']}" if "step" in metrics else f"{len(metrics['networks'])} networks"


def table(metrics):
    """The figures as a short text."""
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
    """Evaluates as the flags say, and prints the figures."""
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
    print(f"figures: {out}")


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "workdir",
        None,
        "The directory of a run of train.py; of an ensemble, once for each run.",
        required=True,
    )
    flags.DEFINE_string("protocol", "", "What is shown of each image; default: evaluation.protocol.")
    flags.DEFINE_string("split", "", "A part of data.splits; default: test, or validation without one.")
    flags.DEFINE_string("step", "last", "Which checkpoint: its step, 'last' or 'best'.")
    saved_runs.define_data_dir()
    flags.DEFINE_string("out", "", "Where to write; default: <workdir>/evaluation/<split>_<protocol>_<step>.")
    command.run(main)
