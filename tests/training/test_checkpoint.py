import errno
import json
import logging
import os
import pathlib
import pickle
import random
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_cases.training import checkpoint
from cnn_cases.training.checkpoint import Checkpoints
from tests.conftest import Bomb


def state_of(step):
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "params": {"kernel": rng.normal(size=(300, 7)).astype(np.float32), "bias": np.zeros(7, np.float32)},
    }


def save(directory, steps, keep_last=2, errors=None):
    checkpoints = Checkpoints(directory, keep_last)
    for step in steps:
        checkpoints.save(step, state_of(step), {"window": [step, 0.1]}, (errors or {}).get(step))
    checkpoints.close()


def restore(directory):
    checkpoints = Checkpoints(directory, 2)
    try:
        return checkpoints.restore(state_of(0))
    finally:
        checkpoints.close()


def names(directory):
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def assert_is(restored, step):
    assert (restored[0], restored[2]) == (step, {"window": [step, 0.1]})
    expected = state_of(step)
    np.testing.assert_array_equal(restored[1]["params"]["kernel"], expected["params"]["kernel"])
    assert restored[1]["step"] == step


def test_the_newest_comes_back_as_it_was(tmp_path):
    save(tmp_path / "checkpoints", [1, 2])
    assert_is(restore(tmp_path / "checkpoints"), 2)


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_one_after_it(
    which, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "SECONDS_TO_DELETE", 0)
    save(tmp_path / "checkpoints", [1], errors={1: 0.2})
    read, like = checkpoint.read, state_of(0)

    def read_late(directory, step, like):
        if step == 1:  # the run goes on
            save(directory, [2], keep_last=1, errors={2: 0.1})
        return read(directory, step, like)

    monkeypatch.setattr(checkpoint, "read", read_late)
    step, state = checkpoint.find_and_read(tmp_path / "checkpoints", which, like)
    assert (step, state["step"]) == (2, 2)
    shutil.rmtree(tmp_path / "checkpoints/2/state")
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* cannot be read"):
        checkpoint.find_and_read(tmp_path / "checkpoints", which, like)


