"""Compares two kinds of runs in pairs with the same seed and the same point of the grid, except for one key.

What a seed does to both partners is not in their difference. They see the same batches, unless the key, or
what the study's `adjust` changes with it, belongs to the data. They start from the same initial values where
their parameters are the same. A mean difference has a 95 % confidence interval of Student's t, which assumes
that the differences are independent draws from one normal distribution; with three seeds it is wide, and with
one pair there is none. Intervals are not corrected for multiple comparisons: of twenty, one is expected to
miss. A pair of which one partner diverged or ran with other code is left out and counted.
"""

import math
import statistics

from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy
from scipy.special import stdtrit

from cnn_cases import tables
from cnn_cases.studies import figures, plan, records

CONFIDENCE = 0.95


def interval(values):
    """The ends of the confidence interval of the mean.

    None for fewer than two values, and for values that are all equal, which do not show how they vary.
    """
    if len(values) < 2 or math.isclose(min(values), max(values), abs_tol=1e-9):
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return mean - reach, mean + reach


def compare(record, key, first, second, names):
    """The differences between the runs with `key` = first and their partners with `key` = second.

    Args:
      record: see `records`.
      key: a key of the grid.
      first: a value of the key.
      second: another value of the key.
      names: final metrics, such as "test/error".

    Returns:
      A dict for each code and each point of the other keys at which it has runs of either kind: {"code",
      **point, "seeds": those of the pairs in which both finished, "pairs": their number, "left_out": number
      of the other seeds, <name>: {"differences", "mean", "interval"}}. Without a pair the mean is None; see
      `interval` for where the interval is.
    """
    rows = []
    for code, part in records.split_by_code(record).items():
        partners = {}
        others = [one for one, _ in record["config"]["grid"] if one != key]
        for run in part["runs"]:
            if run[key] in (first, second):
                point = tuple(run[one] for one in others)
                partners.setdefault(point, {}).setdefault(run["seed"], {})[run[key]] = run
        for point, seeds in partners.items():
            pairs = {seed: (one.get(first), one.get(second)) for seed, one in seeds.items()}
            good = {
                seed: pair
                for seed, pair in pairs.items()
                if all(run and run["status"] == "finished" for run in pair)
            }
            row = {"code": code, **dict(zip(others, point, strict=True))}
            row |= {"seeds": list(good), "pairs": len(good), "left_out": len(pairs) - len(good)}
            for name in names:
                values = [one["metrics"][name] - other["metrics"][name] for one, other in good.values()]
                row[name] = {
                    "differences": values,
                    "mean": statistics.mean(values) if values else None,
                    "interval": interval(values),
                }
            rows.append(row)
    return rows


def table(rows, titles, form):
    """The rows of `compare` as text.

    Args:
      rows: from `compare`, for metrics that are errors.
      titles: {key or metric: title of its columns}, in the order of the columns.
      form: "text", "markdown" or "csv"; CSV has fractions, the other forms percentage points.
    """
    codes = any(row["code"] for row in rows)
    lines = [["code"] if codes else []]
    for name, title in titles.items():
        if not isinstance(rows[0][name], dict):
            lines[0].append(title)
        elif form == "csv":
            lines[0] += [f"{name} {what}" for what in ("mean difference", "low", "high")]
        else:
            lines[0] += [f"{title} (points)", "95 % interval"]
    lines[0] += ["pairs", "left out"]
    for row in rows:
        cells = [row["code"]] if codes else []
        for name in titles:
            if not isinstance(row[name], dict):
                cells.append(plan.text_of(row[name]))
                continue
            mean, ends = row[name]["mean"], row[name]["interval"]
            if form == "csv":
                cells += ["" if mean is None else mean, *(ends or ("", ""))]
            else:
                cells.append("" if mean is None else f"{100 * mean:z.2f}")
                cells.append(f"{100 * ends[0]:z.2f} to {100 * ends[1]:z.2f}" if ends else "")
        lines.append([*cells, str(row["pairs"]), str(row["left_out"])])
    return tables.render(lines, form)


