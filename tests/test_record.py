"""What benchmarks found is kept, and nothing else is written over."""

import argparse
import json

import pytest

from benchmarks import record


def test_a_section_takes_the_place_of_its_older_self_alone(tmp_path):
    path = record.output(f"{tmp_path}/record.json")
    record.write_section(path, "LeNet-5", "python -m benchmarks.flags --turns=5", {"seconds": 1})
    record.write_section(path, "NIN", "python -m benchmarks.flags", {"seconds": 2})
    record.write_section(path, "LeNet-5", "python -m benchmarks.flags", {"seconds": 3})
    sections = json.loads(path.read_text())
    assert {name: one["seconds"] for name, one in sections.items()} == {"LeNet-5": 3, "NIN": 2}
    with pytest.raises(ValueError, match=r"section 'NIN' is by python -m benchmarks\.flags; name another"):
        record.write_section(path, "NIN", "python -m benchmarks.throughput", {})
    assert json.loads(path.read_text()) == sections


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "has other things than sections"),
        ('{"config": {}, "runs": []}', "has other things than sections"),
    ],
)
def test_a_file_of_something_else_is_refused(text, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        record.output(str(path))
    with pytest.raises(argparse.ArgumentTypeError, match="must lie in an existing directory"):
        record.output(str(tmp_path / "nowhere/record.json"))
