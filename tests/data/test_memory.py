import pathlib

import pytest

from cnn_cases.data import memory


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_the_memory_that_it_was_given(name, tmp_path, monkeypatch):
    whole = memory.available()
    version = "" if name == "memory.max" else "memory"
    own = (tmp_path / "groups" / name).parent / "jobs/job_7"
    own.mkdir(parents=True)
    (tmp_path / "own").write_text(f"9:cpu:/elsewhere\n4:{version}:/jobs/job_7\n")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    file = pathlib.PurePath(name).name
    (own / file).write_text("max\n")
    assert memory.available() >= whole
    (own.parent / file).write_text("123456\n")
    assert memory.available() == 123456
