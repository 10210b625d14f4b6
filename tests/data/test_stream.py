import functools
import itertools
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from types import SimpleNamespace
from unittest import mock

import grain
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from cnn_cases.data import feeds, sources, splits, stream
from configs import common
from tests.data import photos

ROOT = pathlib.Path(__file__).parent.parent.parent
CLASSES = tfds.features.ClassLabel(num_classes=10)


@pytest.fixture
def feed_of(photos_dir):
    """Makes a feed of the pictures: `feed_of(**{"key": value})`, the keys being those of config.data."""

    def make(batch_size=6, eval_batch_size=4, process=(0, 1), **settings):
        config = common.get_config().data
        defaults = {
            "name": "tiny_photos",
            "data_dir": photos_dir,
            "feed": "stream",
            "image_size": 16,
            "normalization": "none",
            "crop.name": "area",
            "crop.eval_shorter_side": 18,
            "stream.max_damaged": 0.2,
        }
        config.splits = {"train": "train", "test": "test"}
        config.update_from_flattened_dict(defaults | settings)
        sizes = dict(batch_size=batch_size, eval_batch_size=eval_batch_size)
        return feeds.make_feed(**config, **sizes, process_index=process[0], process_count=process[1])

    return make


def first_batches(feed, count, seed=0, first_step=0):
    return list(itertools.islice(feed.train_batches(seed, first_step), count))


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_stream_of_whole_images_is_the_resident_feed(feed_of, data_dir):
    settings = {"name": "digits", "data_dir": data_dir, "image_size": 8, "crop.name": "squeeze", "border": 1}
    resident, streamed = (feed_of(feed=feed, **settings) for feed in ("resident", "stream"))
    assert streamed.image_shape == resident.image_shape == (10, 10, 1)
    assert streamed.num_classes == resident.num_classes
    for step in (0, 300):
        np.testing.assert_array_equal(
            streamed.training_examples(1, step), resident.training_examples(1, step)
        )
    key = jax.random.key(0)
    for ours, theirs in zip(first_batches(streamed, 3), first_batches(resident, 3), strict=True):
        assert_equal(streamed.prepare({}, ours, key), resident.prepare(resident.arrays, theirs, key))
        np.testing.assert_array_equal(ours["position"], theirs["position"])
    for ours, theirs in zip(streamed.eval_batches("test"), resident.eval_batches("test"), strict=True):
        np.testing.assert_array_equal(ours["mask"], theirs["mask"])
        real = ours["mask"] == 1
        image, label = resident.prepare(resident.arrays, theirs, None)
        assert_equal([leaf[real] for leaf in streamed.prepare({}, ours, None)], [image[real], label[real]])


def test_a_batch_is_a_function_of_seed_and_step(feed_of):
    unbroken = first_batches(feed_of(), 10)
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in unbroken[0].items()}
    assert shapes == {
        "image": ((6, 16, 16, 3), np.uint8),
        "label": ((6,), np.int32),
        "position": ((6,), np.int32),
    }
    for first_step in (0, 3, 9):
        (batch,) = first_batches(feed_of(**{"stream.buffer": 1}), 1, first_step=first_step)
        assert_equal(batch, unbroken[first_step])
    (other,) = first_batches(feed_of(), 1, seed=1)
    assert not np.array_equal(other["image"], unbroken[0]["image"])


def test_an_image_is_cropped_anew_in_every_epoch(feed_of):
    batches = first_batches(feed_of(batch_size=24), 2)
    whole = first_batches(feed_of(batch_size=24, **{"crop.name": "squeeze"}), 2)

    def pictures(batches):
        return [{image.tobytes() for image in batch["image"]} for batch in batches]

    assert set.intersection(*pictures(whole)) == set.union(*pictures(whole))
    assert not set.intersection(*pictures(batches))


