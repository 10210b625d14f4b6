import csv
import json
import math
import pathlib
import reprlib

import pytest

from cnn_cases.studies import depth_curves, draw, records, sweep
from tests.studies.conftest import run

GRADIENTS_AND_RESPONSES = [f"{name}.{form}" for name in ("gradients", "responses") for form in ("png", "svg")]
RESULTS = pathlib.Path(__file__).parents[2] / "results"


def test_a_depth_study_is_drawn_from_its_record(tmp_path, capsys):
    path = RESULTS / "depth_digits.json"
    draw.main([str(path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out/difference.png").exists()
    table = depth_curves.table(json.loads(path.read_text()), "markdown")
    assert (tmp_path / "out/table.md").read_text() == table
    assert (tmp_path / "out/record.json").read_text() == path.read_text()
    assert "tables and figures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("depth_digits_layers", {"record.json", "table.md", *GRADIENTS_AND_RESPONSES}),
        ("bottleneck_cpu", {"record.json", "table.txt", "bottleneck.png", "bottleneck.svg"}),
    ],
)
def test_what_is_measured_without_training_is_drawn_from_its_record_too(name, files, tmp_path):
    for _ in range(2):  # a directory with the report of the same record is no other's
        draw.main([str(RESULTS / f"{name}.json"), f"--out={tmp_path}"])
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(
        (RESULTS / f"{name}.json").read_text()
    )


def test_a_package_that_another_one_stands_in_for_has_no_version(record, tmp_path):
    record["environments"][0]["versions"]["tensorflow-datasets"] = None
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert records.read(tmp_path / "record.json")["runs"] == record["runs"]


def test_one_code_counts_a_seed_once(record, tmp_path, capsys):
    record["environments"].append(record["environments"][0] | {"cpus": 64})
    record["runs"].append(record["runs"][0] | {"environments": [1]})
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert "runs[8] is a duplicate, of the same code and with seed 0" in capsys.readouterr().err
    record["environments"][1]["code"] = "another"
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert records.read(tmp_path / "record.json")["runs"] == record["runs"]


def test_another_study_has_its_curves_and_its_table(tmp_path):
    draw.main([str(RESULTS / "lenet5_mnist.json"), f"--out={tmp_path}"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("record.json", "table.md", "table.csv", "curves.csv", "curves.png", "curves.svg", "curves.html")
    }


def test_the_curves_can_be_read_by_programs(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    rows = list(csv.DictReader((tmp_path / "out/curves.csv").read_text().splitlines()))
    assert len(rows) == sum(len(curve) for one in record["runs"] for curve in one["curves"].values())
    assert rows[1] == {
        **{"model.depth": "8", "model.plain": "True", "seed": "0"},
        **{"figure": "running/error", "step": "20", "value": "0.1"},
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


def test_a_study_can_ask_for_its_final_errors_against_a_number(record, tmp_path):
    record["config"]["against"] = "model.depth"
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out/final_errors.png").exists()
    assert (tmp_path / "out/final_errors.svg").exists()
    assert not (tmp_path / "out/depth.png").exists()


def test_a_figure_that_only_the_report_before_had_is_removed(record, tmp_path):
    record["config"]["against"] = "model.depth"
    sweep.write_report(record, tmp_path)
    del record["config"]["against"]
    sweep.write_report(record, tmp_path)
    assert not [*tmp_path.glob("final_errors.*")]


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


@pytest.mark.parametrize("study", ["depth_curves", "sweep"])
def test_where_no_run_lived_to_its_first_row_the_report_is_complete(study, record, tmp_path):
    if study == "sweep":
        record["config"] |= {"compare": "model.depth"}
    for one in record["runs"]:
        one.pop("metrics", None)
        one |= {"status": "diverged", "step": 3, "curves": {}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert {"curves.png", "curves.html", "table.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_damaged_record_that_compares_nothing_is_told(record, tmp_path, capsys):
    record["config"] |= {"grid": [["model.depth", [8, 20]]], "compare": "model.deep"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        draw.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert "compare = 'model.deep' must be a key of the grid" in capsys.readouterr().err


def test_values_of_a_grid_can_be_tuples(record, tmp_path):
    record["config"]["grid"] = [["schedule.boundaries", [[0.5, 0.75], [0.3, 0.6]]]]
    record["runs"] = [one for one in record["runs"] if one["model.depth"] == 8]
    for one in record["runs"]:
        one["schedule.boundaries"] = [0.5, 0.75] if one.pop("model.plain") else [0.3, 0.6]
    (tmp_path / "record.json").write_text(json.dumps(record))
    draw.main([str(tmp_path / "record.json"), f"--out={tmp_path}"])
    table = (tmp_path / "table.md").read_text()
    assert "| 0.5 and 0.75 | 2 |" in table
    assert "| 0.3 and 0.6 | 2 |" in table


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
        (lambda record: record["runs"].clear(), "runs = [] must be a list, and must not be empty"),
        (
            lambda record: record.update(environments=None),
            "environments = None must be a list, and must not be empty",
        ),
        (lambda record: record["runs"].append(7), "runs[8] = 7 must have keys"),
        (lambda record: record["environments"][0].clear(), "environments[0] has no commit"),
        (lambda record: record["environments"][0].pop("cpus"), "environments[0] has no cpus"),
        (lambda record: record["config"]["base"].pop("data"), "config: base has no data.name"),
        (
            lambda record: record["config"].update(grid=[["model.depth"]]),
            "grid = (('model.depth',),) must be pairs of a key and the values it takes, all of them tuples, "
            "as in (('model.depth', (20, 56)),)",
        ),
        (
            lambda record: record["config"].update(seeds=2),
            "seeds = 2 must be a tuple of whole numbers, as in (0, 1, 2)",
        ),
        (
            lambda record: record["runs"][1].update(status="running"),
            "runs[1]: status = 'running' must be 'finished' or 'diverged'",
        ),
        (lambda record: record["runs"][1].update(seed=5), "runs[1]: seed = 5 must be one of 0, 1"),
        (
            lambda record: record["runs"][2].update({"model.depth": 14}),
            "runs[2]: model.depth = 14 must be one of 8, 20",
        ),
        (
            lambda record: record["runs"][0].update(environments=[1]),
            "runs[0]: environments = [1] must be numbers of environments, which are below 1",
        ),
        (
            lambda record: record["runs"][0]["metrics"].update({"test/error": math.nan}),
            "runs[0]: metrics: test/error = nan must be a finite number",
        ),
        (
            lambda record: record["runs"][0]["metrics"].update({"test/error": "0.1"}),
            "runs[0]: metrics: test/error = '0.1' must be a finite number",
        ),
        (
            lambda record: record["runs"][0]["curves"].update({"test/error": [[10, None]]}),
            "runs[0]: curves: test/error = [[10, None]] must be pairs of a step and a finite number",
        ),
        (lambda record: record["runs"][0].update(curves=[]), "runs[0]: curves = [] must be named figures"),
        (
            lambda record: record["runs"].append(record["runs"][3]),
            "runs[8] is a duplicate, of the same code and with seed 1; remove one",
        ),
        (
            lambda record: record["environments"][0].update(versions=[]),
            "environments[0]: versions = [] must be names of packages with their versions",
        ),
        (
            lambda record: record["environments"][0].update(devices=-1),
            "environments[0]: devices = -1 must be a list of texts",
        ),
        (
            lambda record: record["environments"][0].update(code=["0123"]),
            "environments[0]: code = ['0123'] must be a text or null",
        ),
        (lambda record: record["runs"][0].update(date=20261128), "runs[0]: date = 20261128 must be a text"),
        (
            lambda record: record["runs"][0]["metrics"].update({"test/error": 10**400}),
            f"runs[0]: metrics: test/error = {reprlib.repr(10**400)} must be a finite number",
        ),
    ],
)
def test_a_record_that_cannot_be_is_one_error(spoil, message, record, tmp_path, capsys):
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


def test_a_report_is_drawn_again_with_equal_figures_and_that_of_another_record_stays(
    record, tmp_path, capsys
):
    path, out = tmp_path / "record.json", tmp_path / "out"
    path.write_text(json.dumps(record))
    draw.main([str(path), f"--out={out}"])
    first = {file.name: file.read_bytes() for file in out.glob("*.[ps][nv]g")}
    assert len(first) == 8
    draw.main([str(path), f"--out={out}"])
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for name, figure in first.items():
        assert before[name] == figure, name
    record["runs"].pop()
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as stop:
        draw.main([str(path), f"--out={out}"])
    assert stop.value.code == 2
    assert f"out = {out} has the report of another record" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
