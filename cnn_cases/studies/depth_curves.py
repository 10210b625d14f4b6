"""Plain against residual nets as depth grows: runs, tables, and figures after He et al. 2015, figure 6.

    python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_digits.py --workdir=runs/depth

When started again, it skips finished runs and resumes unfinished ones.
"""

import statistics

from absl import flags
from matplotlib.figure import Figure

from cnn_cases import command, tables
from cnn_cases.studies import comparison, figures, plan, records, report, sweep

KINDS = {True: "plain", False: "residual"}
COLOURS = dict(zip(KINDS.values(), figures.TWO_COLOURS, strict=True))


def _final_errors(record):
    """{name of a final error: its title}; the test error uses the views of `evaluation.protocol`."""
    protocol = plan.lookup(record["config"]["base"], "evaluation.protocol") or "single"
    if protocol == "single":
        return {"train/error": "training error", "test/error": "test error"}
    return {"train/error": "training error", f"test/{protocol}/error": f"test error ({protocol})"}


def _room_for_errors(record, factor):
    """The upper end of an error axis in percent: `factor` times the largest final error, at most 100.

    It is 100 if a run diverged, since its curve and cross may be anywhere.
    """
    if records.num_diverged(record["runs"]):
        return 100
    finished = records.final_metrics(record["runs"])
    errors = [metrics[name] for metrics in finished for name in _final_errors(record)]
    # Below 1 % the axis would have no whole numbers.
    return min(100, max(1, factor * 100 * max(errors)))


def _final_figures(record):
    return {"train/loss": "training loss"} | _final_errors(record)


def suits(record):
    """Whether a record is that of a depth study, with all final metrics of each finished run."""
    config, names = record["config"], _final_figures(record).keys()
    return (
        _is_of_twins(config["grid"])
        and "compare" not in config
        and all(names <= metrics.keys() for metrics in records.final_metrics(record["runs"]))
    )


def _is_of_twins(grid):
    grid = dict(grid)
    return grid.keys() == {"model.depth", "model.plain"} and set(grid["model.plain"]) == KINDS.keys()


def summarise(record):
    """The table's rows: one for each depth, and for each code if there are several.

    Args:
      record: see `records`; of a study over model.depth and model.plain.

    Returns:
      [{"depth", "code", "plain train/loss": [one value per seed], ..., "plain diverged": number of seeds}].
    """
    rows = []
    for code, part in records.split_by_code(record).items():
        for depth in {run["model.depth"] for run in part["runs"]}:
            row = {"depth": depth, "code": code}
            for plain, kind in KINDS.items():
                point = {"model.depth": depth, "model.plain": plain}
                runs = [run for run in part["runs"] if point.items() <= run.items()]
                finished = records.final_metrics(runs)
                row |= {f"{kind} {name}": [one[name] for one in finished] for name in _final_figures(record)}
                row[f"{kind} diverged"] = records.num_diverged(runs)
            rows.append(row)
    return sorted(rows, key=lambda row: (row["depth"], row["code"]))


def _cell(row, kind, name):
    """Mean and sample standard deviation over the finished seeds; losses as they are, errors in percent."""
    values = [value * (100 if name.endswith("error") else 1) for value in row[f"{kind} {name}"]]
    diverged = row[f"{kind} diverged"]
    text = tables.mean_and_deviation(values, digits=2 if name.endswith("error") else 3)
    return f"{text} ({diverged} diverged)".strip() if diverged else text


def table(record, form):
    """The table as text.

    Args:
      record: see `summarise`.
      form: "text", "markdown" or "csv"; in CSV errors are fractions, in the other forms percent.
    """
    rows = summarise(record)
    there = {run["model.plain"] for run in record["runs"]}
    kinds = [kind for plain, kind in KINDS.items() if plain in there]
    titles = _final_figures(record)
    columns = [(kind, name) for name in titles for kind in kinds]
    code = ["code"] if any(row["code"] for row in rows) else []
    if form == "csv":
        whats = [f"{kind} {name} {what}" for kind, name in columns for what in ("mean", "std", "seeds")]
        lines = [["depth", *code, *whats, *(f"{kind} diverged" for kind in kinds)]]
        for row in rows:
            lines.append([row["depth"], *(row[key] for key in code)])
            for kind, name in columns:
                lines[-1] += tables.statistics_of(row[f"{kind} {name}"])
            lines[-1] += [row[f"{kind} diverged"] for kind in kinds]
        return tables.render(lines, form)
    heads = [f"{kind} {titles[name]}{' %' * name.endswith('error')}" for kind, name in columns]
    lines = [["depth", *code, *heads]]
    for row in rows:
        lines.append([str(row["depth"]), *(row[key] for key in code), *(_cell(row, *one) for one in columns)])
    return tables.render(lines, form)


