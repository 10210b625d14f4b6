import contextlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from unittest import mock

import jax
import pytest

from benchmarks import faults
from cnn_cases.training import logbook, provenance
from configs import common

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = {"seed": 0, "optimizer": {"momentum": 0.9, "name": "sgd"}, "splits": ("test",)}


def open_log(workdir, config=CONFIG):
    return logbook.Logbook(
        workdir, config, data={"train": [9, 7]}, inputs=b"", num_steps=10, show_progress=False
    )


def begin(workdir):
    """A start that comes to nothing else."""
    with contextlib.closing(open_log(workdir)) as log:
        log.start(0)


def write_rows(workdir, steps, start=0, rows=None):
    """Goes on after step `start`, whose mark is `rows`; returns the mark after the second row."""
    log = open_log(workdir)
    log.start(start, rows)
    for number, step in enumerate(steps, start=1):
        log.write(step, {"running/loss": step / 10})
        if number == 2:
            rows = log.flush()
    log.close()
    return rows


def test_rows_come_back_as_they_were_written(tmp_path):
    write_rows(tmp_path, [1, 2])
    rows = logbook.read_rows(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "running/loss": 0.1}, {"step": 2, "running/loss": 0.2}]


def test_rows_after_the_step_of_the_restart_are_dropped(tmp_path):
    mark = write_rows(tmp_path, [1, 2, 3, 4])
    write_rows(tmp_path, [3], 2, mark)
    assert [row["step"] for row in logbook.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    write_rows(tmp_path, [1])
    assert [row["step"] for row in logbook.read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_a_line_that_was_cut_short_is_no_row(tmp_path):
    write_rows(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [row["step"] for row in logbook.read_rows(path)] == [1]


def test_a_line_in_the_middle_that_is_no_row_is_an_error_with_its_number(tmp_path):
    write_rows(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    for spoiled in (b"#####\n", b"\xff\xfe\n", b"3\n", b"{}\n"):
        path.write_bytes(whole[0] + spoiled + whole[2])
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2: "):
            logbook.read_rows(path)


def test_rows_are_those_of_the_mark_or_refused(tmp_path):
    mark = write_rows(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], b"#" + whole[1:], whole.replace(b"0.2", b"0.1"), None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        log = open_log(tmp_path)
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl is damaged: its rows up to step 2 are not as they were"
        ):
            log.start(2, mark)
        log.close()
        assert damaged is None or path.read_bytes() == damaged
    path.write_bytes(whole[:-5])  # cut short behind the mark
    log = open_log(tmp_path)
    log.start(2, mark)
    log.write(3, {"running/loss": 0.3})
    assert log.flush()["bytes"] == len(whole)
    log.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", ["metrics.jsonl", "tensorboard/events.out.tfevents.0000000001"])
def test_a_kill_at_any_byte_of_what_comes_after_a_checkpoint_changes_no_row_and_no_curve(cut, tmp_path):
    whole = tmp_path / "whole"
    mark = write_rows(whole, [1, 2, 3, 4])
    (events,) = (whole / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001"))  # older than that of the next start
    content = (whole / cut).read_bytes()
    for length in range(len(content) - 60, len(content)):  # within both rows, or the events of both
        killed = tmp_path / "killed"
        shutil.copytree(whole, killed)
        (killed / cut).write_bytes(content[:length])
        write_rows(killed, [3, 4], 2, mark)
        assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes(), length
        assert faults.curves(killed) == faults.curves(whole), length
        shutil.rmtree(killed)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_rows_that_are_written_to_a_file_that_is_gone_are_missed(is_replaced, tmp_path):
    log = open_log(tmp_path)
    log.start(0)
    log.flush()
    (tmp_path / "metrics.jsonl").unlink()
    if is_replaced:
        (tmp_path / "metrics.jsonl").touch()
    log.write(1, {"running/loss": 0.1})
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl was deleted or replaced while this run was writing"
    ):
        log.flush()
    log.close()


def test_a_disk_that_is_full_is_told_with_the_workdir_and_the_log_can_be_closed(tmp_path):
    log = open_log(tmp_path)
    log.start(0)
    log._rows.close()
    log._rows = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")  # every write to it fails
    with pytest.raises(ValueError, match=rf"workdir = {tmp_path} cannot be written: .*No space left"):
        log.write(1, {"running/loss": 0.1})
    log.close()
    open_log(tmp_path).close()


def test_an_event_file_that_cannot_be_written_is_told_too(tmp_path):
    log = open_log(tmp_path)
    log.start(0)
    writer = log._tensorboard._py_recordio_writer
    writer.close()
    writer._writer = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")
    log.write(1, {"running/loss": 0.1})
    with pytest.raises(ValueError, match=rf"workdir = {tmp_path} cannot be written: .*No space left"):
        log.flush()
    log.close()
    with contextlib.suppress(OSError):
        writer.close()


def test_a_log_that_never_started_can_be_closed(tmp_path):
    log = open_log(tmp_path)
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written: .*tensorboard"):
        log.start(0)
    log.close()
    open_log(tmp_path).close()


@pytest.mark.parametrize("content", [b"", b'{"seed": ', b"\xff\xfe", b"3"])
@pytest.mark.parametrize("file", ["config.json", "environment.json"])
def test_a_damaged_file_is_named(file, content, tmp_path):
    begin(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged \(.*\); (restore an intact copy|delete it)"):
        open_log(tmp_path)
    assert (tmp_path / file).read_bytes() == content
    (tmp_path / file).write_bytes(whole)
    begin(tmp_path)  # nor is it still locked


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"status": "finished"}', '{"status": []}'])
def test_a_damaged_result_is_named(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is damaged \(.*\); delete it"):
        logbook.read_result(tmp_path)


def test_a_run_without_its_config_is_nobodys(tmp_path):
    write_rows(tmp_path, [1])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl, but no config\.json"):
        open_log(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_workdir_is_for_one_process_at_a_time(tmp_path):
    log = open_log(tmp_path)
    holder = f"process {os.getpid()} on {platform.node()}"
    for config in (CONFIG, CONFIG | {"seed": 1}):
        with pytest.raises(ValueError, match=f"is in use by {holder}; wait until it ends"):
            open_log(tmp_path, config)
    log.close()
    open_log(tmp_path).close()


def test_pytorch_is_left_alone_where_it_is_installed(tmp_path):
    (tmp_path / "torch.py").write_text("print('imported')")
    program = "from cnn_cases.training import logbook; print('ready'); import torch"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("ready\nimported\n", "")


def test_tensorboard_gets_the_same_figures(tmp_path):
    write_rows(tmp_path, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents")
    expected = {("running/loss", 1): [0.1], ("running/loss", 2): [0.2]}
    assert faults.curves(tmp_path) == {key: pytest.approx(values) for key, values in expected.items()}


def test_the_config_and_every_start_are_noted(tmp_path):
    for _ in range(2):
        begin(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG | {"splits": ["test"]}
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert len(starts) == 2
    assert {"commit", "code", "python", "devices", "versions"} <= starts[0].keys()
    assert starts[0]["data"] == {"train": [9, 7]}
    assert starts[0]["versions"].keys() == set(provenance.PACKAGES)


def test_other_code_at_a_restart_is_told(tmp_path, monkeypatch, caplog):
    for _ in range(2):
        begin(tmp_path)
    assert not caplog.records
    here = provenance.environment()
    other = here | {
        "code": "0123456789ab",
        "commit": "another",
        "cpus": 99,
        "python": "9",
        "matmul_precision": "highest",
        "versions": here["versions"] | {"jax": "9"},
    }
    monkeypatch.setattr(logbook, "environment", lambda _: other)
    begin(tmp_path)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{tmp_path} was last started with other code or packages: code: ")
    assert f"; matmul_precision: {here['matmul_precision']!r} then, 'highest' now; " in message
    assert f"; python: {here['python']!r} then, '9' now; " in message
    assert message.endswith(f"; versions.jax: {here['versions']['jax']!r} then, '9' now")


def test_other_data_are_refused(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "environment.json").read_text()
    with pytest.raises(
        ValueError, match=r"started with other data: \{'train': \[9, 7\]\} then, \{'train': \[9, 8"
    ):
        logbook.Logbook(
            tmp_path,
            CONFIG,
            data={"train": [9, 8]},
            inputs=b"",
            num_steps=10,
            show_progress=False,
        )
    assert (tmp_path / "environment.json").read_text() == before
    starts = json.loads(before)
    del starts[0]["data"]  # as of a run from before it was kept
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    begin(tmp_path)


def test_a_workdir_of_another_config_is_refused_showing_what_differs(tmp_path):
    logbook.claim(tmp_path, CONFIG)
    other = {"seed": 0, "optimizer": {"momentum": 0.5, "name": "sgd"}, "splits": ("test",), "extra": 1}
    with pytest.raises(ValueError, match="belongs to another config") as error:
        logbook.claim(tmp_path, other)
    assert "optimizer.momentum: 0.9 saved, 0.5 given" in str(error.value)
    assert "extra: nothing saved, 1 given" in str(error.value)
    assert "seed" not in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["momentum"] == 0.9


@pytest.mark.parametrize(("there", "here"), [("study", "run"), ("run", "study")])
def test_a_run_has_not_the_workdir_of_a_study_nor_the_other_way_round(there, here, tmp_path):
    configs = {"run": CONFIG, "study": {"base": CONFIG, "grid": (), "seeds": (0,)}}
    logbook.claim(tmp_path, configs[there])
    with pytest.raises(ValueError, match=f"belongs to a {there}; use another workdir for this {here}$"):
        logbook.claim(tmp_path, configs[here])


def test_a_run_goes_on_where_its_data_lie_elsewhere(tmp_path):
    def config(data_dir, workers, **others):
        stream = {"workers": workers, "buffer": 2}
        return {"data": {"data_dir": data_dir, "stream": stream}, "profile_steps": (1, workers)} | others

    logbook.claim(tmp_path, config("/here", 0))
    logbook.claim(tmp_path, config("/there", 8))
    known = json.loads((tmp_path / "config.json").read_text())
    assert known == {"data": config("/there", 8)["data"], "profile_steps": [1, 8]}, "that of the last start"
    with pytest.raises(ValueError, match=r"another config:\n  seed: nothing saved, 1 given\nUse"):
        logbook.claim(tmp_path, config("/nowhere", 8, seed=1))
    assert json.loads((tmp_path / "config.json").read_text()) == known


def test_a_split_that_a_config_lacks_and_one_that_it_leaves_empty_are_the_same(tmp_path):
    config = common.get_config().to_dict()
    lacking = config | {"data": config["data"] | {"splits": {"train": "train", "test": "test"}}}
    empty = config | {
        "data": config["data"] | {"splits": {"train": "train", "validation": "", "test": "test"}}
    }
    logbook.claim(tmp_path / "old", lacking)
    logbook.claim(tmp_path / "old", empty)
    logbook.claim(tmp_path / "new", empty)
    logbook.claim(tmp_path / "new", lacking)
    with pytest.raises(ValueError, match=r"data\.splits\.validation: '' saved, 'validation' given"):
        logbook.claim(tmp_path / "new", config)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        logbook.claim(tmp_path / "file" / "run", CONFIG)


def test_who_watches_may_go_away(tmp_path, monkeypatch):
    log = logbook.Logbook(tmp_path, CONFIG, data=None, inputs=b"", num_steps=10, show_progress=True)
    broken = mock.Mock(spec=sys.stderr)
    broken.write.side_effect = BrokenPipeError
    monkeypatch.setattr(sys, "stderr", broken)
    log.say("step 4/12")
    log.close()
    assert broken.write.called
    monkeypatch.setattr(sys, "stderr", None)
    assert not logbook.is_watched()


def test_a_refused_start_is_not_noted(tmp_path):
    log = open_log(tmp_path)
    with (
        pytest.raises(ValueError, match="its rows up to step 3 are not as they were"),
        contextlib.closing(log),
    ):
        log.start(3, {"bytes": 9, "crc32": 9})
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    with contextlib.closing(open_log(tmp_path)) as log:
        log.start(0)
        log.start(0)  # as where a run goes back
    assert len(logbook.read_environments(tmp_path)) == 1


def test_without_a_terminal_a_line_a_minute_tells_how_far_a_run_is(tmp_path, monkeypatch, capfd):
    now = 1000.0
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now)
    log = logbook.Logbook(tmp_path, CONFIG, data=None, inputs=b"", num_steps=90, show_progress=True)
    with contextlib.closing(log):
        for step in range(10, 90, 10):
            now += 25
            rate = 1234.5 if step < 60 else 0.88
            log.progress(step, {"running/loss": 0.5, "running/error": 0.25}, rate, 3661.4)
    assert capfd.readouterr().err.splitlines() == [
        "step 30/90: loss 0.5000, error 25.00%, images/s 1,234, 1:01:01 left",
        "step 60/90: loss 0.5000, error 25.00%, images/s 0.9, 1:01:01 left",
    ]


def test_a_profile_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    earlier = tmp_path / "profile/plugins/profile/2026_11_27_04_00_00"
    earlier.mkdir(parents=True)
    with contextlib.closing(open_log(tmp_path)) as log:
        log.start_profile()
        stop_trace = jax.profiler.stop_trace

        def fail():
            stop_trace()
            raise RuntimeError("RESOURCE_EXHAUSTED: no space left on device")

        monkeypatch.setattr(jax.profiler, "stop_trace", fail)
        log.stop_profile()
    assert "the profile could not be written: RESOURCE_EXHAUSTED" in caplog.text
    assert list((tmp_path / "profile").glob("plugins/profile/*")) == [earlier]


def test_a_start_that_fails_gives_the_lock_back(tmp_path, monkeypatch):
    monkeypatch.setattr(logbook, "environment", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:  # by a notebook, with all that its frames hold
        open_log(tmp_path)
    monkeypatch.undo()
    open_log(tmp_path).close()
    del kept
