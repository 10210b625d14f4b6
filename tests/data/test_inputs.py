import numpy as np
import pytest

from cnn_cases.data import feeds, inputs
from tests.conftest import tiny_config

INPUTS = inputs.Inputs((4, 4, 1), ["cat", "Köter"], {"mean": np.float32(0.5), "std": np.ones(1, np.float32)})


def test_inputs_come_back_as_they_were_written():
    content = inputs.to_bytes(INPUTS)
    found = inputs.from_bytes(content)
    assert (found.image_shape, found.class_names) == (INPUTS.image_shape, INPUTS.class_names)
    assert found.statistics == INPUTS.statistics
    assert inputs.to_bytes(found) == content, "the same to the bit"


@pytest.mark.parametrize("end", [0, 2, 300, -30])
def test_a_content_that_is_cut_short_is_refused(end):
    with pytest.raises(ValueError, match="it is not a file of inputs"):
        inputs.from_bytes(inputs.to_bytes(INPUTS)[:end])


def test_a_damaged_byte_is_refused_or_harmless():
    content, refused = inputs.to_bytes(INPUTS), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        try:
            assert set(inputs.from_bytes(bytes(damaged)).statistics) == {"mean", "std"}
        except ValueError:
            refused += 1
    assert refused > len(content) / 2


def test_a_stored_image_is_shown_as_it_lies_in_memory(data_dir):
    config = tiny_config(data_dir)
    config.data.border = 2
    sizes = dict(batch_size=config.batch_size, eval_batch_size=config.evaluation.batch_size)
    feed = feeds.make_feed(**config.data, **sizes)
    stored = feeds.make_feed(**(dict(**config.data) | {"border": 0, "image_size": 0}), **sizes)
    crop = dict(**config.data.crop)
    store, view, added = inputs.make_preprocessing(feed.image_shape, feed="resident", border=2, crop=crop)
    for (image, _), (expected, _) in zip(stored.examples("test"), feed.examples("test"), strict=True):
        assert image.shape == (8, 8, 1)
        np.testing.assert_array_equal(view(store(image)), expected)
    assert added == feed.border == 0


@pytest.mark.parametrize("border", [0, 2])
@pytest.mark.parametrize("crop", ["squeeze", "shorter_side"])
def test_an_image_is_shown_as_a_stream_shows_it(crop, border, photos_dir):
    crop = dict(name=crop, shorter_side=(16, 20), area=(0.1, 1.0), aspect=(0.75, 1.33), eval_shorter_side=18)
    feed = feeds.make_feed(
        name="tiny_photos",
        data_dir=photos_dir,
        feed="stream",
        splits={"train": "train"},
        image_size=16,
        border=border,
        crop=crop,
        stream=dict(workers=0, buffer=1, max_damaged=0.5),
        normalization="channel",
        augment=tiny_config("").data.augment,
        batch_size=2,
        eval_batch_size=4,
    )
    store, view, added = inputs.make_preprocessing(feed.image_shape, feed="stream", border=border, crop=crop)
    for image, _ in feed.examples("train"):
        np.testing.assert_array_equal(view(store(image)), feed.view(image))
    assert added == feed.border == border
