"""TFDS sets: preparing them, opening their splits, and reading whole ones into memory where they fit."""

import contextlib
import functools
import importlib.util
import itertools
import logging
import math
import os
import pathlib
import re
import secrets
import sys
import zipfile
import zlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.extractor import ExtractError
from tensorflow_datasets.core.download.util import DownloadError

from cnn_cases.data import digits  # registers the builder

# "mnist", "imagenette/320px-v2", "digits:1.0.0". TFDS knows more: settings of a builder, and name spaces, to
# whose sets belongs code that it downloads.
_NAME = re.compile(r"[a-zA-Z]\w*(/\w[\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?")

OWN_GROUPS, GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")

# Sets that are prepared on first use: they need neither a download nor TensorFlow.
BUNDLED = (digits.Digits.name,)


def make_builder(name, data_dir):
    """The TFDS builder of `name`, whose files are (or will be) below `data_dir`.

    Args:
      name: a TFDS name, with a config where the set has several: "cifar10", "imagenette/320px-v2".
      data_dir: a directory; "" for TFDS's own choice: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      ValueError: TFDS knows no such set, or `data_dir` is no directory but a bucket.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"data.name = {name!r} is no name of a TFDS data set, as 'mnist', 'imagenette/320px-v2' and "
            "'digits:1.0.0' are"
        )
    data_dir = os.path.expanduser(data_dir)  # a shell leaves the ~ of --data_dir=~/x as it is
    if re.match(r"\w+:/", data_dir):
        raise ValueError(
            f"data.data_dir = {data_dir!r} must be a directory, which a bucket is once it is mounted"
        )
    try:
        # array_record files can be read without TensorFlow.
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"data.name = {name!r} is no TFDS data set, nor is one of that name prepared in data.data_dir = "
            f"{data_dir!r}; known are {', '.join(BUNDLED)} and the names that "
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
      ValueError: no such set, TensorFlow is missing, which TFDS needs to prepare its stock sets, or archives
        are missing that nobody but the user may download.
      ConnectionError: the download failed.
    """
    builder = make_builder(name, data_dir)
    if builder.is_prepared():
        return builder
    stock = type(builder).__module__.startswith("tensorflow_datasets.")
    if stock and importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"TFDS needs TensorFlow, once, to prepare {name!r}; `make data DATASET={name}` has it in an "
            "environment of its own, or install it with `pip install tensorflow-cpu`"
        )
    downloader.MAX_RETRIES = 1  # TFDS's own choice keeps a machine without network waiting for minutes
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # TFDS's word for a manual download that is not there
        raise ValueError(f"{name!r} cannot be prepared in {builder.data_path}: {error}") from error
    except (OSError, DownloadError, NonMatchingChecksumError, ExtractError) as error:
        if (other := make_builder(name, data_dir)).is_prepared():  # another process was quicker
            return other
        raise ConnectionError(
            f"{name!r} could not be prepared in {builder.data_path}: {type(error).__name__}: {error}"
        ) from error
    return builder


