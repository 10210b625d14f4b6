"""The report of a study: its record, tables, figures and page, in one directory."""

import json
import pathlib

from cnn_cases import tables
from cnn_cases.studies import figures, plan, records
from cnn_cases.training import disk

# What some reports have and others lack.
_NOT_OF_ALL = (
    *("comparison.csv", "comparison.md"),
    *(
        f"{name}.{kind}"
        for name in ("loss", "depth", "final_errors", "difference")
        for kind in ("png", "svg")
    ),
)


def write(record, workdir, texts, drawings, panel_key, panels):
    """Writes record.json, curves.csv, curves.html (the page), and the study's own tables and figures.

    Tables and figures that only the report before had, for example of a larger part of the grid, are removed.

    Args:
      record: see `records`.
      workdir: the directory.
      texts: {name: (record, form) -> the table as text}; each becomes a .csv and a .md file.
      drawings: {name: record -> figure}; each becomes a .png and an .svg file.
      panel_key, panels: for the page; see `page.to_html`.

    Returns:
      The tables as text.
    """
    from cnn_cases.studies import page  # not above, since each process of `--jobs` would wait for Bokeh too

    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "record.json").exists():  # otherwise they are no report's
        for name in _NOT_OF_ALL:
            if name.partition(".")[0] not in texts.keys() | drawings.keys():
                (workdir / name).unlink(missing_ok=True)
    for name, make in texts.items():
        disk.write_text(workdir / f"{name}.csv", make(record, "csv"))
        disk.write_text(workdir / f"{name}.md", make(record, "markdown"))
    disk.write_text(workdir / "curves.csv", tables.comma_separated(table_of_curves(record)))
    for name, draw in drawings.items():
        figures.save(draw(record), workdir / name)
    disk.write_text(workdir / "curves.html", page.to_html(record, panel_key, panels))
    disk.write_text(workdir / "record.json", record_text(record))  # last, when all of it could be drawn
    return [make(record, "text") for make in texts.values()]


def record_text(record):
    """The record as JSON with one run per line, so that people can read it and git can compare it."""
    head = json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=2)
    runs = ",\n".join("    " + json.dumps(run) for run in record["runs"])
    return head.removesuffix("\n}") + ',\n  "runs": [\n' + runs + "\n  ]\n}\n"


def table_of_curves(record):
    """The rows of a machine-readable table of all curves: one for each value of a run, the header first."""
    keys = [key for key, _ in record["config"]["grid"]]
    parts = records.split_by_code(record)
    code = ["code"] if len(parts) > 1 else []
    rows = [[*keys, "seed", *code, "figure", "step", "value"]]
    for name, part in parts.items():
        for run in part["runs"]:
            head = [*(plan.text_of(run[key]) for key in keys), run["seed"], *([name] if code else [])]
            for figure, curve in run["curves"].items():
                rows += [[*head, figure, step, value] for step, value in curve]
    return rows
