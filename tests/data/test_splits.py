import errno
import io
import os
import pickle
import re
import resource
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnn_cases.data import decode, feeds, memory, sources, splits
from configs import common
from tests.conftest import Bomb, tiny_config
from tests.data import photos


def test_slices_of_a_split_are_its_parts(data_dir):
    whole, labels, _ = splits.load_split("digits", "train", data_dir)
    head, head_labels, _ = splits.load_split("digits", "train[:90%]", data_dir)
    tail, tail_labels, _ = splits.load_split("digits", "train[90%:]", data_dir)
    np.testing.assert_array_equal(np.concatenate([head, tail]), whole)
    np.testing.assert_array_equal(np.concatenate([head_labels, tail_labels]), labels)
    assert len(head) == 1131


def test_images_are_resized_and_keep_their_range(data_dir):
    small, _, _ = splits.load_split("digits", "test", data_dir)
    large, _, _ = splits.load_split("digits", "test", data_dir, image_size=32)
    assert (large.shape, large.dtype) == ((355, 32, 32, 1), np.uint8)
    assert abs(float(large.mean()) - float(small.mean())) < 2


def test_a_border_of_zeros_is_added_on_every_side(data_dir):
    small, _, _ = splits.load_split("digits", "test", data_dir)
    framed, _, _ = splits.load_split("digits", "test", data_dir, border=2)
    assert framed.shape == (355, 12, 12, 1)
    np.testing.assert_array_equal(framed[:, 2:-2, 2:-2], small)
    assert framed.sum() == small.sum()


def test_an_unknown_split_is_refused_with_the_known_ones(data_dir):
    with pytest.raises(ValueError, match=r"split 'tset' of 'digits'.*train, validation, test"):
        splits.load_split("digits", "tset", data_dir)


def test_shrinking_takes_means_and_enlarging_fills_in():
    stripes = np.tile(np.uint8([[0, 240]]), (8, 6))[..., None]
    np.testing.assert_array_equal(splits.resize(stripes, 4, 6)[:, 1:-1], 120)
    ramp = splits.resize(np.uint8([[[0], [240]]]), 1, 8)[0, :, 0]
    assert ((ramp > 0) & (ramp < 240)).sum() == 4


@pytest.mark.parametrize("sizes", [{"image_size": 8192}, {"border": 8192}])
def test_images_that_no_memory_holds_are_refused(sizes, data_dir, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2**21)
    with pytest.raises(ValueError, match=r"1,257 images .* 8.6 GB of memory; change data.image_size"):
        splits.check_resident("digits", {"train": "train"}, data_dir, **sizes)


def test_splits_have_to_be_in_memory_together(data_dir, monkeypatch):
    config = tiny_config(data_dir)
    monkeypatch.setattr(memory, "available", lambda: 2 * 1_500 * 16 * 16)
    config.data.splits = {"train": "train"}
    feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)
    config.data.splits = {"train": "train", "test": "test"}
    with pytest.raises(ValueError, match=r"1,612 images of 16x16x1, held twice, take 0.0 GB"):
        feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)


def test_the_statistics_are_those_of_the_training_split_alone(data_dir):
    config = tiny_config(data_dir)
    feed = feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)

    def are_of(role):
        images, _, _ = splits.load_split("digits", config.data.splits[role], data_dir, image_size=16)
        expected = {"mean": (images / 255).mean(), "std": (images / 255).std()}
        return [np.allclose(feed.pixels.statistics[name], expected[name], rtol=1e-5) for name in expected]

    assert are_of("train") == [True, True]
    assert are_of("validation") == are_of("test") == [False, False]


def test_images_are_decoded_once(prepared, monkeypatch):
    again, labels, _ = splits.load_split("digits", "test", str(prepared))
    splits.load_split.cache_clear()
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", pytest.fail)
    images, same, _ = splits.load_split("digits", "test", str(prepared))
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)


def test_a_damaged_copy_of_the_decoded_images_is_made_again(prepared):
    whole, _, _ = splits.load_split("digits", "train", str(prepared))
    (copy,) = prepared.rglob("train-image-*.npy")
    complete = copy.read_bytes()
    one_bit = complete[:5000] + bytes([complete[5000] ^ 1]) + complete[5001:]
    for damage in (complete[:1000], b"", complete.replace(b")", b"(", 1), one_bit):  # the third in its header
        copy.write_bytes(damage)
        splits.load_split.cache_clear()
        again, _, _ = splits.load_split("digits", "train", str(prepared))
        np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("name", ["label", "checksums"])
