"""What benchmarks found is kept, and nothing else is written over."""

import argparse
import json
from unittest import mock

import pytest

from benchmarks import record


def test_a_section_takes_the_place_of_its_older_self_alone(tmp_path):
    path = record.output(f"{tmp_path}/record.json")
    record.write_section(path, "LeNet-5", "python -m benchmarks.flags --turns=5", {"seconds": 1})
    record.write_section(path, "NIN", "python -m benchmarks.flags", {"seconds": 2})
    record.write_section(path, "LeNet-5", "python -m benchmarks.flags", {"seconds": 3})
    sections = json.loads(path.read_text())
    assert {name: one["seconds"] for name, one in sections.items()} == {"LeNet-5": 3, "NIN": 2}
    assert "xla_flags" not in sections["NIN"]["environment"]  # those of this process, which measures nothing
    with pytest.raises(ValueError, match=r"section 'NIN' is by python -m benchmarks\.flags; name another"):
        record.write_section(path, "NIN", "python -m benchmarks.throughput", {})
    with pytest.raises(ValueError, match=r"section 'NIN' is by python -m benchmarks\.flags; name another"):
        record.write_section(path, "NIN", "python -m benchmarks.flags --device=gpu --turns=5", {})
    assert json.loads(path.read_text()) == sections


def test_a_section_of_another_command_is_refused_before_anything_is_measured(tmp_path, capsys):
    path, parser = record.output(f"{tmp_path}/record.json"), argparse.ArgumentParser()
    command = "python -m benchmarks.throughput --cases 'ResNet-20' --peers torch --dtype=float32 --turns=5"
    record.write_section(path, "ResNet-20", command, {"seconds": 1})
    record.check(parser, None, {"ResNet-20": "another"})
    record.check(parser, path, {"ResNet-20": command.replace("=5", "=11"), "NIN": "another"})
    with pytest.raises(SystemExit):
        record.check(parser, path, {"NIN": "another", "ResNet-20": command.replace("float32", "bfloat16")})
    assert "the section 'ResNet-20' is by python -m benchmarks.throughput --cases" in capsys.readouterr().err


def test_the_code_is_noted_before_anything_is_measured(tmp_path, monkeypatch):
    note = mock.Mock()
    monkeypatch.setattr(record.provenance, "note_code", note)
    record.output(f"{tmp_path}/record.json")
    note.assert_called_once_with()


def test_a_section_names_the_devices_that_were_measured_and_a_commit_that_came_meanwhile(
    tmp_path, monkeypatch
):
    path = record.output(f"{tmp_path}/record.json")
    record.write_section(path, "one", "python -m benchmarks.flags", {})
    monkeypatch.setattr(record.provenance.commit, "__wrapped__", lambda: "a later one")
    record.write_section(path, "two", "python -m benchmarks.flags", {}, ["NVIDIA H200"])
    one, two = json.loads(path.read_text()).values()
    assert "commit_at_end" not in one
    assert two["commit_at_end"] == "a later one"
    assert two["environment"] == one["environment"] | {"devices": ["NVIDIA H200"]}


def test_a_section_of_other_devices_stays(tmp_path, capsys):
    path, command = record.output(f"{tmp_path}/record.json"), "python -m benchmarks.throughput --turns=5"
    record.write_section(path, "NIN", command, {"seconds": 1}, ["NVIDIA H200"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="section 'NIN' is of NVIDIA H200, and this is cpu; name another"):
        record.write_section(path, "NIN", command, {"seconds": 2}, ["cpu"])
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):
        record.check(argparse.ArgumentParser(), path, {"NIN": command}, lambda: ["cpu"])
    assert "section 'NIN' is of NVIDIA H200, and this is cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "has other things than sections"),
        ('{"NIN": {"command": null}}', "has other things than sections"),
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
