"""Makes a feed from the data keys of a config.

All feeds have the same interface:

    feed.image_shape, feed.num_classes, feed.num_train
    feed.pixels                           the `pixels.Pixels` of the training images
    feed.arrays                           arrays on the devices, an argument of every step
    feed.train_batches(seed, first_step)  an endless iterator over the batches of the training steps from
                                          `first_step` on; a step's batch is a pure function of seed and step
    feed.training_examples(seed, step)    indices in the training split of the examples in the batch of
                                          `step` (the first is 0), over all processes
    feed.eval_batches(role)               the batches of a whole split, padded and masked
    feed.examples(role)                   the examples of a split as they are stored, on the host
    feed.fingerprint()                    {role: [number of examples, checksum of all of them or of some]}
    feed.view(image)                      a stored image as evaluation shows it, on the host
    feed.border                           zero pixels that `view` adds to every side of a stored image
    feed.prepare(arrays, batch, key)      inside the step: a batch -> image, label. `key` is None in
                                          evaluation, which does not augment; in training the label can be
                                          a target, a share of each class (see `pixels.Pixels`)

If several processes share a training run, each has its own feed, with its share of the batches and examples.
The shares of a batch, concatenated in the order of the processes, equal the batch of a single process.
"""

import functools

from cnn_cases import checks
from cnn_cases.data import decode, sources
from cnn_cases.data.pixels import make_pixels
from cnn_cases.data.resident import ResidentFeed
from cnn_cases.data.splits import allow_open_files, check_disjoint, check_resident, load_split, open_split
from cnn_cases.data.stream import StreamFeed, check_stream

FEEDS = ("resident", "stream")


def make_feed(
    *,
    name,
    data_dir,
    feed,
    splits,
    image_size,
    border,
    crop,
    stream,
    normalization,
    augment,
    batch_size,
    eval_batch_size,
    axis_name=None,
    process_index=0,
    process_count=1,
):
    """Makes the feed of a TFDS data set.

    Args:
      name, data_dir, image_size, border: see `splits.load_split`.
      feed: "resident" for a set that lives on the devices, "stream" for one that is decoded step by step.
      splits: {role: TFDS split expression}, such as {"train": "train[:90%]", "validation": "train[90%:]"};
        roles with the expression "" are left out.
      crop: see `decode.training_box`. A resident feed has whole images: "squeeze".
      stream: workers, buffer and max_damaged of `StreamFeed`; a resident feed ignores them.
      normalization, augment, axis_name: see `pixels.make_pixels`.
      batch_size, eval_batch_size: examples in a training or evaluation step, over all devices of all
        processes; multiples of their number, which `programs.make_program` ensures.
      process_index, process_count: the number of this process, from 0, and of all processes. Each process
        makes a contiguous share of every batch, and has every `process_count`-th of the examples.

    Raises:
      ValueError: a key has an invalid value, or the data set is missing; the message names it.
    """
    checks.one_of("data.feed", feed, FEEDS)
    for key, pixels in (("image_size", image_size), ("border", border)):
        if not 0 <= pixels <= decode.MAX_SIDE:
            raise ValueError(f"data.{key} = {pixels} must be between 0 and {decode.MAX_SIDE} pixels")
    crop, stream = dict(**crop), dict(**stream)
    splits = {role: split for role, split in splits.items() if split}
    if "train" not in splits:
        raise ValueError("data.splits.train = '' must name the examples to train on, as 'train' does")
    check_stream(**stream)
    decode.check(image_size, crop)
    pixels = functools.partial(
        make_pixels,
        normalization=normalization,
        augment=augment,
        axis_name=axis_name,
        keep=functools.partial(sources.computed_once, name, data_dir),
    )
    check_disjoint(name, splits, data_dir)
    allow_open_files(name, splits, data_dir)
    sizes = dict(
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    if feed == "stream":
        return StreamFeed(
            {role: open_split(name, split, data_dir) for role, split in splits.items()},
            image_size=image_size,
            border=border,
            crop=crop,
            make_pixels=pixels,
            **sizes,
            **stream,
        )
    if crop["name"] != "squeeze":
        raise ValueError(
            f"data.crop.name = {crop['name']!r} cannot be used with data.feed = 'resident', which has whole "
            "images ('squeeze'); use data.feed = 'stream'"
        )
    check_resident(name, splits, data_dir, image_size, border)
    loaded = {role: load_split(name, split, data_dir, image_size, border) for role, split in splits.items()}
    sizes_of = {role: "x".join(map(str, images.shape[1:])) for role, (images, *_) in loaded.items()}
    if len(set(sizes_of.values())) > 1:
        raise ValueError(
            f"the images of {name!r} differ in size ("
            + ", ".join(f"data.splits.{role}: {size}" for role, size in sizes_of.items())
            + "); set data.image_size to resize them"
        )
    train_images, _, num_classes = loaded["train"]
    return ResidentFeed(
        {role: (images, labels) for role, (images, labels, _) in loaded.items()},
        num_classes=num_classes,
        pixels=pixels(train_images, num_classes=num_classes),
        **sizes,
    )


def class_names(name, data_dir):
    """The names of a set's classes, in the order of their labels.

    Args:
      name, data_dir: see `sources.make_builder`.
    """
    return sources.make_builder(name, data_dir).info.features["label"].names
