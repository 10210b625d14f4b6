import errno
import importlib.util
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from cnn_cases.data import decode, feeds, prepare, sources
from tests.conftest import tiny_config
from tests.data import photos


def test_slices_of_a_split_are_its_parts(data_dir):
    whole, labels, _ = sources.load_split("digits", "train", data_dir)
    head, head_labels, _ = sources.load_split("digits", "train[:90%]", data_dir)
    tail, _, _ = sources.load_split("digits", "train[90%:]", data_dir)
    np.testing.assert_array_equal(np.concatenate([head, tail]), whole)
    np.testing.assert_array_equal(head_labels, labels[: len(head)])


def test_images_are_resized_and_keep_their_range(data_dir):
    small, _, _ = sources.load_split("digits", "test", data_dir)
    large, _, _ = sources.load_split("digits", "test", data_dir, image_size=32)
    assert (large.shape, large.dtype) == ((355, 32, 32, 1), np.uint8)
    assert abs(float(large.mean()) - float(small.mean())) < 2


def test_a_border_of_zeros_is_added_on_every_side(data_dir):
    small, _, _ = sources.load_split("digits", "test", data_dir)
    framed, _, _ = sources.load_split("digits", "test", data_dir, border=2)
    assert framed.shape == (355, 12, 12, 1)
    np.testing.assert_array_equal(framed[:, 2:-2, 2:-2], small)
    assert framed.sum() == small.sum()


def test_an_unknown_set_is_refused():
    with pytest.raises(
        ValueError, match=r"'cifr10' is no TFDS data set, nor .* in data.data_dir = .* known are digits"
    ):
        sources.load_split("cifr10", "train")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_the_memory_that_it_was_given(name, tmp_path, monkeypatch):
    whole = sources._memory()
    version = "" if name == "memory.max" else "memory"
    own = (tmp_path / "groups" / name).parent / "jobs/job_7"
    own.mkdir(parents=True)
    (tmp_path / "own").write_text(f"9:cpu:/elsewhere\n4:{version}:/jobs/job_7\n")
    monkeypatch.setattr(sources, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(sources, "GROUPS", tmp_path / "groups")
    file = pathlib.PurePath(name).name
    (own / file).write_text("max\n")
    assert sources._memory() >= whole
    (own.parent / file).write_text("123456\n")
    assert sources._memory() == 123456


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    builder = sources.make_builder("digits", "~/sets")
    assert pathlib.Path(builder.data_path).is_relative_to(tmp_path / "sets")


def test_a_bucket_is_no_directory():
    with pytest.raises(
        ValueError, match=r"data.data_dir = 'gs://bucket/tfds' must be a directory, which a bucket"
    ):
        sources.load_split("digits", "train", "gs://bucket/tfds")


def test_a_set_that_is_not_prepared_is_refused_without_a_try_at_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", pytest.fail)
    with pytest.raises(ValueError, match="not prepared") as error:
        sources.load_split("mnist", "train", str(tmp_path))
    assert f"{tmp_path}/mnist" in str(error.value)
    assert f"`make data DATASET=mnist DATA_DIR={tmp_path}`" in str(error.value)


def test_an_unknown_split_is_refused_with_the_known_ones(data_dir):
    with pytest.raises(ValueError, match=r"split 'tset' of 'digits'.*train, validation, test"):
        sources.load_split("digits", "tset", data_dir)


@pytest.mark.parametrize("sizes", [{"image_size": 8192}, {"border": 8192}])
def test_images_that_no_memory_holds_are_refused(sizes, data_dir, monkeypatch):
    monkeypatch.setattr(sources.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2**21)
    with pytest.raises(ValueError, match=r"1,257 images .* 8.6 GB of memory; change data.image_size"):
        sources.check_resident("digits", {"train": "train"}, data_dir, **sizes)


def test_splits_have_to_be_in_memory_together(data_dir, monkeypatch):
    config = tiny_config(data_dir)
    monkeypatch.setattr(sources, "_memory", lambda: 2 * 1_500 * 16 * 16)
    config.data.splits = {"train": "train"}
    feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)
    config.data.splits = {"train": "train", "test": "test"}
    with pytest.raises(ValueError, match=r"1,612 images of 16x16x1, held twice, take 0.0 GB"):
        feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)


@pytest.mark.parametrize("name", ["digits", "digits:1.0.0"])
def test_the_digits_are_prepared_on_first_use(name, tmp_path):
    images, _, _ = sources.load_split(name, "test", str(tmp_path))
    assert len(images) == 355
    assert (tmp_path / "digits" / "1.0.0" / "dataset_info.json").exists()


