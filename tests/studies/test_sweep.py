import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from cnn_cases import saved_runs, stopping
from cnn_cases.studies import records, report, sweep
from cnn_cases.training import disk, programs
from tests.conftest import metrics_of
from tests.studies.conftest import cells, tiny_study

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def study(data_dir):
    return tiny_study(data_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grid": (("model.deepth", (8,)),)},
            "grid: model.deepth = 8 does not fit the base config: there is no such key; known: model.name",
        ),
        (
            {"grid": (("num_steps", ("many",)),)},
            r"grid: num_steps = 'many' does not fit the base config: it must be an int \(of 64 bits\), as",
        ),
        ({"grid": (("num_steps", ()),)}, r"grid: num_steps = \(\) must have values"),
        ({"grid": (("batch_size", (24, 2000)),)}, "batch_size = 2000 must be between 1 and the 1257"),
        ({"grid": (("seed", (1, 2)),)}, "grid: seed cannot be a key of it"),
        ({"grid": (("num_steps", 8),)}, "must be pairs of a key and the values it takes"),
        ({"grid": ("num_steps", (8, 12))}, "must be pairs of a key and the values it takes"),
        (
            {"adjust": ((("data.augment.flop", True), (("num_steps", 8),)),)},
            "adjust: data.augment.flop is no key of the grid, which has optimizer.momentum, data",
        ),
        (
            {"adjust": ((("data.augment.flip", True), (("optimizer.momentum", 0.5),)),)},
            "adjust: optimizer.momentum = 0.5 must be set by the grid or the seeds",
        ),
        (
            {"adjust": ((("data.augment.flip", True), (("seed", 8),)),)},
            "adjust: seed = 8 must be set by the grid or the seeds",
        ),
        (
            {"adjust": ((("data.augment.flip", True), (("num_stepps", 8),)),)},
            "adjust: num_stepps = 8 does not fit the base config",
        ),
        ({"grid": ((8, (1, 2)),)}, "must be pairs of a key and the values it takes"),
        ({"grid": (("num_steps", (8,)), ("num_steps", (12,)))}, "grid: num_steps must appear once"),
        ({"grid": (("model", (8,)),)}, "grid: model = 8 does not fit the base config"),
        ({"grid": (("data.name.x", (8,)),)}, "grid: data.name.x = 8 does not fit the base config"),
        (
            {"grid": (("data.name", ("a", "a_data_dir-b")), ("data.data_dir", ("b_data_dir-c", "c")))},
            "2 runs would have the name name-a_data_dir-b_data_dir-c_seed-0",
        ),
        (
            {"adjust": ((("data.augment.flip", True), (("model.depth.x", 8),)),)},
            "adjust: model.depth.x = 8 does not fit the base config",
        ),
        (
            {"grids": ()},
            "grids is unknown; a study has base, grid and seeds, and can have adjust, compare and against",
        ),
        ({"base": 3}, r"base = 3 \(int\) must be a ConfigDict"),
        ({"adjust": (("num_steps", 8),)}, r"adjust = \(\('num_steps', 8\),\) must be pairs of"),
        ({"grid": (("num_steps", (4, 4)),)}, "grid: num_steps = .* none of them twice"),
        ({"grid": (("num_steps", ({1}, np.ones(2))),)}, "grid: num_steps = .* must have numbers, strings"),
        ({"seeds": (0, -1)}, "seed = -1 must be in"),
        ({"seeds": 3}, "seeds = 3 must be a tuple of whole numbers"),
        ({"seeds": ("a",)}, r"seeds = \('a',\) must be a tuple of whole numbers"),
        ({"seeds": ()}, r"^seeds = \(\) must have values"),
        ({"seeds": (1, 1)}, r"^seeds = \(1, 1\) must have values, and none of them twice"),
    ],
)
def test_an_impossible_study_is_refused(changes, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.run_all(tiny_study(data_dir, **changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("command", "key", "where"), [("sweep", "seed", "seeds"), ("depth_curves", "model.depth", "grid")]
)
def test_a_key_that_every_run_sets_is_not_taken_from_the_base(command, key, where, tmp_path):
    words = ["--config=configs/studies/depth_digits.py", f"--config.base.{key}=32"]
    done = subprocess.run(
        [sys.executable, "-m", f"cnn_cases.studies.{command}", *words, f"--workdir={tmp_path / 'study'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = f"error: --config.base.{key} = 32 would change no run; set its values with --config.{where}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    assert not (tmp_path / "study").exists()


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The workdir of a whole small study, in which every run with momentum 0.9 diverges."""
    workdir = tmp_path_factory.mktemp("study")
    make_program = programs.make_program

    def make(config, *_):
        program = make_program(config, jax.devices()[:1])
        if config.optimizer.momentum == 0:
            return program

        def train(state, *_):  # nothing is compiled for it
            return state, metrics_of(float("nan"))

        return program._replace(train=train, steps_per_call=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_program", make)
        sweep.run_all(tiny_study(data_dir), workdir)
    return workdir


def test_a_diverged_run_is_marked_and_the_study_goes_on(finished, study):
    runs = sweep.make_record(study, finished)["runs"]
    assert [run["status"] for run in runs] == ["finished"] * 4 + ["diverged"] * 4
    assert {run["step"] for run in runs[4:]} == {1}


def test_a_record_holds_points_seeds_curves_and_figures(finished, study):
    record = json.loads(json.dumps(sweep.make_record(study, finished)))
    first = record["runs"][0]
    assert (first["optimizer.momentum"], first["data.augment.flip"], first["seed"]) == (0.0, True, 0)
    assert [step for step, _ in first["curves"]["running/error"]] == [2, 4]
    assert first["metrics"]["test/error"] == pytest.approx(first["curves"]["test/error"][-1][1], abs=1e-6)
    losses = [value for _, value in first["curves"]["running/loss"]]
    assert len(losses) == 2
    assert first["metrics"]["test/loss"] == pytest.approx(first["curves"]["test/loss"][-1][1], rel=1e-5)
    assert record["config"]["base"]["num_steps"] == 4
    assert record["config"]["base"]["data"]["data_dir"] == "", "a place on this machine"
    assert len(record["environments"]) == 1
    assert {tuple(run["environments"]) for run in record["runs"]} == {(0,)}


def test_each_run_of_a_record_has_the_hash_of_its_config_which_another_config_has_not(
    finished, study, tmp_path
):
    record = sweep.make_record(study, finished)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    hashes = [run["config_hash"] for run in records.read(path)["runs"]]
    assert len(set(hashes)) == len(record["runs"])
    record["config"]["base"]["optimizer"]["learning_rate"] *= 2
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"runs\[0\]: config_hash = '{hashes[0]}' must be \w{{12}}, th"):
        records.read(path)


def test_a_study_can_be_read_where_its_data_lie_elsewhere(finished, study):
    assert saved_runs.load_study(finished).base.data.data_dir == study.base.data.data_dir != ""
    assert saved_runs.load_study(finished, "/elsewhere").base.data.data_dir == "/elsewhere"


def test_a_record_says_which_run_had_which_environment(finished, study, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    for seed, starts in ((0, ["a" * 40]), (1, ["a" * 40, "b" * 40])):
        path = workdir / f"runs/momentum-0.0_flip-True_seed-{seed}/environment.json"
        one = json.loads(path.read_text())[0]
        path.write_text(json.dumps([one | {"commit": commit, "code": commit[:12]} for commit in starts]))
    record = sweep.make_record(study, workdir)
    assert [run["environments"] for run in record["runs"][:3]] == [[0], [0, 1], [2]]
    head, *rows = cells(sweep.table(record, "markdown"))
    assert head[2:4] == ["code", "seeds"]
    assert [row[2:4] for row in rows[:2]] == [["aaaaaaa", "1"], ["aaaaaaa then bbbbbbb", "1"]]
    assert len(rows) == 5


def test_a_run_of_another_recipe_is_refused(finished, study, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    path = workdir / "runs/momentum-0.0_flip-True_seed-0/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": 400}))
    with pytest.raises(
        ValueError, match=r"seed-0 belongs to another config:\n  num_steps: 400 saved, 4 given"
    ):
        sweep.make_record(study, workdir)


def test_a_report_has_a_table_curves_and_a_page(finished, study, tmp_path):
    sweep.write_report(sweep.make_record(study, finished), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("record.json", "table.md", "table.csv", "curves.csv", "curves.png", "curves.svg", "curves.html")
    }
    assert (
        (tmp_path / "table.md").read_text().startswith("| optimizer.momentum | data.augment.flip | seeds |")
    )


def test_a_table_has_a_row_for_each_point_and_counts_what_diverged(finished, study):
    head, *rows = cells(sweep.table(sweep.make_record(study, finished), "markdown"))
    assert head[:4] == ["optimizer.momentum", "data.augment.flip", "seeds", "train/loss"]
    assert [row[:3] for row in rows] == [[m, f, "2"] for m in ("0.0", "0.9") for f in ("True", "False")]
    assert [row[-1] for row in rows] == ["0", "0", "2", "2"]
    errors = [run["metrics"]["test/error"] for run in sweep.make_record(study, finished)["runs"][:2]]
    expected = f"{50 * sum(errors):.2f} ± {50 * 2**0.5 * abs(errors[0] - errors[1]):.2f}"
    assert rows[0][head.index("test/error %")] == expected
    assert rows[2][3:-1] == [""] * 6


def test_a_table_has_a_column_for_each_figure_that_any_run_has(finished, study):
    record = sweep.make_record(study, finished)
    record["runs"][3]["metrics"]["test/ten_crop/error"] = 0.25
    head, *rows = cells(sweep.table(record, "markdown"))
    assert [row[head.index("test/ten_crop/error %")] for row in rows] == ["", "25.00", "", ""]


def test_the_text_of_a_record_is_its_json_with_a_run_a_line(finished, study):
    record = sweep.make_record(study, finished)
    text = report.record_text(record)
    assert json.loads(text) == json.loads(json.dumps(record))
    assert sum(line.startswith('    {"optimizer.momentum"') for line in text.splitlines()) == 8


def test_a_second_start_runs_nothing_again(finished, study, monkeypatch, capsys):
    monkeypatch.setattr(programs, "make_program", pytest.fail)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    sweep.run_all(study, finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert "(finished before)" in lines[0]
    assert "diverged at step 1" in lines[-1]


def test_a_study_grows_by_seeds_and_points_and_keeps_what_is_done(
    finished, study, data_dir, tmp_path, monkeypatch
):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    path = workdir / "config.json"
    smaller = json.loads(path.read_text()) | {
        "grid": [["optimizer.momentum", [0.0]], ["data.augment.flip", [True]]]
    }
    path.write_text(json.dumps(smaller | {"seeds": [1]}))
    monkeypatch.setattr(programs, "make_program", pytest.fail)
    sweep.run_all(study, workdir)
    assert json.loads(path.read_text()) == json.loads((finished / "config.json").read_text())
    assert sweep.make_record(study, workdir) == sweep.make_record(study, finished)
    for seed in (1, 0):  # and parts of it can still be asked for, one after another
        sweep.run_all(tiny_study(data_dir, seeds=(seed,)), workdir)
        assert json.loads(path.read_text()) == json.loads((finished / "config.json").read_text())


def test_a_study_that_is_older_than_a_key_grows_all_the_same(finished, data_dir, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    older = json.loads(path.read_text())
    del older["base"]["start"], older["base"]["optimizer"]["frozen"]
    path.write_text(json.dumps(older))
    monkeypatch.setattr(sweep.jobs, "run_here", lambda *_: [])
    sweep.run_all(tiny_study(data_dir, seeds=(0, 1, 2)), tmp_path / "copy")
    assert json.loads(path.read_text())["seeds"] == [0, 1, 2]


def test_a_later_start_checks_nothing_but_what_is_new(finished, data_dir, tmp_path, monkeypatch):
    workdir, checked = tmp_path / "copy", []
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "runs/momentum-0.9_flip-True_seed-0")
    monkeypatch.setattr(sweep.jobs, "run_here", lambda *_: [])
    monkeypatch.setattr(programs, "check", lambda config, _: checked.append(config.seed))
    sweep.run_all(tiny_study(data_dir), workdir)
    assert checked == []
    sweep.run_all(tiny_study(data_dir, seeds=(0, 1, 2)), workdir)
    assert checked == [2, 0]  # of the first point the new seed, and of the others the one that is gone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 2)}, r"seeds: \[0, 1\] saved, \[1, 2\] given"),
        ({"grid": (("data.augment.flip", (True, False)),)}, "grid: "),
        (
            {"seeds": (0, 1, 2), "adjust": ((("optimizer.momentum", 0.9), (("num_microbatches", 2),)),)},
            r"adjust: nothing saved, .*\n  seeds: \[0, 1\] saved",
        ),
    ],
)
def test_a_study_that_lacks_or_changes_a_run_is_another_one(changes, message, finished, data_dir):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        sweep.run_all(tiny_study(data_dir, **changes), finished)
    assert (finished / "config.json").read_bytes() == before


def test_seeds_alone_are_run_side_by_side_too(data_dir, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(sweep.jobs, "run_side_by_side", lambda groups, *_: started.append(groups) or [])
    monkeypatch.setattr(programs, "check", lambda *_: None)
    for num_jobs, sizes in ((2, [2, 2]), (3, [1, 1, 1, 1])):
        sweep.run_all(tiny_study(data_dir, grid=(("num_steps", (4, 8)),)), tmp_path / str(num_jobs), num_jobs)
        assert [len(group) for group in started.pop()] == sizes


@pytest.mark.parametrize("workdir", ["gs://bucket/study", "runs/lr[1]"])
def test_a_workdir_that_no_run_could_have_is_refused_at_once(workdir, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^workdir = .*(: its path must have no|must be a directory)"):
        sweep.run_all(study, workdir)
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_run_by_one_process_at_a_time(study, tmp_path):
    with disk.lock(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        sweep.run_all(study, tmp_path)
    assert os.listdir(tmp_path) == ["lock"]


def test_a_record_can_be_of_a_part_of_a_study_and_of_no_other(finished, study, data_dir):
    part = sweep.make_record(tiny_study(data_dir, seeds=(0,)), finished)
    assert part["runs"] == sweep.make_record(study, finished)["runs"][::2]
    with pytest.raises(ValueError, match="seed-2 is not finished"):
        sweep.make_record(tiny_study(data_dir, seeds=(0, 1, 2)), finished)
    with pytest.raises(ValueError, match="belongs to another config"):
        sweep.make_record(tiny_study(data_dir, seeds=(0, 2)), finished)
    assert json.loads((finished / "config.json").read_text())["seeds"] == [0, 1], "it is only read"


def test_a_record_of_runs_of_unknown_code_is_refused(finished, study, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy/runs/momentum-0.0_flip-True_seed-1/environment.json").unlink()
    with pytest.raises(
        ValueError, match=r"flip-True_seed-1 has no environment.json, which identifies its code"
    ):
        sweep.make_record(study, tmp_path / "copy")


def test_a_record_is_made_where_nothing_can_be_written(finished, study, monkeypatch):
    monkeypatch.setattr(disk, "write_json", pytest.fail)
    study.base.data.data_dir = "/elsewhere"
    assert len(sweep.make_record(study, finished)["runs"]) == 8


def test_a_signal_at_the_end_of_a_run_ends_the_study(data_dir, tmp_path, monkeypatch):
    evaluate = programs.evaluate

    def interrupted(program, state, split, **options):
        values = evaluate(program, state, split, **options)
        if split == "test":  # the last one
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(programs, "evaluate", interrupted)
    study = tiny_study(data_dir, grid=(("optimizer.momentum", (0.9,)),))
    with pytest.raises(stopping.InterruptedRun, match=r"seed-0 is finished and saved"):
        sweep.run_all(study, tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["momentum-0.9_seed-0"]


def test_a_study_that_is_not_finished_gives_no_record(study, tmp_path):
    with pytest.raises(ValueError, match=r"momentum-0\.0_flip-True_seed-0 is not finished"):
        sweep.make_record(study, tmp_path)


def test_all_errors_of_a_table_are_in_percent(record):
    for one in record["runs"]:
        if one["status"] == "finished":
            one["metrics"] = {"test/ten_crop/error": 0.3, "test/ten_crop/top_5_error": 0.1}
    head, first, *_ = cells(sweep.table(record, "markdown"))
    assert head[3:5] == ["test/ten_crop/error %", "test/ten_crop/top_5_error %"]
    assert first[3:5] == ["30.00 ± 0.00", "10.00 ± 0.00"]


def test_the_table_for_programs_has_fractions_and_numbers(record, tmp_path):
    record["config"]["grid"] = [["model.depth", [8, 20]]]
    record["runs"] = [one for one in record["runs"] if one["model.plain"]]
    sweep.write_report(record, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        shallow, deep = csv.DictReader(file)
    mean, deviation = float(shallow["train/error mean"]), float(shallow["train/error std"])
    assert (mean, deviation) == pytest.approx((0.2, 0.02**0.5))
    assert (shallow["seeds"], shallow["train/error seeds"], shallow["diverged"]) == ("2", "2", "0")
    assert float(deep["train/error mean"]) == 0.5
    assert (deep["train/error std"], deep["train/error seeds"], deep["diverged"]) == ("", "1", "1")


def test_a_report_keeps_nothing_of_the_one_before_it(record, tmp_path):
    whole = record["config"] | {"compare": "model.plain"}
    kept, foreign = tmp_path / "kept", tmp_path / "foreign"
    for directory in (kept, foreign):
        directory.mkdir()
    sweep.write_report(record | {"config": whole}, kept)
    assert (kept / "comparison.md").exists()
    assert (kept / "difference.png").exists()
    part = whole | {"grid": [["model.depth", [8, 20]], ["model.plain", [True]]]}
    record |= {"config": part, "runs": [one for one in record["runs"] if one["model.plain"]]}
    sweep.write_report(record, kept)
    names = {"table.md", "table.csv", "curves.csv", "curves.png", "curves.svg", "curves.html", "record.json"}
    assert {path.name for path in kept.iterdir()} == names
    (foreign / "loss.png").write_text("of something else")
    sweep.write_report(record, foreign)
    assert (foreign / "loss.png").exists()