def test_a_flipped_bit_beside_the_decoded_images_is_noticed(name, prepared):
    images, labels, _ = splits.load_split("digits", "train", str(prepared))
    images, labels = images.copy(), labels.copy()
    (copy,) = prepared.rglob(f"train-{name}-*.npy")
    sound = copy.read_bytes()
    copy.write_bytes(sound[:-4] + bytes([sound[-4] ^ 2]) + sound[-3:])
    splits.load_split.cache_clear()
    same_images, same_labels, _ = splits.load_split("digits", "train", str(prepared))
    np.testing.assert_array_equal(same_images, images)
    np.testing.assert_array_equal(same_labels, labels)
    assert copy.read_bytes() == sound


def test_other_files_of_a_set_are_decoded_anew(prepared):
    splits.load_split("digits", "test", str(prepared))
    _, of_train, _ = splits.load_split("digits", "train", str(prepared))
    (old,) = prepared.rglob("test-label-*.npy")
    (records,) = prepared.rglob("*-test.array_record*")
    (others,) = prepared.rglob("*-train.array_record*")
    shutil.copy(others, records)  # as where a set has been corrected elsewhere
    splits.load_split.cache_clear()
    _, label, _ = splits.load_split("digits", "test", str(prepared))
    np.testing.assert_array_equal(label, of_train[: len(label)])
    (new,) = prepared.rglob("test-label-*.npy")
    assert new != old, "the old copy is gone"


def test_what_another_process_is_writing_at_the_same_time_stays(prepared, monkeypatch):
    shutil.rmtree(next(prepared.rglob("decoded")))
    keep = splits.sources.keep

    def keep_beside_another(path, save):
        path.parent.mkdir(exist_ok=True)
        path.with_name(f"{path.stem}-0123456789abcdef.npy").touch()
        keep(path, save)

    monkeypatch.setattr(splits.sources, "keep", keep_beside_another)
    splits.load_split.cache_clear()
    splits.load_split("digits", "test", str(prepared))
    names = {path.name.rpartition("-")[2] for path in prepared.rglob("decoded/*-0123456789abcdef.npy")}
    assert names == {"0123456789abcdef.npy"}
    assert len([*prepared.rglob("decoded/*.npy")]) == 6


def test_a_directory_that_cannot_be_written_costs_only_the_copy(prepared, caplog):
    shutil.rmtree(next(prepared.rglob("decoded")))
    (prepared / "digits" / "1.0.0" / "decoded").write_text("a file where the directory would be")
    images, _, _ = splits.load_split("digits", "test", str(prepared))
    assert len(images) == 355
    assert re.search(r"decoded/test-image-\w+.npy could not be saved for the next start", caplog.text)