def test_preparing_and_reading_load_no_tensorflow(tmp_path):
    code = (
        "import sys\n"
        "from cnn_cases.data import sources\n"
        f"sources.prepare('digits', {str(tmp_path)!r})\n"
        f"images, _, _ = sources.load_split('digits', 'train', {str(tmp_path)!r})\n"
        "print(len(images), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["1257", "False"]


def test_the_preparation_command_says_where_the_set_lies(tmp_path, capsys):
    prepare.main(["digits", f"--data_dir={tmp_path}"])
    prepare.main(["digits", f"--data_dir={tmp_path}"])  # a second time it finds the set prepared
    assert capsys.readouterr().out.count(f"digits is prepared in {tmp_path}") == 2


def test_preparing_needs_nothing_but_its_own_requirements():
    """`make data` installs requirements-data.txt alone."""
    missing = ("cv2", "simplejpeg", "grain", "jax", "flax", "optax", "orbax", "ml_collections", "sklearn")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import cnn_cases.data.prepare"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_preparation_command_ends_with_one_message(capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["cifr10"])
    assert end.value.code == 2
    assert re.match(r"prepare: error: .*'cifr10' is no TFDS data set", capsys.readouterr().err)


@pytest.fixture
def tensorflow(monkeypatch):
    """Makes it seem installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "tensorflow" or find_spec(name, *rest)
    )


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize(
    ("raised", "becomes", "message"),
    [
        (ConnectionError("no route to host"), ConnectionError, "'mnist' could not be prepared in .*no route"),
        (OSError("disk full"), ConnectionError, "'mnist' could not be prepared in .*disk full"),
        (DownloadError("404"), ConnectionError, "'mnist' could not be prepared in .*DownloadError: 404"),
        (
            AssertionError("Manual directory x"),
            ValueError,
            "'mnist' cannot be prepared in .*Manual directory x",
        ),
    ],
)
def test_a_failed_preparation_names_the_set_and_the_directory(
    raised, becomes, message, tmp_path, monkeypatch
):
    def fail(_):
        raise raised

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(becomes, match=message) as error:
        sources.prepare("mnist", str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_a_set_that_another_process_prepares_meanwhile_will_do(tmp_path, monkeypatch):
    prepare_it = tfds.core.DatasetBuilder.download_and_prepare

    def come_second(builder):
        prepare_it(builder)
        raise OSError("Directory not empty")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", come_second)
    assert sources.prepare("digits", str(tmp_path)).is_prepared()


def test_a_missing_tensorflow_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", pytest.fail)
    with pytest.raises(ValueError, match=r"make data DATASET=mnist.*pip install tensorflow-cpu"):
        sources.prepare("mnist", str(tmp_path))


def test_an_interrupted_preparation_has_a_message_and_an_exit_code(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "prepare", interrupt)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["mnist"])
    assert stop.value.code == 130
    assert "mnist is not prepared; the same command goes on with it" in capsys.readouterr().err


@pytest.fixture
def prepared(tmp_path):
    """A directory of its own with the digits, read once."""
    sources.load_split("digits", "train", str(tmp_path))
    sources.load_split.cache_clear()
    return tmp_path


def test_images_are_decoded_once(prepared, monkeypatch):
    again, labels, _ = sources.load_split("digits", "test", str(prepared))
    sources.load_split.cache_clear()
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", pytest.fail)
    images, same, _ = sources.load_split("digits", "test", str(prepared))
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)


def test_a_damaged_copy_of_the_decoded_images_is_made_again(prepared):
    whole, _, _ = sources.load_split("digits", "train", str(prepared))
    (copy,) = prepared.rglob("train-image.npy")
    for damage in (copy.read_bytes()[:1000], b""):
        copy.write_bytes(damage)
        sources.load_split.cache_clear()
        again, _, _ = sources.load_split("digits", "train", str(prepared))
        np.testing.assert_array_equal(again, whole)


def test_a_directory_that_cannot_be_written_costs_only_the_copy(prepared, caplog):
    shutil.rmtree(next(prepared.rglob("decoded")))
    (prepared / "digits" / "1.0.0" / "decoded").write_text("a file where the directory would be")
    images, _, _ = sources.load_split("digits", "test", str(prepared))
    assert len(images) == 355
    assert "decoded/test-image.npy is not kept for the next start" in caplog.text


def test_a_full_disk_costs_only_the_copy_and_leaves_no_part_of_it(prepared, monkeypatch, caplog):
    shutil.rmtree(next(prepared.rglob("decoded")))

    def full(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    images, _, _ = sources.load_split("digits", "test", str(prepared))
    assert len(images) == 355
    assert "decoded/test-image.npy is not kept for the next start: " in caplog.text
    assert list(next(prepared.rglob("decoded")).iterdir()) == []


class Bomb:
    """What leaves a file where it is unpickled."""

    def __init__(self, trace):
        self._trace = str(trace)

    def __reduce__(self):
        return (open, (self._trace, "w"))


def test_a_pickle_among_the_decoded_images_is_not_read(prepared, tmp_path):
    whole, _, _ = sources.load_split("digits", "train", str(prepared))
    trace = tmp_path / "trace"
    planted = np.array([Bomb(trace)], dtype=object)
    (copy,) = prepared.rglob("train-image.npy")
    for plant in (
        lambda: np.save(copy, planted, allow_pickle=True),
        lambda: copy.write_bytes(pickle.dumps(Bomb(trace))),
    ):
        plant()
        sources.load_split.cache_clear()
        again, _, _ = sources.load_split("digits", "train", str(prepared))
        np.testing.assert_array_equal(again, whole)
        np.savez(copy.with_name("statistics.npz"), allow_pickle=True, mean=planted)
        mended = sources.computed_once("digits", str(prepared), "statistics", lambda: {"mean": np.ones(1)})
        assert mended["mean"] == np.ones(1)
        assert not trace.exists()
    np.save(copy, planted, allow_pickle=True)
    np.load(copy, allow_pickle=True)[0].close()
    assert trace.exists(), "the bomb works"


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "digits/..",
        "digits/../x",
        "huggingface:mnist",
        "name_space:set",
        "digits/data_dir=x",
        "",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_tfds_sees_it(name, monkeypatch):
    monkeypatch.setattr(tfds, "builder", pytest.fail)
    with pytest.raises(ValueError, match=rf"data.name = '{re.escape(name)}' is no name of a TFDS data set"):
        sources.load_split(name, "train")


@pytest.fixture
def strange(prepared):
    """A prepared set of a stranger's: the digits under a name that no code knows. Their directory."""
    directory = prepared / "strange" / "1.0.0"
    shutil.copytree(prepared / "digits" / "1.0.0", directory)
    shutil.rmtree(directory / "decoded")
    for file in directory.glob("digits-*"):
        file.rename(file.with_name(file.name.replace("digits-", "strange-")))
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"name": "strange"}))
    return directory


