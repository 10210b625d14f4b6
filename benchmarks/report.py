"""Writes the tables of the records into docs/speed.md: `python -m benchmarks.report`.

Each table is between two lines, `<!-- NAME, written by python -m benchmarks.report -->` and `<!-- End. -->`.
"""

import argparse
import json
import pathlib
import re

from benchmarks import end_to_end, flags, scaling, throughput, traffic
from cnn_cases import tables

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/speed.md"


def _sharing(rows):
    return scaling.sharing_cells({name: row for name, row in rows.items() if "teams" in row})


def _depths(rows):
    depths = {name.removeprefix("depth "): row for name, row in rows.items() if "contenders" in row}
    return scaling.depth_cells(depths)


# {name of the table: (record, function that makes its cells, columns of words)}.
TABLES = {
    "Images a second": ("throughput_cpu", throughput.cells, (0,)),
    "Costs": ("throughput_cpu", throughput.cost_cells, (0,)),
    "Images a second on an H100": ("throughput_h100", throughput.cells, (0,)),
    "Costs on an H100": ("throughput_h100", throughput.cost_cells, (0,)),
    "Traffic on an H200": ("traffic_h200", traffic.cells, (0,)),
    "Flags": ("xla_flags_cpu", flags.cells, (0,)),
    "Whole processes": ("end_to_end_cpu", end_to_end.cells, (0, 1)),
    "Sharing": ("scaling_cpu", _sharing, (0,)),
    "Depth": ("scaling_cpu", _depths, ()),
}


def fill(text):
    """The text of a document, with each of TABLES written between its two lines.

    Raises:
      ValueError: a table has no place, or several.
    """
    for name, (record, cells, words) in TABLES.items():
        rows = json.loads((ROOT / f"results/{record}.json").read_text())
        table = tables.markdown(cells(rows), words=words)
        place = rf"(<!-- {name}, written by [^\n]* -->\n).*?(<!-- End\. -->)"
        text, count = re.subn(place, lambda found, t=table: f"{found[1]}\n{t}\n{found[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"there are {count} places for the table {name!r}")
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.partition(":")[0]
    ).parse_args()
    DOCUMENT.write_text(fill(DOCUMENT.read_text()))
