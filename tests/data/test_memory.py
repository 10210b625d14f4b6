import pathlib
from types import SimpleNamespace

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


def test_batches_of_workers_have_to_fit_into_shared_memory(monkeypatch):
    def limit(blocks):
        monkeypatch.setattr(memory.os, "statvfs", lambda _: SimpleNamespace(f_blocks=blocks, f_frsize=4096))

    limit(2**14)  # 64 MiB, as in a container of Docker
    memory.check_shared(2**10, (128, 128, 4), "data.stream.workers")
    with pytest.raises(ValueError, match=r"/dev/shm has 67.1 MB; .* or change data.stream.workers"):
        memory.check_shared(2**10 + 1, (128, 128, 4), "data.stream.workers")
    limit(0)  # no limit
    memory.check_shared(2**30, (128, 128, 4), "data.stream.workers")