def draw(rows, labels, titles):
    """A figure of the rows of `compare`, one below the other, with a panel for each metric.

    Args:
      rows: from `compare`, for metrics that are errors.
      labels: the label of each row.
      titles: {metric: title of its panel}.
    """
    tallest = max(label.count("\n") + 1 for label in labels)
    height = 1.6 + max(0.55, 0.2 * tallest) * len(rows)
    figure = Figure(figsize=(4 + 3.2 * len(titles), height), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(rows):
            draw_marks(axis, place, row[name], upright=False)
        axis.set(xlabel="difference (percentage points)", title=title)
        axis.grid(alpha=0.3, axis="x")
    if rows[1:]:
        give_room(axes, axes, "x", ticks=(1, 5, 20, 100))
    axes[0].set_yticks(range(len(rows)), labels, parse_math=False)
    widths = [label.get_window_extent().width / figure.dpi for label in axes[0].get_yticklabels()]
    figures.enlarge(figure, max(widths) - 3, 0)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def give_room(axes, labelled, along, **ticks):
    """Stretches small differences if others are so large that the small ones would all lie on zero.

    Args:
      axes: Matplotlib axes that share their scale, with the marks already drawn.
      labelled: those of the axes that have a label.
      along, ticks: see `figures.stretch_small`.
    """
    limits = [getattr(axis.dataLim, f"interval{along}") for axis in axes]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if max(-low, high) > 20:
        for axis in labelled:
            figures.stretch_small(axis, along, **ticks)
        axes[0].set(**{f"{along}lim": (1.2 * low - 0.2, 1.2 * high + 0.2)})


def describe_marks(rows, names):
    """Explains the marks in a figure of the rows of `compare`, for these metrics."""
    bar = any(row[name]["interval"] for row in rows for name in names)
    return "circle: pair of runs with one seed, diamond: mean" + ", bar: 95 % interval" * bar


def draw_marks(axis, place, result, upright):
    """Draws a mean difference (diamond) and its interval (bar), next to the differences of pairs (circles).

    Args:
      axis: Matplotlib axes for differences in percentage points.
      place: the position along the other axis.
      result: the entry for a metric in a row of `compare`.
      upright: whether differences point upward, rather than to the right.
    """

    def draw_at(values, *style, **styles):
        values = [100 * value for value in values]
        places = [place] * len(values)
        points = (places, values) if upright else (values, places)
        axis.plot(*points, *style, **styles)
        # Matplotlib makes no room for shifted marks.
        axis.update_datalim(list(zip(*points, strict=True)))
        axis.autoscale_view()

    shift = {"x": 8} if upright else {"y": -8}  # otherwise the mean would hide them
    beside = offset_copy(axis.transData, axis.figure, units="points", **shift)
    circles = {"color": "#666666", "markersize": 4, "markerfacecolor": "white", "transform": beside}
    draw_at(result["differences"], "o", **circles)
    if result["interval"]:
        ends = "_" if upright else "|"
        draw_at(result["interval"], f"-{ends}", color="black", linewidth=1.5, markersize=10)
    if result["differences"]:
        draw_at([result["mean"]], "D", color="black", markersize=4)


def compare_study(record):
    """The comparison that a study defines, in all final errors; see `plan.compared`.

    Returns:
      Rows of `compare`, each with "value", a value of the compared key; the key's own entry is "<value> minus
      <first>".
    """
    key, first, others = plan.compared(record["config"])
    return [
        row | {"value": value, key: f"{plan.text_of(value)} minus {plan.text_of(first)}"}
        for value in others
        for row in compare(record, key, value, first, final_errors(record))
    ]


def final_errors(record):
    """The names of the final errors that all finished runs have."""
    finished = records.final_metrics(record["runs"])
    names = dict.fromkeys(name for metrics in finished for name in metrics if name.endswith("error"))
    return [name for name in names if all(name in metrics for metrics in finished)]


def study_table(record, form):
    """The comparison that a study defines, as "text", "markdown" or "csv"; see `table`."""
    keys = [key for key, _ in record["config"]["grid"]]
    titles = {key: key for key in keys} if form == "csv" else plan.titles_of(keys)
    return table(compare_study(record), titles | {name: name for name in final_errors(record)}, form)


def draw_study(record):
    """A figure of the comparison that a study defines."""
    rows = compare_study(record)
    grid = dict(record["config"]["grid"])
    short = plan.titles_of(list(grid))
    texts = {key: figures.shortened(values) for key, values in grid.items()}
    compared, first, others = plan.compared(record["config"])
    several, labels = len(others) > 1, []

    def minus(value):
        return f"{texts[compared][value]} minus {texts[compared][first]}"

    for row in rows:
        point = [f"{name} {texts[key][row[key]]}" for key, name in short.items() if key != compared]
        lines = [
            minus(row["value"]) if several else "",
            ", ".join(point),
            f"code {row['code']}" if row["code"] else "",
            f"{row['left_out']} left out" if row["left_out"] else "",
        ]
        labels.append("\n".join(filter(None, lines)))
    figure = draw(rows, labels, {name: name for name in final_errors(record)})
    what = short[compared] if several else f"{short[compared]}: {minus(others[0])}"
    figure.suptitle(
        f"{what}, on {figures.describe_data(record)}\nerrors after the last step; "
        + describe_marks(rows, final_errors(record)),
        fontsize=9,
        parse_math=False,
    )
    return figure