def _panels(record):
    """Key, titles and names for `figures.draw_panels`: plain nets left, residual nets right, by depth."""
    titles = {plain: f"{kind} nets" for plain, kind in KINDS.items()}
    depths = sorted({run["model.depth"] for run in record["runs"]})
    return "model.plain", titles, {(depth,): f"{depth} layers" for depth in depths}


def draw_curves(record):
    """Draws error over steps, plain left and residual right; training thin, test bold (He et al., figure 6).

    As in that figure, the first steps may lie above the upper edge, to leave room for the last ones.
    """
    return figures.draw_errors_by(record, *_panels(record), top=_room_for_errors(record, 2))


def draw_loss(record):
    """Draws training loss over steps on a logarithmic axis, plain left and residual right."""
    return figures.draw_loss_by(record, *_panels(record))


def _draw_by_depth(record, rows, draw_panel, label):
    """A figure of training error (left) and test error (right) against depth, with panels for each code."""
    depths = sorted({run["model.depth"] for run in record["runs"]})
    codes = list(dict.fromkeys(row["code"] for row in summarise(record)))
    figure = Figure(figsize=(9.5, 3.8 * len(codes) + 0.2), layout="constrained")
    grid = figure.subplots(len(codes), 2, squeeze=False, sharex=True, sharey=True)
    for axes, code in zip(grid, codes, strict=True):
        of_code = [row for row in rows if row["code"] == code]
        for axis, (name, title) in zip(axes, _final_errors(record).items(), strict=True):
            draw_panel(axis, of_code, name)
            axis.set_title(f"{title}, code {code}" if code else title)
            axis.set_xticks(depths)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(label)
    room = max(1, 0.05 * (depths[-1] - depths[0]))
    grid[0, 0].set_xlim(depths[0] - room, depths[-1] + room)  # a depth without marks has its place, too
    for axis in grid[-1]:
        axis.set_xlabel("depth (weighted layers)")
    return figure, grid


def draw_depth(record):
    """Draws final training and test error against depth, for plain and residual nets.

    Lines connect the means, bands span minimum to maximum, and every seed is a dot. A cross at the upper edge
    stands for diverged runs and gives their number.
    """

    def draw_panel(axis, rows, name):
        for kind, style, marker, below in (("plain", "--", "s", 16), ("residual", "-", "o", 27)):
            color = COLOURS[kind]
            diverged = [row for row in rows if row[f"{kind} diverged"]]
            points = [(row["depth"], [100 * value for value in row[f"{kind} {name}"]]) for row in rows]
            points = [(depth, values) for depth, values in points if values]
            depths = [depth for depth, _ in points]
            means = [statistics.mean(values) for _, values in points]
            axis.plot(depths, means, color=color, linestyle=style)
            axis.plot([], [], color=color, linestyle=style, marker=marker, markersize=4, label=kind)
            low, high = ([pick(values) for _, values in points] for pick in (min, max))
            axis.fill_between(depths, low, high, color=color, alpha=0.15, linewidth=0)
            for depth, values in points:
                axis.plot([depth] * len(values), values, marker, color=color, markersize=4, alpha=0.7)
            if diverged:
                edge = {"transform": axis.get_xaxis_transform(), "clip_on": False, "markeredgewidth": 2}
                depths, title = [row["depth"] for row in diverged], f"{kind}, diverged"
                axis.plot(depths, [1.0] * len(depths), "x", color=color, label=title, markersize=8, **edge)
            for row in diverged:
                number = row[f"{kind} diverged"]
                axis.annotate(
                    f"{number} of {number + len(row[f'{kind} {name}'])}",
                    (row["depth"], 1),
                    (0, -below),
                    xycoords=axis.get_xaxis_transform(),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=color,
                )

    figure, grid = _draw_by_depth(record, summarise(record), draw_panel, "error after the last step (%)")
    top = _room_for_errors(record, 1.2)
    for axis in grid.flat:
        axis.set_ylim(-0.02 * top, top)  # so that dots at zero are not cut
        axis.legend(frameon=False)
    seeds = figures.describe_seeds(record)
    if len(record["config"]["seeds"]) > 1:
        seeds = f"dot: a seed, line: {seeds}"
    figure.suptitle(f"{figures.describe_data(record)}; {seeds}", fontsize=10)
    return figure