def test_all_of_a_checkpoint_is_on_the_disk_when_it_is_committed(tmp_path, monkeypatch):
    synced = set()
    fsync = os.fsync

    def note(descriptor):
        synced.add(pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", note)
    save(tmp_path / "checkpoints", [1])
    assert tmp_path / "checkpoints" in synced
    (draft,) = {path for path in synced if path.match("1.orbax-checkpoint-tmp*")}
    files = {path.relative_to(draft) for path in synced if path.is_relative_to(draft)}
    whole = json.loads((tmp_path / "checkpoints/1" / checkpoint.CHECKSUMS).read_text())
    assert {*map(pathlib.Path, whole), pathlib.Path(checkpoint.CHECKSUMS)} <= files


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    save(tmp_path / "run", [1, 2, 3, 4, 5, 6], errors={1: 0.5, 2: 0.1, 3: 0.3, 5: 0.4})
    assert names(tmp_path / "run") == ["2", "5", "6"]


def test_the_best_is_kept_by_those_who_come_later(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, [1, 2, 3], keep_last=1, errors={1: 0.1, 2: 0.5, 3: 0.5})
    save(directory, [4, 5], keep_last=1, errors={4: 0.3})
    assert names(directory) == ["1", "5"]
    save(directory, [6], keep_last=1, errors={6: 0.05})
    assert names(directory) == ["6"]


def test_an_error_of_zero_is_the_best_that_there_can_be(tmp_path):
    save(tmp_path / "run", [1, 2, 3], keep_last=1, errors={1: 0.1, 2: 0.0, 3: 0.2})
    assert names(tmp_path / "run") == ["2", "3"]
    assert checkpoint.find(tmp_path / "run", "best") == 2


def test_an_error_that_is_noted_later_counts_as_one_that_was_saved(tmp_path):
    directory = tmp_path / "run"
    save(directory, [1, 2], errors={1: 0.3})
    checkpoints = Checkpoints(directory, 2)
    checkpoints.note_error(2, 0.1)
    checkpoints.close()
    assert checkpoint.find(directory, "best") == 2
    save(directory, [3, 4], keep_last=1, errors={4: 0.2})
    assert names(directory) == ["2", "4"]


def test_what_else_lies_there_does_no_harm(tmp_path):
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / ".DS_Store").write_text("a file of somebody else's")
    save(directory, [1])
    assert_is(restore(directory), 1)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    save(directory / "checkpoints", [4, 8])
    return directory


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink, flip_a_bit])
def test_any_damaged_file_makes_the_checkpoint_before_the_newest(damage, two_checkpoints, tmp_path, caplog):
    files = [path for path in (two_checkpoints / "checkpoints" / "8").rglob("*") if path.is_file()]
    # Orbax's notes to itself hold no values and are not needed.
    files = [path for path in files if path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")]
    assert len(files) > 5
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(two_checkpoints, copy)
        damage(copy / file.relative_to(two_checkpoints))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cnn_cases"):
            assert_is(restore(copy / "checkpoints"), 4)
        assert "checkpoint 8 is damaged" in caplog.text
        assert "resuming from step 4" in caplog.text
        assert names(copy / "damaged") == ["8"], "the damaged one is set aside, not deleted"
        save(copy / "checkpoints", [8])
        assert_is(restore(copy / "checkpoints"), 8)


def test_a_half_written_checkpoint_is_not_taken(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "8"
    half = tmp_path / "checkpoints" / "12"
    shutil.copytree(newest / "extra", half / "extra")
    (half / "state").mkdir()
    assert_is(restore(tmp_path / "checkpoints"), 8)
    newest.rename(tmp_path / "checkpoints" / "16.orbax-checkpoint-tmp")
    assert_is(restore(tmp_path / "checkpoints"), 4)


def test_when_all_are_damaged_nothing_starts_anew(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("manifest.ocdbt"):
        truncate(file)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: step 8: .*; step 4: "):
        restore(tmp_path / "checkpoints")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kernel": np.zeros((300, 7))}, "params/bias is 7 in the checkpoint but missing now"),
        (
            {"kernel": np.zeros((300, 8)), "bias": np.zeros(7)},
            "params/kernel is 300x7 in the checkpoint but 300x8 now",
        ),
    ],
)
def test_a_whole_one_of_another_network_is_refused_and_stays(params, message, two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    with pytest.raises(checkpoint.OtherStateError, match=f"checkpoint 8 in .*: {message}\\. Nothing was"):
        checkpoints.restore(state_of(0) | {"params": params})
    checkpoints.close()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_an_optimizer_of_other_parts_is_no_damage(two_checkpoints, tmp_path):
    """Orbax notes no part without numbers, as optax's clipping is one."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    like = state_of(0) | {"opt_state": (optax.EmptyState(),)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    for restored in (checkpoints.restore, lambda like: checkpoint.read(tmp_path / "checkpoints", 8, like)):
        with pytest.raises(
            checkpoint.OtherStateError, match=r"point 8 .* optimizer state has another structure"
        ):
            restored(like)
    checkpoints.close()
    assert names(tmp_path / "checkpoints") == ["4", "8"]


def test_what_the_system_refuses_says_nothing_against_a_checkpoint(two_checkpoints, monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", fail)
    for like in (None, state_of(0)):
        with pytest.raises(ValueError, match=r"cannot be read: .*Too many open files") as raised:
            checkpoint.read(two_checkpoints / "checkpoints", 8, like)
        assert not isinstance(raised.value, checkpoint.OtherStateError)
    monkeypatch.setattr(checkpoint, "_verify", fail)
    with pytest.raises(OSError, match="Too many open files"):
        restore(two_checkpoints / "checkpoints")
    assert names(two_checkpoints / "checkpoints") == ["4", "8"]


@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink, flip_a_bit])
def test_notes_that_have_no_checksum_hold_no_values(damage, two_checkpoints, tmp_path):
    newest = two_checkpoints / "checkpoints" / "8"
    notes = [
        path for path in newest.rglob("*") if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
    ]
    assert len(notes) == 4
    for number, note in enumerate(notes):
        copy = tmp_path / str(number)
        shutil.copytree(two_checkpoints, copy)
        damage(copy / note.relative_to(two_checkpoints))
        assert_is(restore(copy / "checkpoints"), 8)


def test_checkpoints_that_were_deleted_are_missed(two_checkpoints, tmp_path, caplog):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    directory = tmp_path / "checkpoints"
    shutil.rmtree(directory / "8")
    with caplog.at_level(logging.WARNING, "cnn_cases"):
        assert_is(restore(directory), 4)
    assert "checkpoint 8 is missing; resuming from step 4" in caplog.text
    caplog.clear()
    assert_is(restore(directory), 4)
    assert not caplog.text, "told once"
    for gone in (directory / "4", directory):
        shutil.rmtree(gone)
        with pytest.raises(ValueError, match=r"no checkpoint is left in .*, though one of step 4 was saved"):
            restore(directory)


def test_a_note_of_the_newest_that_is_no_number_is_an_error(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "newest_checkpoint").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"newest_checkpoint is damaged: .* write that step into it"):
        restore(tmp_path / "checkpoints")
    (tmp_path / "newest_checkpoint").unlink()  # as of a run from before there was one
    assert_is(restore(tmp_path / "checkpoints"), 8)
    assert (tmp_path / "newest_checkpoint").read_text() == "8\n"


@pytest.mark.parametrize("is_closing", [True, False])
def test_a_save_that_failed_is_told_in_one_line_at_the_next_chance(is_closing, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    save(directory, [1])
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    checkpoints = Checkpoints(directory, 2)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_checksums", full)  # which is called in the thread that saves
    checkpoints.save(2, state_of(2), {})
    message = (
        r"step 2 could not be saved in .* \(.*No space left on device\); "
        "the latest checkpoint is that of step 1; start again"
    )
    with pytest.raises(OSError, match=message) as caught:
        checkpoints.close() if is_closing else checkpoints.save(3, state_of(3), {})
    assert "\n" not in str(caught.value)
    checkpoints.close()
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert_is(restore(directory), 1)


def test_of_tensorstores_words_the_systems_are_told():
    error = ValueError("RESOURCE_EXHAUSTED: Error writing [spec={...}] [os_error_code='28']")
    assert checkpoint._reason(error) == "No space left on device"
    assert checkpoint._reason(ValueError("else\nmore")) == "ValueError: else"


def test_nothing_in_a_checkpoint_is_unpickled(two_checkpoints, tmp_path):
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb).close()
    assert trace.exists(), "the bomb works"
    trace.unlink()
    files = [path for path in (two_checkpoints / "checkpoints" / "8").rglob("*") if path.is_file()]
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(two_checkpoints, copy)
        planted, newest = copy / file.relative_to(two_checkpoints), copy / "checkpoints" / "8"
        planted.write_bytes(bomb)
        if planted.name != "checksums.json":  # a stranger's checksums are right
            sums = checkpoint._checksums(newest)
            sums.pop("checksums.json", None)
            (newest / "checksums.json").write_text(json.dumps(sums))
        restore(copy / "checkpoints")
        assert not trace.exists(), file
