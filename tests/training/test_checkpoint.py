import logging
import pathlib
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.training.checkpoint import Checkpoints


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


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4, 5, 6], errors={1: 0.5, 2: 0.1, 3: 0.3, 5: 0.4})
    assert names(tmp_path) == ["2", "5", "6"]


def test_the_best_is_kept_by_those_who_come_later(tmp_path):
    save(tmp_path, [1, 2, 3], keep_last=1, errors={1: 0.1, 2: 0.5, 3: 0.5})
    save(tmp_path, [4, 5], keep_last=1, errors={4: 0.3})
    assert names(tmp_path) == ["1", "5"]
    save(tmp_path, [6], keep_last=1, errors={6: 0.05})
    assert names(tmp_path) == ["6"]


def test_what_else_lies_there_does_no_harm(tmp_path):
    tmp_path.joinpath(".DS_Store").write_text("a file of somebody else's")
    save(tmp_path, [1])
    assert_is(restore(tmp_path), 1)


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
        assert "going on from step 4" in caplog.text
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


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint.keep_last = 0 must be 1 or more"):
        Checkpoints(tmp_path, 0)
