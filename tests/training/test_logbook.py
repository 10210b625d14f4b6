import json
import os
import platform
import subprocess
import sys

import pytest

from cnn_cases.training import logbook

CONFIG = {"seed": 0, "optimizer": {"momentum": 0.9, "name": "sgd"}, "splits": ("test",)}


def open_log(workdir, config=CONFIG):
    return logbook.Logbook(workdir, config, num_steps=10, title="test", show_progress=False)


def write_rows(workdir, start, steps):
    log = open_log(workdir)
    log.start(start)
    for step in steps:
        log.write(step, {"running/loss": step / 10})
    log.close()


def test_rows_come_back_as_they_were_written(tmp_path):
    write_rows(tmp_path, 0, [1, 2])
    rows = logbook.read_rows(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "running/loss": 0.1}, {"step": 2, "running/loss": 0.2}]


def test_rows_after_the_step_of_the_restart_are_dropped(tmp_path):
    write_rows(tmp_path, 0, [1, 2, 3, 4])
    write_rows(tmp_path, 2, [3])
    assert [row["step"] for row in logbook.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    write_rows(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    write_rows(tmp_path, 2, [3])
    assert [row["step"] for row in logbook.read_rows(path)] == [1, 3]


def test_a_workdir_is_for_one_process_at_a_time(tmp_path):
    log = open_log(tmp_path)
    holder = f"process {os.getpid()} on {platform.node()}"
    with pytest.raises(ValueError, match=f"is in use by {holder}; wait for its end"):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = "import pathlib, sys, time; from cnn_cases.training import logbook\n"
    code += "file = logbook._lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on"):
            open_log(tmp_path)
        process.kill()
    open_log(tmp_path).close()


def test_tensorboard_gets_the_same_figures(tmp_path):
    write_rows(tmp_path, 0, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert b"running/loss" in events.read_bytes()


def test_the_config_and_every_start_are_noted(tmp_path):
    for _ in range(2):
        open_log(tmp_path).close()
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG | {"splits": ["test"]}
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert len(starts) == 2
    assert {"commit", "python", "devices", "versions"} <= starts[0].keys()
    assert starts[0]["versions"].keys() == set(logbook.PACKAGES)


def test_a_workdir_of_another_config_is_refused_showing_what_differs(tmp_path):
    logbook.claim(tmp_path, CONFIG)
    other = {"seed": 0, "optimizer": {"momentum": 0.5, "name": "sgd"}, "splits": ("test",), "extra": 1}
    with pytest.raises(ValueError, match="belongs to another config") as error:
        logbook.claim(tmp_path, other)
    assert "optimizer.momentum: 0.9 there, 0.5 here" in str(error.value)
    assert "extra: 'nothing' there, 1 here" in str(error.value)
    assert "seed" not in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["momentum"] == 0.9


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        logbook.claim(tmp_path / "file" / "run", CONFIG)


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    logbook.write_json(path, {"a": 1})
    monkeypatch.setattr(logbook.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        logbook.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