def test_a_full_disk_costs_only_the_copy_and_leaves_no_part_of_it(prepared, monkeypatch, caplog):
    shutil.rmtree(next(prepared.rglob("decoded")))

    def full(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    images, _, _ = splits.load_split("digits", "test", str(prepared))
    assert len(images) == 355
    assert re.search(r"decoded/test-image-\w+.npy could not be saved for the next start: ", caplog.text)
    assert list(next(prepared.rglob("decoded")).iterdir()) == []


def test_a_pickle_among_the_decoded_images_is_not_read(prepared, tmp_path):
    whole, _, _ = splits.load_split("digits", "train", str(prepared))
    trace = tmp_path / "trace"
    planted = np.array([Bomb(trace)], dtype=object)
    (copy,) = prepared.rglob("train-image-*.npy")
    for plant in (
        lambda: np.save(copy, planted, allow_pickle=True),
        lambda: copy.write_bytes(pickle.dumps(Bomb(trace))),
    ):
        plant()
        splits.load_split.cache_clear()
        again, _, _ = splits.load_split("digits", "train", str(prepared))
        np.testing.assert_array_equal(again, whole)
        np.savez(copy.with_name("statistics.npz"), allow_pickle=True, mean=planted)
        mended = sources.computed_once("digits", str(prepared), "statistics", lambda: {"mean": np.ones(1)})
        assert mended["mean"] == np.ones(1)
        assert not trace.exists()
    np.save(copy, planted, allow_pickle=True)
    np.load(copy, allow_pickle=True)[0].close()
    assert trace.exists(), "the bomb works"


def test_a_prepared_set_with_a_missing_file_is_named(prepared):
    shutil.rmtree(next(prepared.rglob("decoded")))
    next(prepared.rglob("*train.array_record*")).unlink()
    with pytest.raises(ValueError, match=r"1\.0\.0 is damaged .*; delete it and prepare 'digits' again"):
        splits.load_split("digits", "train", str(prepared))


def test_a_part_of_all_is_refused_with_the_splits_that_have_parts(data_dir):
    with pytest.raises(ValueError, match=r"'all\[:90%\]' of 'digits' cannot be read: it has train, "):
        splits.load_split("digits", "all[:90%]", data_dir)


def test_what_is_wrong_with_a_split_is_said_in_one_line(data_dir):
    with pytest.raises(ValueError, match=r"^data.splits.test = 'train\[:5%' of 'digits' cannot .*\Z"):
        splits.check_disjoint("digits", {"test": "train[:5%"}, data_dir)


def test_parts_of_several_splits_are_joined_in_order(data_dir):
    both, labels, _ = splits.load_split("digits", "test[5:]+train[:3]", data_dir)
    test, _, _ = splits.load_split("digits", "test", data_dir)
    train, train_labels, _ = splits.load_split("digits", "train", data_dir)
    np.testing.assert_array_equal(both, np.concatenate([test[5:], train[:3]]))
    np.testing.assert_array_equal(labels[-3:], train_labels[:3])


@pytest.mark.parametrize("split", ["test[:0]", "test[:0%]", "test[355:]", "train[5:5]+test[:0]"])
def test_an_empty_split_is_refused(split, data_dir):
    with pytest.raises(ValueError, match=rf"data\.splits\.test = '{re.escape(split)}' .* has no examples"):
        splits.check_disjoint("digits", {"train": "train", "test": split}, data_dir)
    with pytest.raises(ValueError, match="has no examples"):
        splits.load_split("digits", split, data_dir)


def test_decoded_copies_are_as_readable_as_the_set(prepared):
    shutil.rmtree(next(prepared.rglob("decoded")))
    before = os.umask(0o022)
    try:
        splits.load_split("digits", "train", str(prepared))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in prepared.rglob("decoded/*")} == {0o644}


@pytest.mark.parametrize(("first", "shared"), [(1250, 7), (1256, 1)])
def test_training_on_what_is_held_out_is_refused(first, shared, data_dir):
    splits.check_disjoint("digits", {"train": "train[:90%]", "validation": "train[90%:]"}, data_dir)
    with pytest.raises(
        ValueError, match=rf"data.splits.train = 'train' and data.splits.test = .* share {shared} examp"
    ):
        splits.check_disjoint("digits", {"train": "train", "test": f"test+train[{first}:]"}, data_dir)


@pytest.mark.parametrize(
    ("split", "count"),
    [("train+train", 1257), ("test[:60%]+test[40%:]", 71), ("train+train[1256:]", 1)],
)
def test_a_split_with_examples_twice_is_refused(split, count, data_dir):
    with pytest.raises(ValueError, match=rf"data\.splits\.test = .* has {count} examples of 'digits' twice"):
        splits.check_disjoint("digits", {"test": split}, data_dir)


def test_a_part_that_nothing_needs_can_be_left_out(data_dir):
    config = tiny_config(data_dir)
    config.data.splits.validation = ""
    feed = feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)
    assert feed.fingerprint().keys() == {"train", "test"}
    config.data.splits.train = ""
    with pytest.raises(ValueError, match=r"data\.splits\.train = '' must name the examples to train on"):
        feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)


@pytest.mark.parametrize("feed", feeds.FEEDS)
def test_no_feed_trains_on_what_is_held_out(feed, data_dir):
    config = tiny_config(data_dir)
    config.data.feed = feed
    config.data.splits.test = "train[:5]"
    with pytest.raises(ValueError, match=r"data\.splits\.test = .* share 5 examples"):
        feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24)


def test_to_choose_by_examples_of_the_test_is_refused(data_dir):
    roles = {"train": "train", "validation": "test[:10]", "test": "test"}
    with pytest.raises(ValueError, match=r"data.splits.validation = .* and data.splits.test = .* share 10 e"):
        splits.check_disjoint("digits", roles, data_dir)


