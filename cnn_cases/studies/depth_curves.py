"""Plain against residual nets as depth grows: the runs, a table, and the figures after He et al. figure 6.

    python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_digits.py --workdir=runs/depth

Started again, it skips the runs that are finished and resumes the one that is not.
"""

import collections
import csv
import io
import pathlib
import statistics

import matplotlib
from absl import flags
from matplotlib import pyplot as plt

from cnn_cases import command, tables
from cnn_cases.studies import sweep
from cnn_cases.training import logbook

KINDS = {True: "plain", False: "residual"}
COLOURS = {"plain": "#D55E00", "residual": "#0072B2"}  # far apart for the colour-blind too
FIGURES = ("train/loss", "train/error", "test/error")


def summarise(record):
    """The table's rows, one a depth.

    Args:
      record: of `sweep.make_record`, over model.depth and model.plain.

    Returns:
      [{"depth": ..., "plain train/loss": [one value a seed], ..., "plain diverged": number of seeds}].
    """
    rows = {}
    for run in record["runs"]:
        depth, kind = run["model.depth"], KINDS[run["model.plain"]]
        row = rows.setdefault(depth, collections.defaultdict(list, depth=depth))
        row[f"{kind} diverged"] = row.get(f"{kind} diverged", 0) + (run["status"] == "diverged")
        for name in FIGURES:
            if run["status"] == "finished":
                row[f"{kind} {name}"].append(run["metrics"][name])
    return [rows[depth] for depth in sorted(rows)]


def _cell(row, kind, name):
    """Mean and sample deviation over the seeds that finished; losses as they are, errors in percent."""
    values = [value * (100 if name.endswith("error") else 1) for value in row[f"{kind} {name}"]]
    diverged = row[f"{kind} diverged"]
    text = tables.mean_and_deviation(values, digits=2 if name.endswith("error") else 3)
    return f"{text} ({diverged} diverged)".strip() if diverged else text


def table(record, form):
    """The table as text.

    Args:
      record: see `summarise`.
      form: "text", "markdown" or "csv"; CSV has the mean and the deviation of fractions, the others percent.
    """
    rows = summarise(record)
    columns = [(kind, name) for name in FIGURES for kind in KINDS.values() if f"{kind} diverged" in rows[0]]
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(
            [
                "depth",
                *(f"{kind} {name} {what}" for kind, name in columns for what in ("mean", "std", "seeds")),
            ]
        )
        for row in rows:
            cells = []
            for kind, name in columns:
                values = row[f"{kind} {name}"]
                cells += [
                    statistics.mean(values) if values else "",
                    statistics.stdev(values) if len(values) > 1 else "",
                    len(values),
                ]
            writer.writerow([row["depth"], *cells])
        return out.getvalue()
    titles = {"train/loss": "training loss", "train/error": "training error %", "test/error": "test error %"}
    head = ["depth", *(f"{kind} {titles[name]}" for kind, name in columns)]
    body = [[str(row["depth"]), *(_cell(row, *column) for column in columns)] for row in rows]
    return (tables.markdown if form == "markdown" else tables.aligned)([head, *body])


def _mean_curve(runs, name):
    """Steps, and in percent the mean, least and greatest value over the runs at each of them."""
    values = collections.defaultdict(list)
    for run in runs:
        for step, value in run["curves"].get(name, []):
            values[step].append(100 * value)
    steps = sorted(values)
    return steps, *([pick(values[step]) for step in steps] for pick in (statistics.mean, min, max))


