"""Draws and tabulates a study again from its record, without its runs.

    python -m cnn_cases.studies.draw results/depth_digits.json --out=runs/depth_digits_again

A record of runs gets the report of `depth_curves` or `sweep`; records of `layer_signals` and `bottleneck` get
their own.
"""

import argparse
import json

from cnn_cases import parsing
from cnn_cases.studies import bottleneck, depth_curves, layer_signals, records, sweep


def main(arguments=None):
    """Reads the record and writes the report; on failure ends with one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m cnn_cases.studies.draw", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "record", type=parsing.path, help="a file of results/, a record.json, or the directory of a study"
    )
    parser.add_argument("--out", type=parsing.path, required=True, help="a directory for the report")
    options = parser.parse_args(arguments)
    with parsing.one_message():
        if options.record.is_dir():
            options.record /= "record.json"
        record, study = _read(options.record)
        _check_free(options.out, record)
        study.write_report(record, options.out)
        print(f"tables and figures: {options.out}")


def _read(path):
    """The record in a file, and the module that writes its report.

    Raises:
      ValueError: the file does not hold a record of a study.
    """
    record = records.read(path)
    if record is not None:
        return record, depth_curves if depth_curves.suits(record) else sweep
    record = json.loads(path.read_text())
    for part, study in (("states", layer_signals), ("networks", bottleneck)):
        if isinstance(record, dict) and part in record:
            return record, study
    raise ValueError(f"{path} is no record of a study: it must have config, environments and runs")


def _check_free(out, record):
    """Raises ValueError if the report would replace that of another record."""
    there = out / "record.json"
    if there.exists() and _read(there)[0] != record:
        raise ValueError(f"out = {out} has the report of another record; name another directory")


if __name__ == "__main__":
    main()