def test_pictures_of_all_formats_are_in_memory_as_a_stream_has_them(photos_dir):
    (bad,) = photos.damaged_indices(photos_dir, "test")
    sound = f"test[:{bad}]+test[{bad + 1}:]"
    images, labels, _ = splits.load_split("tiny_photos", sound, photos_dir, image_size=16)
    assert images.shape == (10, 16, 16, 3)
    records, _ = splits.open_split("tiny_photos", sound, photos_dir)
    for image, label, record in zip(images, labels, records, strict=True):
        np.testing.assert_array_equal(image, splits.resize(decode.decode(record["image"], 3), 16, 16))
        assert label == record["label"]


def test_pictures_that_cannot_be_in_memory_are_named(photos_dir):
    (bad,) = photos.damaged_indices(photos_dir, "test")
    with pytest.raises(ValueError, match=rf"example {bad} of 'tiny_photos', 'test', is damaged: .*'stream'"):
        splits.load_split("tiny_photos", "test", photos_dir, image_size=16)
    with pytest.raises(
        ValueError, match=r"the images of 'tiny_photos' differ in size \(\d+x\d+x3, \d+x\d+x3\); "
    ):
        splits.load_split("tiny_photos", f"test[{bad + 1}:]+test[:{bad}]", photos_dir)


def test_a_damaged_file_is_named_if_the_set_knows_it(photos_dir):
    (bad,) = photos.damaged_indices(photos_dir, "test")
    with pytest.raises(ValueError, match=rf"example {bad} of .*, 'test', is damaged: test_\d+\.jpg: "):
        splits.load_split("tiny_photos", "test", photos_dir, image_size=16)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        (
            (8, 8, 3),
            [(9, 7, 3), (5, 6, 3)],
            r"in size .* builder declares \(8, 8, 3\); declare \(None, None, 3\)",
        ),
        ((None, None, 3), [(9, 7, 3), (5, 6, 3)], r"differ in size .*; set data\.image_size to resize them"),
    ],
)
def test_images_that_differ_in_size_are_told_of_with_the_remedy(shape, sizes, message, tmp_path):
    prepare_unlike(tmp_path, shape, sizes)
    # Resizing is not the remedy where it has already been asked for.
    image_size = 0 if "image_size" in message else 16
    with pytest.raises(ValueError, match=message):
        splits.load_split("unlike", "train", str(tmp_path), image_size=image_size)


@pytest.mark.parametrize("shape", [(8, 8, 3), (None, None, 3)])
def test_a_set_that_is_too_large_before_it_is_resized_is_refused(shape, tmp_path, monkeypatch):
    prepare_unlike(tmp_path, shape, [(8, 8, 3)] * 3)
    monkeypatch.setattr(memory, "available", lambda: 2 * 8 * 8 * 3)
    splits.check_resident("unlike", {"train": "train[:1]"}, str(tmp_path), image_size=4)
    with pytest.raises(ValueError, match=r"3 images of 8x8x3 take .*; change data.feed to 'stream'"):
        splits.load_split("unlike", "train", str(tmp_path))
    if None in shape:
        small, _, _ = splits.load_split("unlike", "train", str(tmp_path), image_size=4)
        assert small.shape == (3, 4, 4, 3)
        return
    with pytest.raises(ValueError, match=r"3 images of 8x8x3 take .*; change data.feed to 'stream'"):
        splits.load_split("unlike", "train[:1]", str(tmp_path), image_size=4)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_are_neither_grey_nor_in_colour_are_refused(channels, tmp_path):
    prepare_unlike(tmp_path, (None, None, channels), [(8, 8, channels)])
    with pytest.raises(ValueError, match=r"the images of 'unlike' are neither grey nor RGB: Image"):
        splits.load_split("unlike", "train", str(tmp_path))


def test_how_many_examples_lack_a_label_is_said(tmp_path):
    prepare_unlike(tmp_path, (None, None, 3), [(8, 8, 3)] * 9, unlabelled=2)
    with pytest.raises(ValueError, match=r"2 of the 9 examples in split 'train' of 'unlike' have no label"):
        splits.load_split("unlike", "train", str(tmp_path))


