"""Training curves of a study's runs: loss and error over steps, one colour for each point of the grid.

With several seeds a curve is their mean, and the band around it spans minimum to maximum. A diverged run is
in no mean: it has a separate dotted curve that ends with a cross. Colours run from light to dark, and points
also differ in their markers, so that the figures can be read in greyscale.
"""

import collections
import itertools
import pathlib
import statistics
import textwrap

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

from cnn_cases.studies import plan, records

MARKERS = "osD^vP*X<>"
THIN, BOLD = 0.8, 2.2  # line widths of training and of evaluation, as in figure 6 of He et al. 2015
LINES = ("-", "--", ":", "-.")
MAX_MARKERS = 8  # on one curve
MAX_PANELS = 4  # side by side
LONGEST = 36  # characters of a value
WIDEST = 28  # characters in a line of a panel's title
TWO_COLOURS = ("#D55E00", "#0072B2")  # distinguishable with colour blindness

_TRAINING = ("running", "train")


def shades(number, colours="viridis_r"):
    """Colours from light to dark, one for each of `number` points; `colours` is a Matplotlib colormap."""
    if number == 1:
        return matplotlib.colormaps[colours]([0.7])
    lightest = 0.12 if number > 3 else 0.35
    positions = [lightest + (1 - lightest) * n / (number - 1) for n in range(number)]
    return matplotlib.colormaps[colours](positions)


def mean_curve(runs, name):
    """Steps, and the mean, minimum and maximum over the runs at each step; errors in percent."""
    values = collections.defaultdict(list)
    for run in runs:
        for step, value in run["curves"].get(name, []):
            values[step].append(value * (100 if name.endswith("error") else 1))
    steps = sorted(values)
    return steps, *([pick(values[step]) for step in steps] for pick in (statistics.mean, min, max))


