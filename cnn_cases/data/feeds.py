"""From the data keys of a config to a feed.

A feed has the same calls whatever its kind:

    feed.image_shape, feed.num_classes
    feed.arrays                           what lives on the devices, an argument of every step
    feed.train_batches(seed, first_step)  an endless iterator over the batches of the training steps from
                                          `first_step` on; a step's batch is a pure function of seed and step
    feed.eval_batches(role)               the batches of a whole split, padded and masked
    feed.examples(role)                   the examples of a split as they are stored, on the host
    feed.prepare(arrays, batch, key)      inside the step: a batch -> image, label. `key` is None in
                                          evaluation, where nothing is augmented; in training the label can
                                          be a target, a share of each class (see `pixels.Pixels`)
    feed.normalize(arrays, image)         inside the step: views of an image (see `views`), uint8, -> float32
"""

from cnn_cases.data import sources
from cnn_cases.data.pixels import make_pixels
from cnn_cases.data.resident import ResidentFeed


def make_feed(
    *,
    name,
    data_dir,
    splits,
    image_size,
    border,
    normalization,
    augment,
    batch_size,
    eval_batch_size,
    axis_name=None,
):
    """The feed of a TFDS set.

    Args:
      name, data_dir, image_size, border: see `sources.load_split`.
      splits: {role: TFDS split expression}, such as {"train": "train[:90%]", "validation": "train[90%:]"}.
      normalization, augment, axis_name: see `pixels.make_pixels`.
      batch_size, eval_batch_size: see `ResidentFeed`.

    Raises:
      ValueError: a key has no possible value, or the set is not there; the message names it.
    """
    splits = dict(**splits)
    sources.check_disjoint(name, splits, data_dir)
    loaded = {
        role: sources.load_split(name, split, data_dir, image_size, border) for role, split in splits.items()
    }
    train_images, _, num_classes = loaded["train"]
    return ResidentFeed(
        {role: (images, labels) for role, (images, labels, _) in loaded.items()},
        num_classes=num_classes,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        pixels=make_pixels(
            train_images,
            normalization=normalization,
            augment=augment,
            num_classes=num_classes,
            axis_name=axis_name,
        ),
    )


def class_names(name, data_dir):
    """The names of a set's classes, in the order of their labels.

    Not an attribute of the feed: a training has no use for them, and TFDS reads them from its files.

    Args:
      name, data_dir: see `sources.make_builder`.
    """
    return sources.make_builder(name, data_dir).info.features["label"].names