def test_a_part_that_ends_before_it_starts_is_refused(data_dir):
    with pytest.raises(ValueError, match=r"data.splits.test = .* of 'digits' has a part that ends before it"):
        splits.check_disjoint("digits", {"test": "validation[5:3]+test"}, data_dir)


def test_parts_whose_images_differ_in_size_are_told_of_with_the_remedy(data_dir, monkeypatch):
    loaded = {"train": (np.zeros((9, 9, 9, 3), np.uint8), np.zeros(9, np.int32), 2)}
    loaded["test"] = (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32), 2)
    monkeypatch.setattr(feeds, "load_split", lambda _, split, *__: loaded[split])
    settings = dict(**common.get_config().data) | {"splits": {"train": "train", "test": "test"}}
    message = r"differ in size \(data.splits.train: 9x9x3, data.splits.test: 8x8x3\); set data.image_size"
    with pytest.raises(ValueError, match=message):
        feeds.make_feed(**settings | {"data_dir": data_dir}, batch_size=4, eval_batch_size=4)


@pytest.mark.parametrize("feed", feeds.FEEDS)
def test_what_else_a_set_has_is_not_decoded(feed, tmp_path):
    broken = b"not an image"
    others = {
        "mask": (tfds.features.Image(shape=(None, None, 1)), broken),
        "frames": (tfds.features.Sequence({"frame": tfds.features.Image()}), [{"frame": broken}] * 2),
        "inner": (tfds.features.FeaturesDict({"image": tfds.features.Image()}), {"image": broken}),
    }
    prepare_unlike(tmp_path, (None, None, 3), [(8, 8, 3)] * 5, others=others)
    assert len(list(feed_of_unlike(tmp_path, feed).examples("train"))) == 5


def prepare_unlike(data_dir, shape, sizes, num_shards=None, others=None, unlabelled=0):
    """Prepares a set whose builder declares one shape and whose images have others.

    Its records also hold `others`, {name: (feature, value)}; the first `unlabelled` ones have no label.
    """
    others = others or {}

    class Unlike(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images of several shapes."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(num_classes=2),
                **{name: feature for name, (feature, _) in others.items()},
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, size in enumerate(sizes):
                file = io.BytesIO()
                Image.fromarray(np.zeros(size, np.uint8)).save(file, "PNG")
                values = {name: value for name, (_, value) in others.items()}
                yield number, {"image": file.getvalue(), "label": -(number < unlabelled), **values}

    settings = tfds.download.DownloadConfig(num_shards=num_shards)
    Unlike(data_dir=data_dir, file_format="array_record").download_and_prepare(download_config=settings)


@pytest.mark.parametrize("feed", feeds.FEEDS)
def test_a_set_can_have_more_files_than_a_process_may_open_unless_it_asks(feed, tmp_path):
    prepare_unlike(tmp_path, (None, None, 3), [(8, 8, 3)] * 100, num_shards=100)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, before[1]))
    try:
        assert len(list(feed_of_unlike(tmp_path, feed).examples("train"))) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_the_system_allows_are_refused(tmp_path, monkeypatch):
    prepare_unlike(tmp_path, (None, None, 3), [(8, 8, 3)] * 30, num_shards=30)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 280))
    with pytest.raises(ValueError, match=r"'unlike' has 30 files in train, .* lets a process open 280"):
        feed_of_unlike(tmp_path, "stream")


def feed_of_unlike(data_dir, feed, image_size=8, **splits):
    config = common.get_config().data
    config.update(dict(name="unlike", data_dir=str(data_dir), feed=feed, image_size=image_size))
    settings = dict(**config) | {"splits": {"train": "train"} | splits}
    return feeds.make_feed(**settings, batch_size=4, eval_batch_size=4)


def test_photographs_are_resized_as_they_are_read(photos_dir, monkeypatch):
    """Or a set would be in memory at its full size first."""
    sizes, calls, resize = [], [], splits.resize
    monkeypatch.setattr(splits, "resize", lambda *arguments: sizes.append(len(calls)) or resize(*arguments))
    monkeypatch.setattr(decode, "decode", lambda *_: calls.append(1) or np.zeros((20, 24, 3), np.uint8))
    splits._decode(sources.open_prepared("tiny_photos", photos_dir), "train", 16)
    assert sizes == list(range(1, photos.SIZES["train"] + 1))