def test_every_seed_step_and_position_crops_one_picture_in_another_way():
    crop = common.get_config().data.crop
    crop.name = "area"
    records = [{"image": photos.encoded(0, "PNG"), "label": 0}] * 6
    recipe = stream.Recipe(records, channels=3, image_size=16, border=0, crop=dict(**crop), max_damaged=0)
    settings = dict(recipe=recipe, batch_size=6, position=np.arange(6))
    batches = [stream.training_batch(step, seed=seed, **settings) for seed in (0, 1) for step in (0, 1, 2)]
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 2 * 3 * 6


def test_processes_share_every_batch_in_contiguous_parts(feed_of):
    whole, parts = feed_of(), [feed_of(process=(index, 2)) for index in range(2)]

    def joined(batches):
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)

    for batch, *shares in zip(*(first_batches(feed, 5) for feed in (whole, *parts)), strict=True):
        assert len(shares[0]["label"]) == 3
        assert_equal(joined(shares), batch)
    for batch, *shares in zip(*(feed.eval_batches("test") for feed in (whole, *parts)), strict=True):
        assert_equal(joined(shares), batch)
    labels = [[label for _, label in feed.examples("test")] for feed in (whole, *parts)]
    assert sorted(labels[0]) == sorted(labels[1] + labels[2])


@pytest.mark.parametrize("eval_batch_size", [1, 4, 11, 30])
def test_every_sound_evaluation_example_counts_exactly_once(eval_batch_size, feed_of):
    feed = feed_of(eval_batch_size=eval_batch_size)
    batches = list(feed.eval_batches("test"))
    assert {len(batch["mask"]) for batch in batches} == {eval_batch_size}
    labels = np.concatenate([batch["label"][batch["mask"] == 1] for batch in batches])
    assert labels.tolist() == [label for _, label in feed.examples("test")]
    assert len(labels) == 10


def test_examples_are_the_pictures_at_their_own_sizes(feed_of, photos_dir):
    damaged = photos.damaged_indices(photos_dir, "train")
    sound = [index for index in range(24) if index not in damaged]
    for index, (image, label) in zip(sound, feed_of().examples("train"), strict=True):
        number = photos.file_number(photos_dir, "train", index)
        picture = np.asarray(photos.picture(number, "L" if number == 2 else "RGB").convert("RGB"), np.int32)
        assert image.shape == picture.shape
        assert np.abs(image - picture).mean() < 10
        assert label == number % 4


def test_the_next_sound_record_of_the_order_takes_a_damaged_ones_place(feed_of, photos_dir):
    feed = feed_of(batch_size=24)
    (batch,) = first_batches(feed, 1)
    order = stream.order.examples_at(0, np.arange(30), 24)[:24].tolist()
    following = stream.order.examples_at(0, np.arange(30), 24).tolist()
    damaged = photos.damaged_indices(photos_dir, "train")
    expected = [next(one for one in following[place:] if one not in damaged) for place, _ in enumerate(order)]
    labels = [photos.file_number(photos_dir, "train", index) % 4 for index in expected]
    assert batch["label"].tolist() == labels
    assert batch["image"].max(axis=(1, 2, 3)).min() > 0


def test_damaged_records_are_named_once_each(feed_of, photos_dir, caplog):
    with caplog.at_level(logging.WARNING, "cnn_cases"):
        feed = feed_of()
        first_batches(feed, 8)
        for _ in range(2):
            list(feed.eval_batches("test"))
        list(feed.examples("test"))
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    number = functools.partial(photos.file_number, photos_dir)
    expected = [
        f"data.splits.{split}: skipped record {index} ({split}_{number(split, index)}.jpg): "
        for split in ("train", "test")
        for index in photos.damaged_indices(photos_dir, split)
    ]
    assert [any(map(message.startswith, expected)) for message in messages] == [True] * 3
    assert "runcated" in messages[0]


