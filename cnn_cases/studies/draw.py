"""Draws and tabulates a study again from its record, without its runs.

python -m cnn_cases.studies.draw results/depth_digits.json --out=runs/depth_digits_again
"""

import argparse
import pathlib
import sys

from cnn_cases.studies import depth_curves, records, sweep


def main(arguments=None):
    """Reads the record, writes the report; ends with one message and exit code 2 where that fails."""
    parser = argparse.ArgumentParser(
        prog="python -m cnn_cases.studies.draw", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "record", type=pathlib.Path, help="a file of results/, a record.json, or the directory of a study"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a directory for the report")
    options = parser.parse_args(arguments)
    options.out = options.out.expanduser()  # a shell leaves the ~ of --out=~/x as it is
    try:
        if options.record.is_dir():
            options.record /= "record.json"
        record = records.read(options.record)
        if record is None:
            raise ValueError(
                f"{options.record} is no record of a study: it must have config, environments and runs"
            )
        _check_free(options.out, record)
        options.out.mkdir(parents=True, exist_ok=True)
        (depth_curves if depth_curves.suits(record) else sweep).write_report(record, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"tables and figures: {options.out}")


def _check_free(out, record):
    """Raises ValueError where the report would take the place of another record's."""
    there = out / "record.json"
    if there.exists() and records.read(there) != record:
        raise ValueError(f"out = {out} has the report of another record; name another directory")


if __name__ == "__main__":
    main()
