"""Plain against residual nets as depth grows: runs, tables, and figures after He et al. 2015, figure 6.

    python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_digits.py --workdir=runs/depth

When started again, it skips finished runs and resumes unfinished ones.
"""

import itertools

from absl import flags

from cnn_cases import command, tables
from cnn_cases.studies import comparison, figures, final_errors, plan, records, report, sweep

KINDS = {True: "plain", False: "residual"}
DEPTH = "depth (weighted layers)"
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
        and not config.keys() & {"compare", "against"}
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


def draw_depth(record):
    """Draws final training and test error against depth, for plain and residual nets; see `final_errors`."""
    looks = {
        (True,): final_errors.Look("plain", COLOURS["plain"], "s", "--"),
        (False,): final_errors.Look("residual", COLOURS["residual"], "o"),
    }
    figure, rows = final_errors.draw(record, "model.depth", _final_errors(record), looks, xlabel=DEPTH)
    top = _room_for_errors(record, 1.2)
    for axis in itertools.chain(*rows.values()):
        axis.set_ylim(-0.02 * top, top)  # so that dots at zero are not cut
        axis.legend(frameon=False)
    figure.suptitle(final_errors.caption(record), fontsize=10)
    return figure


def draw_difference(record):
    """Draws the final error of plain nets minus that of residual nets, in pairs with the same seed."""
    names, rows = _final_errors(record), compare(record)
    ylabel = "plain minus residual (percentage points)"
    figure, panels = final_errors.make_panels(
        record, "model.depth", names.values(), xlabel=DEPTH, ylabel=ylabel
    )
    for code, axes in panels.items():
        for axis, name in zip(axes, names, strict=True):
            axis.axhline(0, color="black", linewidth=0.8)
            for row in rows:
                if row["code"] == code:
                    comparison.draw_marks(axis, row["model.depth"], row[name], upright=True)
    comparison.give_room(list(itertools.chain(*panels.values())), [axes[0] for axes in panels.values()], "y")
    # Not the sum over the rows: partners that ran with different code are left out in a row of each.
    compared = {(row["model.depth"], seed) for row in rows for seed in row["seeds"]}
    left_out = len({(run["model.depth"], run["seed"]) for run in record["runs"]} - compared)
    figure.suptitle(
        f"{figures.describe_data(record)}; errors after the last step; "
        + comparison.describe_marks(rows, names)
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
    for key in {"compare", "against"} & set(study):
        raise ValueError(
            f"{key} = {study[key]!r}: a depth study compares plain and residual nets as depth grows; leave "
            "it out, or take cnn_cases.studies.sweep"
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
