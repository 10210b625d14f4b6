import itertools

import jax
import numpy as np
import pytest

from cnn_cases.data.pixels import make_pixels
from cnn_cases.data.resident import ResidentFeed
from cnn_cases.training import devices

AUGMENT = {"pad": 0, "flip": False}


def make_splits(num_train=23, num_test=11):
    def split(size, seed):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (size, 4, 4, 3), np.uint8), rng.integers(0, 10, size).astype(np.int32)

    return {"train": split(num_train, 0), "test": split(num_test, 1)}


def all_images(**sizes):
    return np.concatenate([images for images, _ in make_splits(**sizes).values()])


def make_feed(
    num_train=23, num_test=11, batch_size=5, eval_batch_size=4, process=(0, 1), axis_name=None, **augment
):
    splits = make_splits(num_train, num_test)
    pixels = make_pixels(
        splits["train"][0],
        normalization="none",
        augment=AUGMENT | augment,
        num_classes=10,
        axis_name=axis_name,
    )
    return ResidentFeed(
        splits,
        num_classes=10,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        pixels=pixels,
        process_index=process[0],
        process_count=process[1],
    )


def first_batches(feed, seed, count, first_step=0):
    return list(itertools.islice(feed.train_batches(seed, first_step), count))


def prepared(feed, batch, key=None):
    return jax.jit(feed.prepare)(feed.arrays, batch, key)


def test_every_epoch_holds_every_training_example_once_and_in_another_order():
    feed = make_feed()
    drawn = np.concatenate([batch["index"] for batch in first_batches(feed, 0, 23)])
    epochs = drawn.reshape(5, 23)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(23), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


def test_a_batch_is_a_function_of_seed_and_step():
    unbroken = first_batches(make_feed(), 3, 10)
    for first_step in (0, 2, 9):
        (batch,) = first_batches(make_feed(), 3, 1, first_step)
        np.testing.assert_array_equal(batch["index"], unbroken[first_step]["index"])
        np.testing.assert_array_equal(batch["position"], np.arange(5))
    (other,) = first_batches(make_feed(), 4, 1)
    assert not np.array_equal(unbroken[0]["index"], other["index"])


def test_a_batch_larger_than_half_the_set_spans_two_epochs():
    drawn = np.concatenate([batch["index"] for batch in first_batches(make_feed(batch_size=20), 0, 23)])
    np.testing.assert_array_equal(np.bincount(drawn), np.full(23, 20))


@pytest.mark.parametrize("eval_batch_size", [1, 4, 11, 30])
def test_every_evaluation_example_counts_exactly_once(eval_batch_size):
    feed = make_feed(eval_batch_size=eval_batch_size)
    batches = list(feed.eval_batches("test"))
    assert {len(batch["mask"]) for batch in batches} == {eval_batch_size}
    counted = np.concatenate([batch["index"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(23, 34))


def test_processes_share_batches_in_contiguous_parts_and_examples_in_turn():
    whole = make_feed(batch_size=20)
    parts = [make_feed(batch_size=20, process=(index, 4)) for index in range(4)]

    def joined(batches):
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)

    for batch, *shares in zip(*(first_batches(feed, 0, 4) for feed in (whole, *parts)), strict=True):
        assert len(shares[0]["index"]) == 5
        jax.tree.map(np.testing.assert_array_equal, joined(shares), batch)
    for batch, *shares in zip(*(feed.eval_batches("test") for feed in (whole, *parts)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, joined(shares), batch)
    labels = np.zeros(11, np.int32)
    for index, feed in enumerate(parts):
        labels[index::4] = [label for _, label in feed.examples("test")]
    np.testing.assert_array_equal(labels, [label for _, label in whole.examples("test")])


def test_a_batch_holds_the_images_and_labels_of_its_indices():
    feed = make_feed()
    (batch,) = first_batches(feed, 0, 1, first_step=3)
    image, label = prepared(feed, batch)
    np.testing.assert_allclose(image, all_images()[batch["index"]] / 255, atol=1e-6)
    np.testing.assert_array_equal(label, feed.arrays["label"][batch["index"]])


EXACT = {
    "pad": 1, "flip": True, "lighting": 0.1, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3,
    "shift": 1.0, "scale": 0.1, "squeeze": 0.1, "shear": 0.1, "cutout": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("augment", "atol"),
    [
        ({}, 0),
        (EXACT | {"cutmix": 1.0}, 0),
        ({"elastic": 5.0, "mixup": 0.4}, 1e-6),  # jax 0.11 rounds their sums by the shape of the batch
    ],
    ids=["none", "exact", "sums"],
)
def test_order_and_augmentation_are_the_same_on_any_number_of_devices(augment, atol):
    feed = make_feed(num_train=29, batch_size=24, axis_name=devices.AXIS, **augment)
    (batch,) = first_batches(feed, 0, 1, first_step=3)
    seen = []
    for count in (1, 2, 4):
        prepare = jax.pmap(feed.prepare, devices.AXIS, in_axes=(None, 0, None), devices=jax.devices()[:count])
        parts = prepare(feed.arrays, devices.shard(batch, count), jax.random.key(0))
        seen.append([np.concatenate(np.asarray(leaf)) for leaf in parts])
    for image, label in seen[1:]:
        np.testing.assert_allclose(image, seen[0][0], rtol=0, atol=atol)
        np.testing.assert_array_equal(label, seen[0][1])
    plain = all_images(num_train=29)[batch["index"]] / 255
    assert np.allclose(seen[0][0], plain, atol=1e-6) == (not augment)


def test_augmentation_happens_in_training_alone():
    feed = make_feed(pad=2, flip=True)
    (batch,) = first_batches(feed, 0, 1)
    plain, _ = prepared(feed, batch)
    np.testing.assert_allclose(plain, all_images()[batch["index"]] / 255, atol=1e-6)
    augmented, _ = prepared(feed, batch, jax.random.key(0))
    assert not np.allclose(plain, augmented)


def test_a_fingerprint_tells_splits_apart_by_their_size_and_any_pixel_or_label():
    (train, test), again = make_feed().fingerprint().values(), make_feed().fingerprint()
    assert [train, test] == list(again.values())
    assert (train[0], test[0]) == (23, 11)
    for name, role in (("image", "train"), ("label", "test")):
        feed = make_feed()
        feed.arrays[name] = feed.arrays[name].copy()
        feed.arrays[name].reshape(len(feed.arrays[name]), -1)[{"train": 22, "test": 23}[role], -1] ^= 1
        assert {one for one, ours in feed.fingerprint().items() if ours != again[one]} == {role}


def test_views_are_normalised_as_in_evaluation():
    feed = make_feed()
    batch = next(feed.eval_batches("test"))
    image, _ = feed.prepare(feed.arrays, batch, None)
    stored = all_images()[batch["index"]]
    np.testing.assert_array_equal(feed.pixels.evaluate(feed.arrays, stored), image)


def test_the_examples_of_a_split_come_as_they_are_stored():
    feed = make_feed()
    images, labels = zip(*feed.examples("test"), strict=True)
    np.testing.assert_array_equal(images, all_images()[23:])
    np.testing.assert_array_equal(labels, feed.arrays["label"][23:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 24}, "batch_size = 24 must be between 1 and the 23 training examples"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_feed(**settings)
