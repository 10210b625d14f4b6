"""TFDS sets: preparing them, and reading whole splits into memory."""

import contextlib
import functools
import logging

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader

from cnn_cases.data import digits  # registers the builder

# Sets that are prepared on first use: they need neither a download nor TensorFlow.
BUNDLED = (digits.Digits.name,)


def make_builder(name, data_dir):
    """The TFDS builder of `name`, whose files are (or will be) below `data_dir`.

    Args:
      name: a TFDS name, with a config where the set has several: "cifar10", "imagenette/320px-v2".
      data_dir: a directory; "" for TFDS's own choice: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      ValueError: TFDS knows no such set.
    """
    try:
        # array_record files can be read without TensorFlow.
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"data.name = {name!r} is no TFDS data set; known are {', '.join(BUNDLED)} and the names that "
            "`python -c 'import tensorflow_datasets as tfds; print(tfds.list_builders())'` lists"
        ) from None
    except (AssertionError, ValueError) as error:
        # A version or config that the set does not have; or it lies there in TFDS's default format.
        raise ValueError(
            f"data.name = {name!r} cannot be opened in data.data_dir = {data_dir!r}: {error}; a set that was "
            "prepared in another format than array_record has to be prepared again, in another data_dir"
        ) from error


def prepare(name, data_dir=""):
    """Downloads and prepares a set, unless it is prepared already.

    Raises:
      ValueError: no such set, or TensorFlow is missing, which TFDS needs to prepare its stock sets.
      ConnectionError: the download failed.
    """
    builder = make_builder(name, data_dir)
    if builder.is_prepared():
        return builder
    downloader.MAX_RETRIES = 1  # TFDS's own choice keeps a machine without network waiting for minutes
    try:
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"TFDS needs TensorFlow, once, to prepare {name!r} ({error}); "
            "install it with `pip install tensorflow-cpu`"
        ) from error
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"{name!r} could not be prepared in {builder.data_path}: {type(error).__name__}: {error}"
        ) from error
    return builder


@functools.lru_cache(maxsize=4)
def load_split(name, split, data_dir="", image_size=0, border=0):
    """A whole split in memory, kept for the next call: many runs of a study share one.

    Args:
      name, data_dir: see `make_builder`.
      split: a TFDS split expression, such as "train" or "train[:90%]".
      image_size: height and width to which images are resized (bilinear); 0 leaves them as they are.
      border: zero pixels then added on every side, as LeNet-5's 28x28 digits lie in 32x32.

    Returns:
      image uint8 [N, H, W, C], label int32 [N], and the number of classes.

    Raises:
      ValueError: the set is unknown or not prepared, or has no such split, no images or no labels, or its
        images differ in size.
    """
    builder = make_builder(name, data_dir)
    if not builder.is_prepared():
        if name not in BUNDLED:
            where = f" --data_dir={data_dir}" if data_dir else ""
            raise ValueError(
                f"data.name = {name!r} is not prepared in {builder.data_path}; "
                f"run `python -m cnn_cases.data.prepare {name}{where}`"
            )
        with _no_progress_bars():  # it takes a second
            builder = prepare(name, data_dir)
    if image_size < 0 or border < 0:
        raise ValueError(f"data.image_size = {image_size} and data.border = {border} must be 0 or more")
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data.name = {name!r} has no image and label; it has {', '.join(features)}")
    try:
        source = builder.as_data_source(split)
        # Reading at once is three times as fast as one by one.
        examples = source.__getitems__(range(len(source)))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"split {split!r} of {name!r} cannot be read: it has {', '.join(builder.info.splits)} ({error})"
        ) from error
    images = [example["image"] for example in examples]
    if image_size:
        images = [_resize(image, image_size) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(
            f"the images of {name!r} differ in size ({len(shapes)} sizes); set data.image_size to one"
        )
    labels = np.array([example["label"] for example in examples], np.int32)
    edge = (border, border)
    return np.pad(np.stack(images), ((0, 0), edge, edge, (0, 0))), labels, features["label"].num_classes


@contextlib.contextmanager
def _no_progress_bars():
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _resize(image, size):
    channels = [Image.fromarray(image[..., channel]) for channel in range(image.shape[-1])]
    return np.stack([channel.resize((size, size), Image.Resampling.BILINEAR) for channel in channels], -1)


# What TFDS warns of at each start: that OpenCV would decode faster, and that an empty directory is empty.
_NOISE = ("OpenCV is not installed", "has no dataset_info.json")
logging.getLogger("absl").addFilter(lambda record: not any(n in record.getMessage() for n in _NOISE))


def open_split(name, split, data_dir=""):
    """The records of a split, to be read one at a time from the disk; their images stay encoded.

    Args:
      name, split, data_dir: see `load_split`.

    Returns:
      A sequence of {"image": bytes, "label": int, ...} that other processes can be sent, and the features.

    Raises:
      ValueError: the set is unknown or not prepared, or has no such split, no images of one byte a channel in
        grey or RGB, or no labels.
    """
    builder = make_builder(name, data_dir)
    if not builder.is_prepared():
        if name not in BUNDLED:
            where = f" --data_dir={data_dir}" if data_dir else ""
            raise ValueError(
                f"data.name = {name!r} is not prepared in {builder.data_path}; "
                f"run `python -m cnn_cases.data.prepare {name}{where}`"
            )
        with _no_progress_bars():
            builder = prepare(name, data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data.name = {name!r} has no image and label; it has {', '.join(features)}")
    image = features["image"]
    if image.shape[-1] not in (1, 3) or image.np_dtype != np.uint8:
        raise ValueError(f"the images of {name!r} are neither grey nor RGB of one byte a channel: {image}")
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        first_label = source[0]["label"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"split {split!r} of {name!r} cannot be read: it has {', '.join(builder.info.splits)} ({error})"
        ) from error
    except RuntimeError:
        return source, features  # the first record is damaged; whoever reads it will find out
    if first_label < 0:  # how TFDS says it, as of ImageNet's test images
        raise ValueError(f"split {split!r} of {name!r} has no labels")
    return source, features