def test_more_damaged_records_than_allowed_end_the_run(feed_of, photos_dir):
    first, second = photos.damaged_indices(photos_dir, "train")
    with pytest.raises(ValueError, match=r"data.stream.max_damaged allows 0 damaged of the 24 records"):
        feed_of(**{"stream.max_damaged": 0.0})
    with pytest.raises(ValueError, match=f"allows 1 .*found 2: record {first} .*; record {second} .*jpg"):
        feed_of(**{"stream.max_damaged": 0.05})
    feed = feed_of(**{"stream.max_damaged": 0.09})
    with pytest.raises(ValueError, match=r"of the 11 records of data.splits.test; found 1"):
        list(feed.eval_batches("test"))


def test_a_record_without_a_label_is_a_damaged_one(feed_of, caplog):
    feed = feed_of(**{"stream.max_damaged": 0.13})
    damaged = set(feed._damaged["train"])
    records = feed._recipes["train"].records
    other = next(index for index in range(len(records)) if index not in damaged)
    without = [record | {"label": -1} if index == other else record for index, record in enumerate(records)]
    feed._recipes["train"] = feed._recipes["train"]._replace(records=without)
    batches = first_batches(feed, 8)
    assert np.concatenate([batch["label"] for batch in batches]).min() >= 0
    assert re.search(rf"skipped record {other} \(train_\d+\.jpg\): it has no label", caplog.text)
    assert len(feed._damaged["train"]) == 3


def test_a_set_of_damaged_records_alone_ends_the_search(feed_of, monkeypatch):
    feed = feed_of(**{"stream.max_damaged": 0.99})

    def fail(_, index):
        raise ValueError(f"record {index} is gone")

    monkeypatch.setattr(stream, "read", fail)
    with pytest.raises(ValueError, match=r"allows 23 .*found 24: record 0.*; record 4.*; \.\.\.$"):
        first_batches(feed, 1)