def test_a_set_without_code_of_its_own_can_be_read(strange, prepared):
    images, _, _ = sources.load_split("strange", "test", str(prepared))
    assert len(images) == 355
    assert (strange / "decoded").exists()


def test_no_module_is_imported_that_a_set_names(strange, prepared, monkeypatch):
    (prepared / "stranger.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(str(prepared))
    features = strange / "features.json"
    ours = "tensorflow_datasets.core.features.class_label_feature"
    assert ours in features.read_text()
    features.write_text(features.read_text().replace(ours, "stranger"))
    with pytest.raises(ValueError, match=r"data\.name = 'strange' .* names the class stranger.ClassLabel"):
        sources.load_split("strange", "test", str(prepared))


def test_no_split_of_a_set_leads_out_of_its_directory(strange, prepared):
    info = json.loads((strange / "dataset_info.json").read_text())
    info["splits"][0]["name"] = "../../x"
    (strange / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"has a split of the name '\.\./\.\./x', which is no word"):
        sources.load_split("strange", "all", str(prepared))


def test_what_was_computed_of_a_set_is_kept_with_it(prepared):
    def compute():
        return {"matrix": np.eye(3), "mean": np.arange(2.0)}

    first = sources.computed_once("digits", str(prepared), "statistics", compute)
    again = sources.computed_once("digits", str(prepared), "statistics", pytest.fail)
    assert first.keys() == again.keys() == {"matrix", "mean"}
    np.testing.assert_array_equal(again["matrix"], np.eye(3))
    (copy,) = prepared.rglob("statistics.npz")
    whole = copy.read_bytes()
    for damage in (whole[:100], b"", whole[:60] + b"damage" + whole[66:]):
        copy.write_bytes(damage)
        mended = sources.computed_once("digits", str(prepared), "statistics", compute)
        np.testing.assert_array_equal(mended["matrix"], np.eye(3))
        assert copy.read_bytes() == whole


def test_a_prepared_set_with_a_missing_file_is_named(prepared):
    shutil.rmtree(next(prepared.rglob("decoded")))
    next(prepared.rglob("*train.array_record*")).unlink()
    with pytest.raises(ValueError, match=r"1\.0\.0 is damaged .*; delete it and prepare 'digits' again"):
        sources.load_split("digits", "train", str(prepared))


def test_parts_of_several_splits_are_joined_in_order(data_dir):
    both, labels, _ = sources.load_split("digits", "test[5:]+train[:3]", data_dir)
    test, _, _ = sources.load_split("digits", "test", data_dir)
    train, train_labels, _ = sources.load_split("digits", "train", data_dir)
    np.testing.assert_array_equal(both, np.concatenate([test[5:], train[:3]]))
    np.testing.assert_array_equal(labels[-3:], train_labels[:3])


@pytest.mark.parametrize("split", ["test[:0]", "test[:0%]", "test[355:]", "train[5:5]+test[:0]"])
def test_an_empty_split_is_refused(split, data_dir):
    with pytest.raises(ValueError, match=rf"data\.splits\.test = '{re.escape(split)}' .* has no examples"):
        sources.check_disjoint("digits", {"train": "train", "test": split}, data_dir)
    with pytest.raises(ValueError, match="has no examples"):
        sources.load_split("digits", split, data_dir)


def test_decoded_copies_are_as_readable_as_the_set(prepared):
    shutil.rmtree(next(prepared.rglob("decoded")))
    before = os.umask(0o022)
    try:
        sources.load_split("digits", "train", str(prepared))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in prepared.rglob("decoded/*")} == {0o644}