def open_prepared(name, data_dir=""):
    """The builder of a prepared set of labelled images; a bundled one is prepared on the way.

    Raises:
      ValueError: the set is unknown or not prepared, or has no images of one byte a channel or no classes.
    """
    builder = make_builder(name, data_dir)
    if not builder.is_prepared():
        if builder.name not in BUNDLED:
            where = f" DATA_DIR={data_dir}" if data_dir else ""
            raise ValueError(
                f"data.name = {name!r} is not prepared in {builder.data_path}; "
                f"run `make data DATASET={name}{where}`"
            )
        tfds.disable_progress_bar()  # it takes a second
        builder = prepare(name, data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data.name = {name!r} has no image and label; it has {', '.join(features)}")
    image, label = features["image"], features["label"]
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise ValueError(f"data.name = {name!r} has no images of one byte a channel, but {image}")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(f"data.name = {name!r} is no classification: its labels are {label}")
    return builder


def check_disjoint(name, splits, data_dir=""):
    """Refuses splits that share examples: to train on one that is held out, or to choose by one of the test.

    Args:
      name, data_dir: see `make_builder`.
      splits: {role: TFDS split expression}.

    Raises:
      ValueError: a split cannot be read, or two share examples.
    """
    builder = open_prepared(name, data_dir)
    parts = {role: _parts(builder, split, f"data.splits.{role} = ") for role, split in splits.items()}
    for one, other in itertools.combinations(splits, 2):
        shared = sum(
            max(0, min(end, other_end) - max(start, other_start))
            for base, start, end in parts[one]
            for other_base, other_start, other_end in parts[other]
            if base == other_base
        )
        if shared:
            raise ValueError(
                f"data.splits.{one} = {splits[one]!r} and data.splits.{other} = {splits[other]!r} share "
                f"{shared} examples of {name!r}; an honest evaluation needs examples that were held out"
            )


def check_resident(name, splits, data_dir="", image_size=0, border=0):
    """Refuses splits that are more, all of them together, than this machine's memory holds.

    Args:
      name, data_dir, image_size, border: see `load_split`.
      splits: {role: TFDS split expression}.

    Raises:
      ValueError: they are; or the set cannot be opened, or a split of it.
    """
    builder = open_prepared(name, data_dir)
    *sides, channels = builder.info.features["image"].shape
    if not image_size and None in sides:
        return  # photographs of one size, or `load_split` refuses them
    shape = (*((image_size or side) + 2 * border for side in sides), channels)
    count = sum(end - start for split in splits.values() for _, start, end in _parts(builder, split))
    # As they were loaded, for the next run of a study, and all of them behind each other, for this one.
    check_memory(count, shape, "data.image_size and data.border, or take data.feed = 'stream'", times=2)


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
    builder = open_prepared(name, data_dir)
    parts = _parts(builder, split)
    if None in builder.info.features["image"].shape:
        images, labels = _decode(builder, split, image_size)
    else:
        whole = [_decode_once(builder, base) for base, _, _ in parts]
        cut = [
            (images[start:end], labels[start:end])
            for (images, labels), (_, start, end) in zip(whole, parts, strict=True)
        ]
        images, labels = (np.concatenate(column) for column in zip(*cut, strict=True))
        if image_size:
            images = [resize(image, image_size, image_size) for image in images]
    _check_labels(name, split, labels)
    images = np.asarray(images)
    if border:
        edge = (border, border)
        images = np.pad(images, ((0, 0), edge, edge, (0, 0)))
    return images, np.asarray(labels, np.int32), builder.info.features["label"].num_classes


def open_split(name, split, data_dir=""):
    """The records of a split, to be read one at a time from the disk; their images stay encoded.

    Args:
      name, split, data_dir: see `load_split`.

    Returns:
      A sequence of {"image": bytes, "label": int, ...} that other processes can be sent, and the features.

    Raises:
      ValueError: the set is unknown or not prepared, or has no such split, no images in grey or RGB, or no
        labels.
    """
    builder = open_prepared(name, data_dir)
    _parts(builder, split)
    features = builder.info.features
    image = features["image"]
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"the images of {name!r} are neither grey nor RGB: {image}")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    try:
        first_label = source[0]["label"]
    except RuntimeError:
        return source, features  # the first record is damaged; whoever reads it will find out
    _check_labels(name, split, first_label)
    return source, features


def check_memory(num_images, shape, keys, times=1):
    """Raises ValueError where images uint8 do not fit into the memory.

    Args:
      num_images, shape: their number, and (H, W, C) of each.
      keys: of the config, which the message says to change.
      times: how many copies of them are held.
    """
    wanted, memory = times * num_images * math.prod(shape), _memory()
    if wanted > memory:
        held = ", held twice," if times == 2 else ""
        raise ValueError(
            f"{num_images:,} images of {'x'.join(map(str, shape))}{held} take {wanted / 1e9:,.1f} GB, and "
            f"this machine, container or job has {memory / 1e9:,.1f} GB of memory; change {keys}"
        )


