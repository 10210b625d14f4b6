import json
import pathlib

import pytest

from cnn_cases.studies import depth_curves, draw
from tests.studies.conftest import run

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
        *("record.json", "table.md", "table.csv", "curves.png", "curves.svg", "curves.html")
    }


def test_a_study_that_compares_has_the_comparison_besides(record, tmp_path):
    record["config"] |= {"grid": [["model.depth", [8, 20]]], "compare": "model.depth"}
    record["runs"] = [one for one in record["runs"] if one["model.plain"]]
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"comparison.md", "comparison.csv", "difference.png", "difference.svg"}
    assert "| 20 minus 8 | 40.00 |  | 40.00 |  | 1 | 1 |" in (tmp_path / "out/comparison.md").read_text()


def test_a_grid_of_depths_that_compares_something_else_is_drawn_as_any_study(record, tmp_path):
    record["config"]["compare"] = "model.depth"
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert "| 20 minus 8 | True |" in (tmp_path / "out/comparison.md").read_text()
    assert not (tmp_path / "out/depth.png").exists()
    assert (tmp_path / "out/loss.png").exists()
    page = (tmp_path / "out/curves.html").read_text()
    assert "depth 8: error" in page
    assert "depth 20: loss" in page


def test_many_compared_values_have_no_panels_of_their_own(record, tmp_path):
    depths = [8, 20, 32, 44, 56]
    record["config"] |= {"compare": "model.depth", "grid": [["model.depth", depths], ["model.plain", [True]]]}
    record["runs"] = [run(depth, True, 0, 0.1) for depth in depths]
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out/difference.png").exists()
    assert not (tmp_path / "out/loss.png").exists()


def test_where_all_runs_diverged_nothing_is_compared_but_all_are_counted(record, tmp_path):
    record["config"] |= {"grid": [["model.depth", [8, 20]]], "compare": "model.depth"}
    record["runs"] = [run(depth, True, 0, None, status="diverged") for depth in (8, 20)]
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert "| 20 minus 8 | 0 | 1 |" in (tmp_path / "out/comparison.md").read_text()
    assert not (tmp_path / "out/difference.png").exists()


def test_a_damaged_record_that_compares_nothing_is_told(record, tmp_path, capsys):
    record["config"] |= {"grid": [["model.depth", [8, 20]]], "compare": "model.deep"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert "compare = 'model.deep' must be a key of the grid" in capsys.readouterr().err


def test_values_of_a_grid_can_be_tuples(record, tmp_path):
    record["config"]["grid"] = [["schedule.boundaries", [[0.5, 0.75], [0.3, 0.6]]]]
    for one in record["runs"]:
        one["schedule.boundaries"] = [0.5, 0.75] if one.pop("model.plain") else [0.3, 0.6]
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path / "record.json"), f"--out={tmp_path}"])
    table = (tmp_path / "table.md").read_text()
    assert "| 0.5 and 0.75 | 4 |" in table
    assert "| 0.3 and 0.6 | 4 |" in table


def test_the_directory_of_a_study_stands_for_its_record(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out/table.md").exists()


def test_depths_of_one_kind_are_drawn_as_any_study(record, tmp_path):
    record["config"]["grid"] = [["model.depth", [8, 20]], ["model.plain", [True]]]
    record["runs"] = [one for one in record["runs"] if one["model.plain"]]
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path / "record.json"), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out/depth.png").exists()
    assert (tmp_path / "out/curves.png").exists()


def test_a_grid_of_depths_without_figures_of_training_is_drawn_as_any_study(record, tmp_path):
    for one in record["runs"]:
        if one["status"] == "finished":
            one["metrics"] = {"test/error": one["metrics"]["test/error"]}
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path / "record.json"), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out/depth.png").exists()
    assert "| 8 | True | 2 | 30.00 ± 14.14 | 0 |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record["runs"][1].pop("model.depth"), "runs[1] has no model.depth"),
        (lambda record: record["runs"][0].pop("metrics"), "runs[0] has no metrics"),
        (lambda record: record["runs"].clear(), "runs = [] must not be empty"),
        (lambda record: record["environments"][0].clear(), "environments[0] has no commit"),
    ],
)
def test_a_record_from_which_something_is_missing_is_one_error(spoil, message, record, tmp_path, capsys):
    spoil(record)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as exit_info:
        draw.main([str(path), f"--out={tmp_path / 'out'}"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: {path}: {message}\n"


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