def draw_runs(
    axis,
    runs,
    name,
    *,
    color,
    linestyle="-",
    linewidth=BOLD,
    marker=None,
    hollow=False,
    first=0,
    band=True,
):
    """Draws the curve of the runs of one point; see the module docstring.

    Args:
      axis: Matplotlib axes.
      runs: runs of a record, including diverged ones.
      name: the curve, such as "test/error".
      color: of everything drawn.
      linestyle: of the mean.
      linewidth: of the mean.
      marker: of the mean, if any.
      hollow: whether the markers are white inside.
      first: index of the first step with a marker, so that the markers of several curves lie apart.
      band: whether to draw the band.
    """
    steps, mean, low, high = mean_curve([run for run in runs if run["status"] == "finished"], name)
    if len(steps) == 1:
        marker = marker or "."  # a line of one point is invisible
    every = max(1, -(-len(steps) // MAX_MARKERS))
    axis.plot(
        steps,
        mean,
        color=color,
        linestyle=linestyle,
        linewidth=linewidth,
        marker=marker,
        markevery=(first % every, every),
        markersize=5,
        markeredgewidth=1,
        markerfacecolor="white" if hollow else color,
    )
    if band:
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    for run in runs:
        if run["status"] == "diverged":
            steps, values, _, _ = mean_curve([run], name)
            axis.plot(steps, values, color=color, linestyle=":", linewidth=linewidth)
            if name.startswith("running/"):
                # A run that diverged before its first row has its cross at the upper edge, at its last step.
                place, transform = ((run["step"], 0.97), axis.get_xaxis_transform())
                if steps:
                    place, transform = (steps[-1], values[-1]), axis.transData
                axis.plot(*place, "x", color=color, markersize=8, markeredgewidth=2, transform=transform)


def shortened(values):
    """{value: its text, shortened so that several fit}.

    The middle of a long text, such as a path, is left out. If that makes texts equal, their common beginning
    is left out first.
    """
    whole = {value: plan.text_of(value) for value in values}
    short, alike = {}, collections.defaultdict(list)
    for value, text in whole.items():
        short[value] = _without_middle(text)
        alike[short[value]].append(value)
    for group in alike.values():
        if len(group) > 1:
            columns = zip(*(whole[value] for value in group), strict=False)
            begin = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
            short |= {value: f"…{_without_middle(whole[value][begin:])}" for value in group}
    return short if len(set(short.values())) == len(short) else whole


def _without_middle(text):
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


def label_of(text, runs):
    """The legend entry for the runs of a point: its name, and how many of them diverged."""
    diverged = records.num_diverged(runs)
    return f"{text} ({diverged} of {len(runs)} diverged)" if diverged else text


def cross():
    """The legend entry for a diverged run."""
    return Line2D([], [], color="black", linestyle=":", marker="x", markeredgewidth=2, label="diverged run")


def splits(record):
    """The splits whose curves are drawn: all but training, which is drawn from its running metrics."""
    names = [name for run in record["runs"] for name in run["curves"] if name.count("/") == 1]
    return [
        split for split in dict.fromkeys(name.partition("/")[0] for name in names) if split not in _TRAINING
    ]


def describe_seeds(record):
    """Says what lines and bands show: all seeds, or fewer where runs diverged or codes differ."""
    seeds, counts = len(record["config"]["seeds"]), set()
    if seeds == 1:
        return "one seed"
    for part in records.split_by_code(record).values():
        for runs in records.group_by_point(part).values():
            counts.add(len(runs) - records.num_diverged(runs))
    up_to = "" if counts == {seeds} else "up to "
    return f"mean over {up_to}{seeds} seeds, band: minimum to maximum"


def describe_key(record, key):
    """The value of a key in a study's configs, or all of its values if they differ."""
    return "/".join(map(plan.text_of, plan.values_of(record["config"], key)))


def describe_data(record):
    """The data set, with its part if that is not the whole, and the batch size of a study's training."""
    part = describe_key(record, "data.splits.train")
    data = describe_key(record, "data.name") + (f" ({part})" if part != "train" else "")
    return f"{data}, batches of {describe_key(record, 'batch_size')}"


def loss_label(record):
    """The label of a loss axis, with its unit."""
    names = plan.values_of(record["config"], "loss.name")
    units = ("cross-entropy, nats" if name == "cross_entropy" else f"{name}, no unit" for name in names)
    return f"loss ({'; '.join(units)})"


def set_loss_axis(axis, record):
    """Makes the y axis logarithmic and labels it as training loss, with its unit."""
    axis.set_ylabel(f"training {loss_label(record)}")
    set_log_scale(axis)


def set_log_scale(axis):
    """Makes the y axis logarithmic, with plain numbers at its ticks."""
    axis.set_yscale("log")
    if axis.get_ylim()[0] <= 0:
        axis.set_ylim(0.1, 10)  # nothing is drawn: all runs diverged before their first row
    low, high = axis.get_ylim()
    narrow = high < 5 * low  # it may have only one of 1, 2, 5, 10; if it has none, Matplotlib does the same
    axis.yaxis.set_major_locator(AutoLocator() if narrow else LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_curves(record):
    """Draws the training loss and the errors of a study, for any grid; a row of panels for each code."""
    parts = records.split_by_code(record)
    points = list(records.group_by_point(record))
    figure = Figure(figsize=(10, 4.2 * len(parts) + 0.3), layout="constrained")
    grid = figure.subplots(len(parts), 2, squeeze=False)
    crowded = len(points) > 4
    for (loss, error), (code, part) in zip(grid, parts.items(), strict=True):
        groups = records.group_by_point(part)
        for number, (point, color) in enumerate(zip(points, shades(len(points)), strict=True)):
            runs, marker = groups.get(point, []), MARKERS[number % len(MARKERS)]
            draw_runs(
                loss,
                runs,
                "running/loss",
                color=color,
                linewidth=1.5,
                marker=marker if len(points) > 1 else None,
                first=number,
                band=not crowded,
            )
            draw_runs(error, runs, "running/error", color=color, linewidth=THIN, band=False)
            for place, name in enumerate(splits(record)):
                draw_runs(
                    error,
                    runs,
                    f"{name}/error",
                    color=color,
                    linestyle=LINES[place % len(LINES)],
                    marker=marker,
                    hollow=bool(place),
                )
        set_loss_axis(loss, record)
        error.set_ylabel("error (%)")
        scale_errors([error], [error])
        for axis in (loss, error):
            axis.set(xlabel="training step", xlim=(0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        if code:
            loss.set_title(f"code {code}", loc="left", fontsize=10)
    if len(points) > 1:
        _add_legend_of_points(figure, record)
    _add_legend_of_lines(figure, record)
    figure.suptitle(
        f"{describe_key(record, 'model.name')} on {describe_data(record)}: {describe_seeds(record)}",
        fontsize=10,
    )
    return figure


def scale_errors(axes, labelled):
    """Scales the error axis that these axes share, from 0 to the largest error.

    If some errors are small, 0 to 1 %, 1 to 10 % and 10 to 100 % get equal room, and the label of each of the
    axes `labelled` says so.
    """
    # Without the crosses at the upper edge.
    lines = [line for axis in axes for line in axis.lines if line.get_transform() == axis.transData]
    values = [value for line in lines for value in line.get_ydata()]
    if values and min(values) < 5:
        for axis in labelled:
            stretch_small(axis)
    axes[0].set_ylim(0, min(100, 1.05 * max(values, default=100)) or 1)


def stretch_small(axis, along="y", ticks=(0.5, 1, 2, 5, 10, 20, 50, 100)):
    """Makes room for small and large percentages on one axis: linear up to 1, then logarithmic.

    Args:
      axis: Matplotlib axes whose label is already set.
      along: "x" or "y".
      ticks: the ticks above 0; those below 0 mirror them.
    """
    set_scale, one = {"x": (axis.set_xscale, axis.xaxis), "y": (axis.set_yscale, axis.yaxis)}[along]
    set_scale("symlog", linthresh=1)
    one.set_ticks([*(-tick for tick in ticks[::-1]), 0, *ticks], minor=False)
    one.set_major_formatter("{x:g}")
    one.set_label_text(f"{one.get_label_text()},\nlinear up to 1, then logarithmic")


def draw_panels(record, curves, key, titles, names):
    """Draws curves over steps: a column of panels for each value of a grid key, a row for each code.

    Args:
      record: see `records`.
      curves: {name of a curve: width of its line}, all of errors or all of losses.
      key: a key of the grid, which must have other keys too.
      titles: {value of the key: title of its column}; None for those of `panels`.
      names: {point of the other keys, as a tuple of values: its name in the legend}, from light to dark;
        None for all points, named after their keys.

    Returns:
      The figure, and its rows of axes, which share their scales.
    """
    titles, names = titles or panels(record, key), names or names_without(record, key)
    parts = records.split_by_code(record)
    others = [one for one, _ in record["config"]["grid"] if one != key]
    looks = list(zip(names, shades(len(names)), itertools.cycle(MARKERS), strict=False))
    figure = Figure(figsize=(1.5 + 4 * len(titles), 3.8 * len(parts) + 0.4), layout="constrained")
    rows = figure.subplots(len(parts), len(titles), squeeze=False, sharex=True, sharey=True)
    runs_of = collections.defaultdict(list)
    for code, part in parts.items():
        for run in part["runs"]:
            runs_of[code, run[key], tuple(run[one] for one in others)].append(run)
    for axes, code in zip(rows, parts, strict=True):
        for axis, (value, title) in zip(axes, titles.items(), strict=True):
            for number, (point, color, marker) in enumerate(looks):
                for name, width in curves.items():
                    bold = width == max(curves.values())
                    draw_runs(
                        axis,
                        runs_of[code, value, point],
                        name,
                        color=color,
                        linewidth=width,
                        marker=marker if bold else None,
                        first=number,
                        band=bold,
                    )
            title = f"{title}, code {code}" if code else title
            axis.set_title(textwrap.fill(title, WIDEST, break_on_hyphens=False), parse_math=False)
            axis.grid(alpha=0.3)
    rows[0][0].set_xlim(0, None)  # for all panels; set last, since it ends at the longest curve
    for axis in rows[-1]:
        axis.set_xlabel("training step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = []
    for point, color, marker in looks:
        runs = [run for run in record["runs"] if tuple(run[one] for one in others) == point]
        columns = [(title, [run for run in runs if run[key] == value]) for value, title in titles.items()]
        told = [label_of(title, column) for title, column in columns if records.num_diverged(column)]
        label = "\n".join([names[point], *told])
        handles.append(Line2D([], [], color=color, linewidth=BOLD, marker=marker, label=label))
    handles.reverse()  # the darkest on top, like the curves of plain nets
    if records.num_diverged(record["runs"]):
        handles.append(cross())
    add_legend_beside(figure, handles)
    return figure, rows


def key_of_panels(record):
    """The key that a study compares, if it has few values and the grid has other keys too; else None."""
    asked = plan.compared(record["config"])
    if not asked or len(record["config"]["grid"]) == 1:
        return None
    key, _, others = asked
    return key if len(others) < MAX_PANELS else None


def panels(record, key):
    """{value of a key of the grid: title of its panels}, such as "shortcut A"."""
    short = plan.titles_of([one for one, _ in record["config"]["grid"]])[key]
    return {
        value: f"{short} {text}" for value, text in shortened(plan.values_of(record["config"], key)).items()
    }


def draw_errors_by(record, key, titles=None, names=None, top=None):
    """Draws errors over steps, with panels for each value of a key.

    Args:
      record, key, titles, names: see `draw_panels`.
      top: upper end of the axis in percent, which then begins at 0; the first steps may lie above it. None
        shows everything.
    """
    evaluated = splits(record)[:1]
    curves = {"running/error": THIN, **{f"{split}/error": BOLD for split in evaluated}}
    figure, rows = draw_panels(record, curves, key, titles, names)
    for axes in rows:
        axes[0].set_ylabel("error (%)")
    if top is None:
        scale_errors(list(rows.flat), rows[:, 0])
    else:
        rows[0, 0].set_ylim(0, top)
    words = f"thin: training error, bold: {evaluated[0]} error" if evaluated else "training error"
    figure.suptitle(f"{describe_data(record)}; {words}; {describe_seeds(record)}", fontsize=10)
    return figure


def draw_loss_by(record, key, titles=None, names=None):
    """Draws training loss over steps on a logarithmic axis, with panels for each value of a key."""
    figure, rows = draw_panels(record, {"running/loss": 1.5}, key, titles, names)
    for axes in rows:
        set_loss_axis(axes[0], record)
    figure.suptitle(f"{describe_data(record)}; training loss; {describe_seeds(record)}", fontsize=10)
    return figure


def names_without(record, key):
    """{point of the other keys: its name}."""
    number = [one for one, _ in record["config"]["grid"]].index(key)
    names = records.names_of_points(record, without=key)
    return {(*point[:number], *point[number + 1 :]): name for point, name in names.items()}


def _add_legend_of_points(figure, record):
    points, names = records.group_by_point(record), records.names_of_points(record)
    handles = [
        Line2D([], [], color=color, linewidth=BOLD, marker=marker, label=label_of(names[point], runs))
        for (point, runs), color, marker in zip(
            points.items(), shades(len(points)), itertools.cycle(MARKERS), strict=False
        )
    ]
    add_legend_beside(figure, handles, fontsize=9)


def add_legend_beside(figure, handles, **style):
    """Adds a legend on the right, and enlarges the figure if the legend would leave its panels no room."""
    legend = figure.legend(handles=handles, loc="outside right center", frameon=False, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)  # two $ in the values of a grid are no formula
    extent = legend.get_window_extent()
    enlarge(figure, extent.width / figure.dpi - 2, extent.height / figure.dpi + 1)


def enlarge(figure, more_width, height):
    """Makes a figure wider by `more_width` and at least `height` high, in inches; never smaller."""
    width, before = figure.get_size_inches()
    figure.set_size_inches(width + max(0, more_width), max(before, height))


def _add_legend_of_lines(figure, record):
    handles = [Line2D([], [], color="black", linewidth=THIN, label="training (mean since the previous row)")]
    for place, title in enumerate(splits(record)):
        style = {"linestyle": LINES[place % len(LINES)], "markerfacecolor": "white" if place else "black"}
        handles.append(Line2D([], [], color="black", linewidth=BOLD, marker="o", label=title, **style))
    if records.num_diverged(record["runs"]):
        handles.append(cross())
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def save(figure, path):
    """Writes `<path>.png` and `<path>.svg`; equal figures give files that are equal byte for byte."""
    path = pathlib.Path(path)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "cnn_cases"}):  # otherwise its ids would be random
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
