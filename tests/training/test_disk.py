import json
import subprocess
import sys

import pytest

from cnn_cases.training import disk, logbook


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = "import pathlib, sys, time; from cnn_cases.training import disk\n"
    code += "file = disk.lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on"):
            disk.lock(tmp_path)
        process.kill()
    disk.lock(tmp_path).close()


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    disk.write_json(path, {"a": 1})
    monkeypatch.setattr(disk.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        disk.write_json(path, {"a": 2})
    with pytest.raises(ValueError, match=rf"workdir = {tmp_path} cannot be written: disk full"):
        logbook.write_result(tmp_path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path], "no half of it is left"
