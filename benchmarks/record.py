"""Records in results/ with a section for each result that a command adds."""

import argparse
import json
import re

from cnn_cases import parsing
from cnn_cases.training import disk, provenance


def output(text):
    """The value of an --out option, for argparse: a JSON file of sections, or one that does not exist yet.

    It also notes the code, because the processes that are measured start later, when it may be another.
    """
    provenance.note_code()
    path = parsing.path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must lie in an existing directory")
    try:
        _sections(path)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def check(parser, path, commands, devices=None):
    """Ends the command of an argparse parser, before it measures, if a section holds what others measured.

    Args:
      path: the value of its option --out; None if it was not given.
      commands: {name of the section: command}, as for `write_section`.
      devices: a function that returns the kinds of the devices to measure; None: `write_section` checks them.
    """
    sections = _sections(path) if path else {}
    try:
        for name, command in commands.items():
            _check_kind(path, sections, name, command)
            if devices and name in sections:
                _check_devices(path, sections, name, devices())
    except ValueError as error:
        parser.error(str(error))


def devices_here():
    """The kinds of the devices of this process, for `check`; JAX must not have reserved their memory."""
    return provenance.environment()["devices"]


def write_section(path, name, command, figures, devices=None):
    """Writes a command's results in place of its earlier results; the file's other sections stay.

    Args:
      path: a JSON file, which need not exist yet; see `output`.
      name: the name of the section.
      command: the command that reproduces the results.
      figures: the results, a dict that JSON can hold.
      devices: the kinds of the devices that were measured; None: those of this process.

    Raises:
      ValueError: the file holds something else, or its section of this name is by another benchmark, or by
        the same with other flags than numbers, or on other devices.
    """
    head = {"command": command, **provenance.stamp()}
    del head["environment"]["xla_flags"]  # of this process; those that are measured choose theirs
    if devices:
        head["environment"]["devices"] = devices
    devices = head["environment"]["devices"]
    at_end = provenance.commit.__wrapped__()
    if at_end != head["environment"]["commit"]:
        head["commit_at_end"] = at_end  # of processes that were started late
    sections = _sections(path)  # read last, as another command may be writing other sections
    _check_kind(path, sections, name, command)
    _check_devices(path, sections, name, devices)
    disk.write_json(path, sections | {name: head | figures})


def _check_kind(path, sections, name, command):
    there = sections[name]["command"] if name in sections else command
    if _kind(there) != _kind(command):
        raise ValueError(f"{path}: the section {name!r} is by {there}; name another file")


def _check_devices(path, sections, name, devices):
    """Raises ValueError if a section is of other devices: its command may be the same on all of them."""
    there = sections.get(name, {}).get("environment", {}).get("devices", devices)
    if there != devices:
        raise ValueError(
            f"{path}: the section {name!r} is of {', '.join(there)}, and this is {', '.join(devices)}; "
            "name another file"
        )


def _sections(path):
    if not path.exists():
        return {}
    try:
        sections = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not (
        isinstance(sections, dict)
        and all(isinstance(one, dict) and isinstance(one.get("command"), str) for one in sections.values())
    ):
        raise ValueError(f"{path} has other things than sections of benchmarks; name another file")
    return sections


def _kind(command):
    """`python -m benchmarks.flags --device=gpu --turns=5` -> `python -m benchmarks.flags --device=gpu`."""
    return re.sub(r" --\w+=\d+(?!\S)", "", command)