def draw_curves(record):
    """Error over steps, plain left and residual right; training thin, test bold (He et al., figure 6)."""
    depths = sorted({run["model.depth"] for run in record["runs"]})
    positions = [0.1 + 0.9 * n / max(1, len(depths) - 1) for n in range(len(depths))]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
    for axis, (plain, kind) in zip(axes, KINDS.items(), strict=True):
        for depth, shade in zip(depths, matplotlib.colormaps["viridis_r"](positions), strict=True):
            point = {"model.depth": depth, "model.plain": plain, "status": "finished"}
            runs = [run for run in record["runs"] if point.items() <= run.items()]
            steps, mean, _, _ = _mean_curve(runs, "running/error")
            axis.plot(steps, mean, color=shade, linewidth=0.8)
            steps, mean, low, high = _mean_curve(runs, "test/error")
            axis.plot(steps, mean, color=shade, linewidth=2.4, label=f"{depth} layers")
            axis.fill_between(steps, low, high, color=shade, alpha=0.15, linewidth=0)
        axis.set(title=f"{kind} nets", xlabel="training step", xlim=(0, None), ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error (%)")
    lines, labels = axes[0].get_legend_handles_labels()
    # The deepest on top, as the plain curves lie.
    figure.legend(lines[::-1], labels[::-1], loc="outside right center", frameon=False)
    seeds = len(record["config"]["seeds"])
    diverged = sum(run["status"] == "diverged" for run in record["runs"])
    figure.suptitle(
        f"thin: training error, bold: test error; mean over {seeds} seeds, band: from least to greatest"
        + (f"; {diverged} diverged runs are left out" if diverged else ""),
        fontsize=10,
    )
    return figure


def draw_depth(record):
    """Final training and test error against depth, plain against residual, every seed a dot."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
    rows = summarise(record)
    for axis, name, title in zip(axes, ("train/error", "test/error"), ("training", "test"), strict=True):
        for kind, colour in COLOURS.items():
            points = [(row["depth"], [100 * v for v in row[f"{kind} {name}"]]) for row in rows]
            points = [(depth, values) for depth, values in points if values]
            axis.plot(
                [depth for depth, _ in points],
                [statistics.mean(values) for _, values in points],
                color=colour,
                linestyle="--" if kind == "plain" else "-",
                label=kind,
            )
            for depth, values in points:
                marker = "s" if kind == "plain" else "o"
                axis.plot([depth] * len(values), values, marker, color=colour, markersize=4, alpha=0.7)
        axis.set(xlabel="depth (weighted layers)", title=f"{title} error after the last step")
        axis.set_xticks([row["depth"] for row in rows])
        axis.set_ylim(-2, 100)  # dots at zero stay whole
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("error (%)")
    return figure


def write_report(record, workdir):
    """Writes record.json, the table (table.csv, table.md) and the figures (curves, depth: .png and .svg)."""
    workdir = pathlib.Path(workdir)
    logbook.write_text(workdir / "record.json", sweep.record_text(record))
    logbook.write_text(workdir / "table.csv", table(record, "csv"))
    logbook.write_text(workdir / "table.md", table(record, "markdown"))
    for name, draw in (("curves", draw_curves), ("depth", draw_depth)):
        figure = draw(record)
        for form in ("png", "svg"):
            figure.savefig(workdir / f"{name}.{form}", dpi=150)
        plt.close(figure)


def main():
    """Runs the study, prints its table and draws its figures."""
    matplotlib.use("agg")
    study, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    sweep.expand(study)
    keys, splits = {key for key, _ in study.grid}, set(study.base.evaluation.final_splits)
    if keys != {"model.depth", "model.plain"} or not {"train", "test"} <= splits:
        raise ValueError(
            f"a depth study needs a grid of model.depth and model.plain, not {', '.join(sorted(keys))}, and "
            f"train and test among base.evaluation.final_splits, not {', '.join(sorted(splits))}"
        )
    if not flags.FLAGS.figures_only:
        sweep.run_all(study, workdir, flags.FLAGS.jobs, sweep.cluster_of_flags())
    record = sweep.make_record(study, workdir)
    write_report(record, workdir)
    print(table(record, "text"))
    print(f"table and figures: {workdir}")


if __name__ == "__main__":
    sweep.define_flags()
    flags.DEFINE_bool("figures_only", False, "Only draw what the finished runs gave.")
    command.run(main)
