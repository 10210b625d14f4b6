"""The final errors of a study against a number in its grid, such as the depth.

Lines connect the means over the seeds, bands span minimum to maximum, and every seed is a dot. Diverged runs
are in no mean: a cross at the upper edge stands for those of a line at a place, and gives their number.
"""

import collections
import itertools
import statistics
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cnn_cases.studies import comparison, figures, plan, records

MAX_BANDS = 4  # more would hide each other
SPREAD = 20  # ratio of the largest to the smallest number from which on their axis is logarithmic


class Look(NamedTuple):
    """The name, colour, marker and line style of the runs at one point of the grid's other keys."""

    name: str
    color: Any
    marker: str
    linestyle: str = "-"


def make_panels(record, key, titles, *, xlabel, ylabel):
    """A figure with a panel for each of `titles`, and a row of panels for each code.

    Args:
      record: see `records`.
      key: a key of the grid whose values are numbers; its values are the places along the lower axis.
      titles: of the panels.
      xlabel, ylabel: labels of the axes.

    Returns:
      The figure, and {code: its row of axes}; all axes share their scales.
    """
    parts = records.split_by_code(record)
    numbers = sorted({run[key] for run in record["runs"]})
    figure = Figure(figsize=(0.5 + 4.5 * len(titles), 3.8 * len(parts) + 0.2), layout="constrained")
    grid = figure.subplots(len(parts), len(titles), squeeze=False, sharex=True, sharey=True)
    for axes, code in zip(grid, parts, strict=True):
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(f"{title}, code {code}" if code else title)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(ylabel)
    for axis in grid[-1]:
        axis.set_xlabel(xlabel)
    # The limits leave room for a number without marks, too.
    low, high = numbers[0], numbers[-1]
    if low > 0 and high > SPREAD * low:
        grid[0, 0].set_xscale("log")
        room = (high / low) ** 0.05
        grid[0, 0].set_xlim(low / room, high * room)
    else:
        room = 0.05 * (high - low) or 1
        grid[0, 0].set_xlim(low - room, high + room)
    for axis in grid.flat:
        axis.set_xticks(numbers, list(map(plan.text_of, numbers)))
        axis.xaxis.set_minor_locator(NullLocator())
    return figure, dict(zip(parts, grid, strict=True))


def draw(record, key, errors, looks, *, xlabel):
    """Draws the final errors against the values of a key, without scaling their axis.

    Args:
      record: see `records`.
      key: a key of the grid whose values are numbers.
      errors: {name of a final error: title of its panel}.
      looks: {point of the other keys, as a tuple of values: its `Look`}.
      xlabel: label of the lower axis.

    Returns:
      See `make_panels`.
    """
    ylabel = "error after the last step (%)"
    figure, rows = make_panels(record, key, errors.values(), xlabel=xlabel, ylabel=ylabel)
    others = [one for one, _ in record["config"]["grid"] if one != key]
    for code, part in records.split_by_code(record).items():
        runs_of = {point: [] for point in looks}
        for run in part["runs"]:
            runs_of[tuple(run[one] for one in others)].append(run)
        for axis, name in zip(rows[code], errors, strict=True):
            offsets = itertools.count(16, 11)  # points below the upper edge, for the numbers of diverged runs
            for point, look in looks.items():
                _draw_line(axis, key, name, runs_of[point], look, len(looks) <= MAX_BANDS, offsets)
    return figure, rows


def _draw_line(axis, key, name, runs, look, band, offsets):
    color, at = look.color, collections.defaultdict(list)
    for run in sorted(runs, key=lambda run: run[key]):
        at[run[key]].append(run)
    points = {number: [100 * one[name] for one in records.final_metrics(some)] for number, some in at.items()}
    points = {number: values for number, values in points.items() if values}
    means = [statistics.mean(values) for values in points.values()]
    axis.plot(list(points), means, color=color, linestyle=look.linestyle)
    style = {"linestyle": look.linestyle, "marker": look.marker, "markersize": 4}
    axis.plot([], [], color=color, label=look.name, **style)
    if band:
        low, high = ([pick(values) for values in points.values()] for pick in (min, max))
        axis.fill_between(list(points), low, high, color=color, alpha=0.15, linewidth=0)
    dot = {"marker": look.marker, "markersize": 4, "alpha": 0.7, "clip_on": False}  # whole at the edges, too
    for number, values in points.items():
        axis.plot([number] * len(values), values, linestyle="", color=color, **dot)
    diverged = {number: records.num_diverged(some) for number, some in at.items()}
    places = [number for number, times in diverged.items() if times]
    if not places:
        return
    title, below = f"{look.name}, diverged" if look.name else "diverged", next(offsets)
    edge = {"transform": axis.get_xaxis_transform(), "clip_on": False, "markeredgewidth": 2}
    axis.plot(places, [1.0] * len(places), "x", color=color, label=title, markersize=8, **edge)
    for number in places:
        axis.annotate(
            f"{diverged[number]} of {len(at[number])}",
            (number, 1),
            (0, -below),
            xycoords=axis.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
        )


def draw_study(record):
    """Draws all final errors of a study against the key that it names; see `plan.against`."""
    key = plan.against(record["config"])
    names = figures.names_without(record, key)
    looks = {
        point: Look(name, color, marker)
        for (point, name), color, marker in zip(
            names.items(), figures.shades(len(names)), itertools.cycle(figures.MARKERS), strict=False
        )
    }
    errors = {name: name for name in comparison.final_errors(record)}
    figure, rows = draw(record, key, errors, looks, xlabel=plan.titles_of([key])[key])
    axes = [axis for row in rows.values() for axis in row]
    figures.scale_errors(axes, [row[0] for row in rows.values()])
    if records.num_diverged(record["runs"]):
        axes[0].set_ylim(0, min(100, 2 * axes[0].get_ylim()[1]))  # room for their numbers
    shown = {line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]}
    if shown:
        figures.add_legend_beside(figure, list(shown.values()))
    figure.suptitle(caption(record), fontsize=10)
    return figure


def caption(record):
    """Says what data the runs of a record had, and what dots, lines and bands show."""
    dots = "dot: a seed, line: " if len(record["config"]["seeds"]) > 1 else ""
    return f"{figures.describe_data(record)}; {dots}{figures.describe_seeds(record)}"
