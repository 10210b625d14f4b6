"""Records of results/ with a section for each command that adds to them."""

import argparse
import json

from cnn_cases import parsing
from cnn_cases.training import disk, provenance


def output(text):
    """The value of an option --out, for argparse: a JSON file of sections, or one that is not there yet."""
    path = parsing.path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must lie in a directory that is there")
    try:
        _sections(path)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def write_section(path, name, command, figures):
    """Puts what a command found in the place of what it found before; the file's other sections stay.

    Args:
      path: of a JSON file, which need not be there yet; see `output`.
      name: of the section.
      command: that gives the figures again.
      figures: a dict that JSON can hold.

    Raises:
      ValueError: the file holds something else, or has a section of the name by another benchmark.
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
