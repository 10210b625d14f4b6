import json
import pathlib

import pytest

from cnn_cases.studies import depth_curves, draw

RESULTS = pathlib.Path(__file__).parents[2] / "results"


def test_a_depth_study_is_drawn_from_its_record(tmp_path, capsys):
    path = RESULTS / "depth_digits.json"
    draw.main([str(path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out/difference.png").exists()
    table = depth_curves.table(json.loads(path.read_text()), "markdown")
    assert (tmp_path / "out/table.md").read_text() == table
    assert (tmp_path / "out/record.json").read_text() == path.read_text()
    assert "tables and figures" in capsys.readouterr().out


def test_another_study_has_its_curves_and_its_table(tmp_path):
    draw.main([str(RESULTS / "lenet5_mnist.json"), f"--out={tmp_path}"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("record.json", "table.md", "curves.png", "curves.svg", "curves.html")
    }


@pytest.mark.parametrize("text", ["{}", "[]", "no json", None])
def test_what_is_no_record_is_one_error(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        draw.main([str(tmp_path / "record.json"), f"--out={tmp_path / 'out'}"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / "record.json") in error
    assert not (tmp_path / "out").exists()
