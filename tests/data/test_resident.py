import jax
import numpy as np
import pytest

from cnn_cases.data.resident import ResidentFeed


def make_feed(num_train=23, num_test=11, batch_size=5, eval_batch_size=4, **settings):
    def split(size, seed):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (size, 4, 4, 3), np.uint8), rng.integers(0, 10, size).astype(np.int32)

    splits = {"train": split(num_train, 0), "test": split(num_test, 1)}
    return ResidentFeed(
        splits, num_classes=10, batch_size=batch_size, eval_batch_size=eval_batch_size, **settings
    )


def prepared(feed, batch, key=None):
    return jax.jit(feed.prepare)(feed.arrays, batch, key)


def test_every_epoch_holds_every_training_example_once_and_in_another_order():
    feed = make_feed()
    drawn = np.concatenate([feed.train_batch(0, step)["index"] for step in range(23)])
    epochs = drawn.reshape(5, 23)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(23), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


def test_a_batch_is_a_function_of_seed_and_step():
    one, other = make_feed(), make_feed()
    later = [other.train_batch(3, step) for step in (9, 2)]
    for step in range(10):
        batch = one.train_batch(3, step)
        for again in (later[0] if step == 9 else None, later[1] if step == 2 else None):
            if again is not None:
                np.testing.assert_array_equal(batch["index"], again["index"])
    assert not np.array_equal(one.train_batch(3, 0)["index"], one.train_batch(4, 0)["index"])


@pytest.mark.parametrize("eval_batch_size", [1, 4, 11, 30])
def test_every_evaluation_example_counts_exactly_once(eval_batch_size):
    feed = make_feed(eval_batch_size=eval_batch_size)
    batches = list(feed.eval_batches("test"))
    assert {len(batch["mask"]) for batch in batches} == {eval_batch_size}
    counted = np.concatenate([batch["index"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(23, 34))


def test_a_batch_holds_the_images_and_labels_of_its_indices():
    feed = make_feed()
    batch = feed.train_batch(0, 3)
    image, label = prepared(feed, batch)
    np.testing.assert_allclose(image, feed.arrays["image"][batch["index"]] / 255, atol=1e-6)
    np.testing.assert_array_equal(label, feed.arrays["label"][batch["index"]])


def everything(feed):
    return prepared(feed, {"index": np.arange(23, dtype=np.int32)})[0]


def test_channel_normalization_gives_mean_zero_and_deviation_one():
    image = everything(make_feed(normalization="channel"))
    np.testing.assert_allclose(image.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_pixel_mean_normalization_gives_a_mean_image_of_zero():
    image = everything(make_feed(normalization="pixel_mean"))
    np.testing.assert_allclose(image.mean(axis=0), 0, atol=1e-6)
    assert image.std() < 0.5  # not divided by a deviation


def test_pixel_mean_normalization_can_keep_the_range_of_256_values():
    small, large = (everything(make_feed(normalization=name)) for name in ("pixel_mean", "pixel_mean_255"))
    np.testing.assert_allclose(large, 255 * small, rtol=1e-5, atol=1e-4)


def test_the_input_of_lenet5_has_black_below_zero_and_white_above_one():
    feed = make_feed(normalization="lenet5_1998")
    expected = feed.arrays["image"][:23] / 255 * 1.275 - 0.1
    np.testing.assert_allclose(everything(feed), expected, atol=1e-6)


def test_augmentation_happens_in_training_alone():
    feed = make_feed(pad=2, flip=True)
    batch = feed.train_batch(0, 0)
    plain, _ = prepared(feed, batch)
    np.testing.assert_allclose(plain, feed.arrays["image"][batch["index"]] / 255, atol=1e-6)
    augmented, _ = prepared(feed, batch, jax.random.key(0))
    assert not np.allclose(plain, augmented)


def test_constant_images_do_not_divide_by_zero():
    images = np.zeros((6, 2, 2, 1), np.uint8)
    feed = ResidentFeed(
        {"train": (images, np.zeros(6, np.int32))},
        num_classes=2,
        batch_size=2,
        eval_batch_size=2,
        normalization="channel",
    )
    image, _ = prepared(feed, {"index": np.arange(6, dtype=np.int32)})
    np.testing.assert_array_equal(image, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 24}, "batch_size = 24 must be between 1 and the 23 training examples"),
        ({"eval_batch_size": 0}, "evaluation.batch_size = 0 must be 1 or more"),
        (
            {"normalization": "zca"},
            "data.normalization = 'zca' is unknown; known: none, channel, pixel_mean, pixel_mean_255, lenet",
        ),
        ({"pad": -1}, "data.pad = -1 must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_feed(**settings)