def test_a_file_with_wrong_bytes_in_it_costs_the_records_there(feed_of, photos_dir, tmp_path):
    shutil.copytree(photos_dir, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("tiny_photos/*/*-test.array_record-*")
    data = bytearray(file.read_bytes())
    data[5000:5004] = bytes(byte ^ 0xFF for byte in data[5000:5004])
    file.write_bytes(data)
    feed = feed_of(data_dir=str(tmp_path / "copy"))
    (sound,) = {sum(batch["mask"].sum() for batch in feed.eval_batches("test")) for _ in range(2)}
    assert sound == len(list(feed.examples("test"))) == 9


def test_a_fingerprint_tells_a_set_from_others_and_is_the_same_in_all_processes(
    feed_of, photos_dir, tmp_path
):
    whole = feed_of().fingerprint()
    assert {role: count for role, (count, _) in whole.items()} == {"train": 24, "test": 11}
    assert whole == feed_of(process=(1, 2)).fingerprint()
    part = feed_of(**{"splits.test": "test[1:]"}).fingerprint()
    assert part["train"] == whole["train"]
    assert part["test"][0] == 10
    shutil.copytree(photos_dir, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("tiny_photos/*/*-test.array_record-*")
    data = bytearray(file.read_bytes())
    data[5000:5004] = bytes(byte ^ 0xFF for byte in data[5000:5004])
    file.write_bytes(data)
    spoilt = feed_of(data_dir=str(tmp_path / "copy")).fingerprint()
    assert spoilt["train"] == whole["train"]
    assert spoilt["test"][0] == 11
    assert spoilt["test"] != whole["test"]


def test_a_fingerprint_tells_labels_apart():
    one, other = ([{"image": b"the same", "label": label}] for label in (0, 1))
    assert stream._fingerprint(one) != stream._fingerprint(other)


def test_statistics_are_of_evenly_spaced_images_as_they_are_evaluated(monkeypatch, photos_dir):
    records = splits.open_split("tiny_photos", "train", photos_dir)
    monkeypatch.setattr(stream, "MAX_SAMPLE", 4)
    seen = []

    def make_pixels(image, **_):
        seen.append(image)
        return SimpleNamespace(arrays={})

    crop = common.get_config().data.crop
    crop.name = "area"
    crop.eval_shorter_side = 18
    settings = dict(image_size=16, border=0, crop=dict(**crop), batch_size=2, eval_batch_size=2)
    feed = stream.StreamFeed(
        {"train": records}, make_pixels=make_pixels, workers=0, buffer=1, max_damaged=0.2, **settings
    )
    sample = stream.evaluation_batch(feed._recipes["train"], np.array([0, 7, 15, 23]))
    np.testing.assert_array_equal(seen[0], sample["image"][sample["mask"] == 1])


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(feed_of, monkeypatch):
    monkeypatch.setattr(stream.memory, "shared", lambda: 24 * 6 * 16 * 16 * 3 - 1)
    feed_of(**{"stream.workers": 0})
    with pytest.raises(ValueError, match=r"144 images of 16x16x3 take 0.1 MB of shared memory"):
        feed_of(**{"stream.workers": 4, "stream.buffer": 2})


@pytest.mark.parametrize(("code", "reason"), [(-7, "/dev/shm is full"), (-9, "for lack of memory")])
def test_a_worker_that_the_system_kills_is_explained_in_one_line(code, reason):
    told = rf"a worker of data.stream was killed: .*{reason}"
    with pytest.raises(ChildProcessError, match=told), stream._deaths_explained():
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search ...")


def test_other_errors_of_workers_keep_their_traceback():
    with pytest.raises(RuntimeError, match="exit code 1"), stream._deaths_explained():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code 1. Search ...")


@pytest.mark.parametrize(("workers", "batches"), [(0, 2), (4, 24)])
def test_all_batches_that_are_made_in_advance_have_to_fit_into_memory(workers, batches, feed_of, monkeypatch):
    checked = []
    monkeypatch.setattr(stream.memory, "check", lambda count, *_: checked.append(count))
    feed_of(**{"stream.workers": workers, "stream.buffer": 2})
    assert checked == [batches * 6 + max(workers, 2) * 4 + 24]  # with those of an evaluation, and the sample


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feed": "flow"}, "data.feed = 'flow' is unknown; known: resident, stream"),
        ({"feed": "resident"}, "data.crop.name = 'area' cannot be used with data.feed = 'resident'"),
        ({"crop.name": "zoom"}, "data.crop.name = 'zoom' is unknown"),
        ({"feed": "resident", "crop.name": "zoom"}, "data.crop.name = 'zoom' is unknown"),
        ({"image_size": 0}, "data.image_size = 0 must be 1 or more for data.feed = 'stream'"),
        ({"border": -1}, "data.border = -1 must be between 0 and 8192 pixels"),
        ({"image_size": 10**6}, "data.image_size = 1000000 must be between 0 and 8192 pixels"),
        ({"batch_size": 25}, "batch_size = 25 must be between 1 and the 24 training examples"),
        ({"stream.workers": -1}, "data.stream.workers = -1 must be 0 or more"),
        ({"feed": "resident", "stream.workers": -1}, "data.stream.workers = -1 must be 0 or more"),
        ({"stream.workers": 10**6}, "data.stream.workers = 1000000 must be .* at most 1024"),
        ({"stream.buffer": 0}, "data.stream.buffer = 0 must be 1 or more"),
        ({"stream.buffer": 10**6}, "data.stream.buffer = 1000000 must be .* at most 1024"),
        (
            {"crop.name": "squeeze", "image_size": 8192, "stream.buffer": 1000},
            "of memory; change data.stream.workers",
        ),
        ({"stream.max_damaged": 1.0}, r"data.stream.max_damaged = 1.0 must be in \[0, 1\)"),
        (
            {"splits": {"train": "trian"}},
            "data.splits.train = 'trian' of 'tiny_photos' cannot be read: it has train, test",
        ),
        ({"name": "mnist"}, "data.name = 'mnist' is not prepared in .*make data DATASET=mnist"),
    ],
)
def test_impossible_settings_are_refused(settings, message, feed_of):
    with pytest.raises(ValueError, match=message):
        feed_of(**settings)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": tfds.features.Image()}, "'photos' has no image and label; it has image"),
        ({"label": CLASSES}, "'photos' has no image and label; it has label"),
        (
            {"image": tfds.features.Image(shape=(None, None, 4)), "label": CLASSES},
            "of 'photos' are neither grey nor RGB",
        ),
        (
            {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16), "label": CLASSES},
            "'photos' must have images of one byte per channel, not Image",
        ),
        (
            {"image": tfds.features.Image(), "label": tfds.features.Text()},
            r"'photos' is not a classification data set: its labels are Text.* must be a "
            r"tfds\.features\.ClassLabel",
        ),
        (
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat"])},
            "'photos' has fewer than two classes: cat$",
        ),
        (
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=0)},
            "'photos' has fewer than two classes: none$",
        ),
        ({"image": tfds.features.Image(), "label": CLASSES}, "split 'test' of 'photos' has no labels"),
    ],
)
def test_a_set_without_labels_or_with_other_images_is_refused(features, message, monkeypatch):
    builder = mock.Mock()
    builder.info.features = features
    monkeypatch.setattr(splits, "_parts", lambda *_: [("test", 0, 1)])
    builder.as_data_source.return_value = [{"image": b"", "label": -1}]
    monkeypatch.setattr(sources, "make_builder", lambda *_: builder)
    monkeypatch.setattr(sources, "is_prepared", lambda _: True)
    with pytest.raises(ValueError, match=message):
        splits.open_split("photos", "test")