def draw_difference(record):
    """Draws the final error of plain nets minus that of residual nets, in pairs with the same seed."""
    rows = compare(record)

    def draw_panel(axis, rows, name):
        axis.axhline(0, color="black", linewidth=0.8)
        for row in rows:
            comparison.draw_marks(axis, row["model.depth"], row[name], upright=True)

    figure, grid = _draw_by_depth(record, rows, draw_panel, "plain minus residual (percentage points)")
    comparison.give_room(grid.flat, grid[:, 0], "y")
    # Not the sum over the rows: partners that ran with different code are left out in a row of each.
    compared = {(row["model.depth"], seed) for row in rows for seed in row["seeds"]}
    left_out = len({(run["model.depth"], run["seed"]) for run in record["runs"]} - compared)
    figure.suptitle(
        f"{figures.describe_data(record)}; errors after the last step; "
        + comparison.describe_marks(rows, _final_errors(record))
        + (f"; {left_out} pairs left out" if left_out else ""),
        fontsize=9,
    )
    return figure


def compare(record):
    """The paired comparison of plain and residual nets at each depth; see `comparison.compare`."""
    rows = comparison.compare(record, "model.plain", True, False, list(_final_errors(record)))
    return sorted(rows, key=lambda row: row["model.depth"])


def comparison_table(record, form):
    """The paired comparison as "text", "markdown" or "csv"; differences are plain minus residual."""
    titles = {"model.depth": "depth"} | {
        name: f"{title}, plain minus residual" for name, title in _final_errors(record).items()
    }
    return comparison.table(compare(record), titles, form)


def write_report(record, workdir):
    """Writes the report of a record into a directory, and returns its tables as text.

    Files:
      record.json; table.csv, table.md; comparison.csv, comparison.md (plain against residual in pairs);
      curves.csv, curves.html (the page); as PNG and SVG: curves (after figure 6), loss, depth and
      difference.
    """
    texts = {"table": table, "comparison": comparison_table}
    drawings = {"curves": draw_curves, "loss": draw_loss, "depth": draw_depth, "difference": draw_difference}
    key, titles, _ = _panels(record)
    return report.write(record, workdir, texts, drawings, key, titles)


def check(study):
    """Raises ValueError unless `study` is valid for `plan.expand` and is a depth study."""
    runs = plan.expand(study)
    if not _is_of_twins(study.grid):
        raise ValueError(
            f"grid = {study.grid}: a depth study needs values of model.depth, and True and False for "
            "model.plain; cnn_cases.studies.sweep runs other grids"
        )
    if "compare" in study:
        raise ValueError(
            f"compare = {study.compare!r}: a depth study compares plain and residual nets; leave it out, or "
            "take cnn_cases.studies.sweep"
        )
    for run in runs:
        splits, protocol = run.config.evaluation.final_splits, run.config.evaluation.protocol
        if not {"train", "test"} <= set(splits):
            raise ValueError(
                f"{run.name}: evaluation.final_splits = {splits} must have train and test in a depth study"
            )
        if protocol != study.base.evaluation.protocol:
            raise ValueError(
                f"{run.name}: evaluation.protocol = {protocol!r} must be {study.base.evaluation.protocol!r}, "
                "as in base, since a depth study compares its runs"
            )


def main():
    """Checks and runs the study of the flags."""
    check(flags.FLAGS.config)
    sweep.run_study(write_report)


if __name__ == "__main__":
    sweep.define_flags()
    command.run(main)