def _memory():
    """Bytes: the machine's memory, or less where this process is in a container or a job that has less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []  # on Linux
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if not controllers:  # version 2 of control groups
            limits, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            limits, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = limits / group.strip("/")
        for place in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit there, or the word "max"
                sizes.append(int((place / name).read_text()))
    return min(sizes)


def _check_labels(name, split, labels):
    if np.min(labels) < 0:  # how TFDS says it, as of ImageNet's test images
        raise ValueError(f"split {split!r} of {name!r} has no labels")


def _parts(builder, split, prefix=""):
    """[(name of a whole split, first, end)] of which a split expression is made.

    Args:
      builder: a TFDS builder.
      split: a split expression.
      prefix: what the message of an error says before it.

    Raises:
      ValueError: the set has no such split, or there is nothing in it.
    """
    strange = [base for base in builder.info.splits if not re.fullmatch(r"\w[\w.-]*", base)]
    if strange:  # they become names of files
        raise ValueError(f"{builder.data_path} has a split of the name {strange[0]!r}, which is no word")
    try:
        absolute = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{prefix or 'split '}{split!r} of {builder.info.name!r} cannot be read: it has "
            f"{', '.join(builder.info.splits)} ({error})"
        ) from error
    parts = []
    for part in absolute:
        size = builder.info.splits[part.splitname].num_examples
        parts.append((part.splitname, part.from_ or 0, size if part.to is None else part.to))
    if all(start >= end for _, start, end in parts):
        raise ValueError(f"{prefix or 'split '}{split!r} of {builder.info.name!r} has no examples")
    return parts


def _decode(builder, split, image_size=0):
    """[image uint8 [H, W, C]], all of one shape, resized unless `image_size` is 0, and [label] of a split."""
    name, images, labels = builder.info.name, [], []
    for image, label in _examples(builder, split):
        images.append(resize(image, image_size, image_size) if image_size else image)
        labels.append(label)
        if images[-1].shape != images[0].shape:
            one, other = ("x".join(map(str, shape)) for shape in (images[0].shape, image.shape))
            raise ValueError(
                f"the images of {name!r} differ in size ({one}, {other}); set data.image_size to one"
            )
    return images, labels


def _examples(builder, split):
    """Image uint8 [H, W, C] and label of each example of a split, in grey or RGB as a stream has them."""
    channels = builder.info.features["image"].shape[-1]
    encoded = {"image": tfds.decode.SkipDecoding()} if channels in (1, 3) else None
    try:
        source = builder.as_data_source(split, decoders=encoded)
        # Reading many at once is three times as fast as one by one, and all at once fills the memory.
        for first in range(0, len(source), 1000):
            examples = source.__getitems__(range(first, min(first + 1000, len(source))))
            for number, example in enumerate(examples, start=first):
                image = example["image"]
                if encoded:
                    image = _decoded(image, channels, f"example {number} of {builder.info.name!r}, {split!r}")
                yield image, example["label"]
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{builder.data_path} is damaged ({error}); delete it and prepare {builder.info.name!r} again"
        ) from error


def _decoded(data, channels, what):
    from cnn_cases.data import decode  # here, since what prepares a set has none of the libraries for it

    try:
        return decode.decode(data, channels)
    except ValueError as error:
        raise ValueError(
            f"{what}, is damaged: {error}; data.feed = 'stream' can leave it out, by data.stream.max_damaged"
        ) from error


def _decode_once(builder, base):
    """Images uint8 [N, H, W, C] and labels int32 [N] of a whole split, kept decoded beside the prepared set.

    Reading CIFAR-10's decoded pixels takes a tenth of a second, decoding them several.
    """
    paths = [
        pathlib.Path(builder.data_path) / "decoded" / f"{base}-{name}.npy" for name in ("image", "label")
    ]
    shape = (builder.info.splits[base].num_examples, *builder.info.features["image"].shape)
    try:
        images, labels = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        if (images.shape, images.dtype, labels.shape) == (shape, np.uint8, shape[:1]):
            return images, labels
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or half a file
    images, labels = _decode(builder, base)
    arrays = np.stack(images), np.array(labels, np.int32)
    for path, array in zip(paths, arrays, strict=True):
        _keep(path, functools.partial(np.save, arr=array, allow_pickle=False))
    return arrays


def computed_once(name, data_dir, key, compute):
    """Arrays that take long to compute of a set, kept beside it for the next start.

    Args:
      name, data_dir: see `make_builder`.
      key: what tells them apart from any others of the set; a file's name.
      compute: () -> {name: array}.
    """
    path = pathlib.Path(open_prepared(name, data_dir).data_path) / "decoded" / f"{key}.npz"
    try:
        # Opened here: of a damaged file numpy leaves its own handle open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # not there yet, or damaged
    arrays = compute()
    _keep(path, functools.partial(np.savez, allow_pickle=False, **arrays))
    return arrays


def _keep(path, save):
    """Has `save` write a file, as a whole or not at all; where that is impossible, a warning is enough."""
    try:
        path.parent.mkdir(exist_ok=True)
        # Renamed when it is whole: another process may be reading, or doing the same. And no temporary file
        # of Python's, which others that share the set could not read.
        unfinished = path.with_name(f"{path.stem}-{secrets.token_hex(8)}{path.suffix}")
        try:
            with unfinished.open("xb") as file:
                save(file)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        logging.getLogger(__name__).warning("%s is not kept for the next start: %s", path, error)


def resize(image, height, width):
    """An image uint8 [h, w, C] in another size (bilinear, each pixel the mean over what it covers)."""
    channels = [Image.fromarray(image[..., channel]) for channel in range(image.shape[-1])]
    return np.stack([channel.resize((width, height), Image.Resampling.BILINEAR) for channel in channels], -1)


def _class_of_feature(name, of_tfds=tfds.features.FeatureConnector.cls_from_name):
    # A prepared set names the classes of its features, and TFDS would import whatever module that is. The set
    # may be a stranger's, and the module lie beside it.
    module = name.rpartition(".")[0]
    if module not in sys.modules and not module.startswith("tensorflow_datasets."):
        raise ValueError(
            f"features.json names the class {name}, which is not of TFDS; import its module before"
        )
    return of_tfds(name)


tfds.features.FeatureConnector.cls_from_name = staticmethod(_class_of_feature)

# TFDS warns at each start that an empty directory is empty.
_NOISE = "has no dataset_info.json"
logging.getLogger("absl").addFilter(lambda record: _NOISE not in record.getMessage())