def test_training_on_what_is_held_out_is_refused(data_dir):
    sources.check_disjoint("digits", {"train": "train[:90%]", "validation": "train[90%:]"}, data_dir)
    with pytest.raises(
        ValueError, match=r"data.splits.train = 'train' and data.splits.test = .* share 7 examp"
    ):
        sources.check_disjoint("digits", {"train": "train", "test": "test+train[1250:]"}, data_dir)


def test_to_choose_by_examples_of_the_test_is_refused(data_dir):
    splits = {"train": "train", "validation": "test[:10]", "test": "test"}
    with pytest.raises(ValueError, match=r"data.splits.validation = .* and data.splits.test = .* share 10 e"):
        sources.check_disjoint("digits", splits, data_dir)


def test_pictures_of_all_formats_are_in_memory_as_a_stream_has_them(photos_dir):
    (bad,) = photos.damaged_indices(photos_dir, "test")
    sound = f"test[:{bad}]+test[{bad + 1}:]"
    images, labels, _ = sources.load_split("tiny_photos", sound, photos_dir, image_size=16)
    assert images.shape == (10, 16, 16, 3)
    records, _ = sources.open_split("tiny_photos", sound, photos_dir)
    for image, label, record in zip(images, labels, records, strict=True):
        np.testing.assert_array_equal(image, sources.resize(decode.decode(record["image"], 3), 16, 16))
        assert label == record["label"]


def test_pictures_that_cannot_be_in_memory_are_named(photos_dir):
    (bad,) = photos.damaged_indices(photos_dir, "test")
    with pytest.raises(ValueError, match=rf"example {bad} of 'tiny_photos', 'test', is damaged: .*'stream'"):
        sources.load_split("tiny_photos", "test", photos_dir, image_size=16)
    with pytest.raises(
        ValueError, match=r"the images of 'tiny_photos' differ in size \(\d+x\d+x3, \d+x\d+x3\); "
    ):
        sources.load_split("tiny_photos", f"test[{bad + 1}:]+test[:{bad}]", photos_dir)


def test_photographs_are_resized_as_they_are_read(photos_dir, monkeypatch):
    """Or a set would be in memory at its full size first."""
    sizes, calls, resize = [], [], sources.resize
    monkeypatch.setattr(sources, "resize", lambda *arguments: sizes.append(len(calls)) or resize(*arguments))
    monkeypatch.setattr(decode, "decode", lambda *_: calls.append(1) or np.zeros((20, 24, 3), np.uint8))
    sources._decode(sources.open_prepared("tiny_photos", photos_dir), "train", 16)
    assert sizes == list(range(1, photos.SIZES["train"] + 1))
