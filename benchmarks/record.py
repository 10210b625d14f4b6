"""Records in results/ with a section for each result that a command adds."""

import argparse
import json

from cnn_cases import parsing
from cnn_cases.training import disk, provenance


def output(text):
    """The value of an --out option, for argparse: a JSON file of sections, or one that does not exist yet."""
    path = parsing.path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must lie in an existing directory")
    try:
        _sections(path)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def write_section(path, name, command, figures):
    """Writes a command's results in place of its earlier results; the file's other sections stay.

    Args:
      path: a JSON file, which need not exist yet; see `output`.
      name: the name of the section.
      command: the command that reproduces the results.
      figures: the results, a dict that JSON can hold.

    Raises:
      ValueError: the file holds something else, or has a section of this name from another benchmark.
    """
    sections = _sections(path)
    if name in sections and _benchmark(sections[name]["command"]) != _benchmark(command):
        raise ValueError(f"{path}: the section {name!r} is by {sections[name]['command']}; name another file")
    head = {"command": command, **provenance.stamp()}
    disk.write_json(path, sections | {name: head | figures})


def _sections(path):
    if not path.exists():
        return {}
    try:
        sections = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not (
        isinstance(sections, dict)
        and all(isinstance(one, dict) and "command" in one for one in sections.values())
    ):
        raise ValueError(f"{path} has other things than sections of benchmarks; name another file")
    return sections


def _benchmark(command):
    """`python -m benchmarks.flags --turns=5` -> `benchmarks.flags`."""
    return "".join(command.split()[2:3])