def test_signals_that_save_a_run_do_not_end_its_workers():
    blocked = stream._first(signal.pthread_sigmask(signal.SIG_BLOCK, ()) for _ in range(1))
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2} <= blocked
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_shared_memory_is_free_before_a_feed_is_closed(monkeypatch):
    """The thread that frees it is slow here; else the end of the process would seldom come before it."""
    array = grain.multiprocessing.SharedMemoryArray
    free = array.close_shm_async

    def slowly(*args):
        time.sleep(0.2)
        free(*args)

    monkeypatch.setattr(array, "close_shm_async", slowly)
    array.enable_async_del()
    left = array((3,))
    name = left.metadata.name
    left.unlink_on_del()
    del left
    stream._wait_until_freed()
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name)


def test_training_is_the_same_with_worker_processes(photos_dir, tmp_path):
    """The whole command line, damaged records included; the one test that starts workers."""
    command = [
        *(sys.executable, "train.py", "--config=configs/lenet5_digits.py", "--config.data.name=tiny_photos"),
        *(f"--config.data.data_dir={photos_dir}", "--config.data.feed=stream", "--config.data.image_size=16"),
        *("--config.data.crop.name=area", "--config.data.crop.eval_shorter_side=18"),
        *("--config.data.stream.max_damaged=0.2", "--config.num_steps=8", "--config.batch_size=8"),
        *("--config.data.splits.validation=test[:5]", "--config.data.splits.test=test[5:]"),
        *("--config.evaluation.every_steps=4", "--config.checkpoint.every_steps=4"),
        *(
            "--config.log_every_steps=2",
            "--config.evaluation.batch_size=8",
            "--config.schedule.warmup_steps=0",
        ),
    ]
    rows = {}
    for workers in (0, 2):
        workdir = tmp_path / str(workers)
        arguments = [*command, f"--workdir={workdir}", f"--config.data.stream.workers={workers}"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "leaked" not in done.stderr
        assert done.stderr.count("data.splits.train: skipped record") == 2
        rows[workers] = (workdir / "metrics.jsonl").read_bytes()
    assert rows[0] == rows[2]


@pytest.mark.parametrize("feed", ["resident", "stream"])
def test_statistics_are_those_of_the_training_images(feed, feed_of, data_dir):
    settings = {"name": "digits", "data_dir": data_dir, "image_size": 8, "crop.name": "squeeze"}
    made = feed_of(feed=feed, normalization="pixel_mean", **settings)
    images = np.stack([image for image, _ in made.examples("train")])
    np.testing.assert_allclose(made.pixels.evaluate(made.arrays, images).mean(axis=0), 0, atol=1e-5)
