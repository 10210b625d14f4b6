"""Records of results/ with a section for each command that adds to them."""

import json
import pathlib

from cnn_cases.training import disk, provenance


def write_section(path, name, command, figures):
    """Puts what a command found in the place of what it found before; the file's other sections stay.

    Args:
      path: of a JSON file, which need not be there yet.
      name: of the section.
      command: that gives the figures again.
      figures: a dict that JSON can hold.
    """
    path = pathlib.Path(path)
    sections = json.loads(path.read_text()) if path.exists() else {}
    head = {"command": command, **provenance.stamp()}
    disk.write_json(path, sections | {name: head | figures})
