"""Checks the splits of prepared data sets, and reads them, whole or one example at a time."""

import contextlib
import functools
import itertools
import math
import pathlib
import re
import resource
import tokenize
import zlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cnn_cases.data import decode, memory, sources

# array_record keeps every file open that it has read from. ImageNet has 1,088, and many systems let a process
# open 1,024 unless it asks for more.
OPEN_FILES = 10_240  # asked for: an ensemble opens the files once for each network
OTHER_FILES = 256  # room for what else a process opens


def check_disjoint(name, splits, data_dir=""):
    """Rejects splits that share examples, and a split that contains examples twice.

    No run may train on held-out examples, or choose a checkpoint by test examples.

    Args:
      name, data_dir: see `sources.make_builder`.
      splits: {role: TFDS split expression}.

    Raises:
      ValueError: a split cannot be read or contains examples twice, or two splits share examples.
    """
    builder = sources.open_prepared(name, data_dir)
    parts = [
        (role, part)
        for role, split in splits.items()
        for part in _parts(builder, split, f"data.splits.{role} = ")
    ]
    for (one, (base, start, end)), (other, (other_base, other_start, other_end)) in itertools.combinations(
        parts, 2
    ):
        shared = min(end, other_end) - max(start, other_start) if base == other_base else 0
        if shared > 0 and one == other:
            raise ValueError(
                f"data.splits.{one} = {splits[one]!r} has {shared} examples of {name!r} twice; name each once"
            )
        if shared > 0:
            raise ValueError(
                f"data.splits.{one} = {splits[one]!r} and data.splits.{other} = {splits[other]!r} share "
                f"{shared} examples of {name!r}; an honest evaluation needs examples that were held out"
            )


def allow_open_files(name, splits, data_dir=""):
    """Lets this process, and those that it starts, have all files of splits open at once.

    Args:
      name, data_dir: see `sources.make_builder`.
      splits: {role: TFDS split expression}.

    Raises:
      ValueError: the system does not allow so many, or a split cannot be read.
    """
    builder = sources.open_prepared(name, data_dir)
    parts = [part for split in splits.values() for part in _parts(builder, split)]
    num_files = sum(builder.info.splits[base].num_shards for base in {base for base, *_ in parts})
    needed = num_files + len(parts) + OTHER_FILES  # parts that meet in a file both open it
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if needed > hard:
        raise ValueError(
            f"{name!r} has {num_files:,} files in {', '.join(splits.values())}, all of which a run has open "
            f"at once, and this system lets a process open {hard:,} (`ulimit -Hn`); raise that limit, or "
            "prepare the set with fewer shards"
        )
    if soft < (asked := min(hard, max(needed, OPEN_FILES))):
        resource.setrlimit(resource.RLIMIT_NOFILE, (asked, limits[1]))


def check_resident(name, splits, data_dir="", image_size=0, border=0):
    """Rejects splits that together do not fit into this machine's memory.

    Args:
      name, data_dir, image_size, border: see `load_split`.
      splits: {role: TFDS split expression}.

    Raises:
      ValueError: they do not fit, or the data set or one of its splits cannot be opened.
    """
    builder = sources.open_prepared(name, data_dir)
    *sides, channels = builder.info.features["image"].shape
    if not image_size and None in sides:
        return  # `load_split` sees their size
    shape = (*((image_size or side) + 2 * border for side in sides), channels)
    count = sum(end - start for split in splits.values() for _, start, end in _parts(builder, split))
    # Held twice: as loaded, for the next run of a study, and concatenated, for this run.
    memory.check(count, shape, "data.image_size and data.border, or take data.feed = 'stream'", twice=True)


@functools.lru_cache(maxsize=4)
def load_split(name, split, data_dir="", image_size=0, border=0):
    """Loads a whole split into memory, and caches it, because many runs of a study share one.

    Args:
      name, data_dir: see `sources.make_builder`.
      split: a TFDS split expression, such as "train" or "train[:90%]".
      image_size: height and width, in pixels, to which images are resized (bilinear); 0 keeps their size.
      border: zero pixels then added to every side, as LeNet-5 pads 28x28 digits to 32x32.

    Returns:
      image uint8 [N, H, W, C], label int32 [N], and the number of classes.

    Raises:
      ValueError: the data set is unknown or not prepared, or has no such split, no images in grey or RGB, or
        no labels; its images differ in size, or do not fit into memory.
    """
    builder = sources.open_prepared(name, data_dir)
    _check_channels(name, builder)
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
    return images, labels, builder.info.features["label"].num_classes


def open_split(name, split, data_dir=""):
    """Opens a split, to read its records one at a time from disk; their images stay encoded.

    Args:
      name, split, data_dir: see `load_split`.

    Returns:
      A sequence of {"image": bytes, "label": int, ...} that can be sent to other processes, and the features.

    Raises:
      ValueError: the data set is unknown or not prepared, or has no such split, no images in grey or RGB, or
        no labels.
    """
    builder = sources.open_prepared(name, data_dir)
    _check_channels(name, builder)
    _parts(builder, split)
    features = builder.info.features
    source = _open(builder, split)
    try:
        first_label = source[0]["label"]
    except RuntimeError:
        return source, features  # the first record is damaged; its reader will report it
    _check_labels(name, split, first_label)
    return source, features


def _open(builder, split):
    """The records of a split; only their labels are decoded, since nothing here needs a mask or a sound."""
    others = {name: feature for name, feature in builder.info.features.items() if name != "label"}
    return builder.as_data_source(split, decoders={name: _as_stored(one) for name, one in others.items()})


def _as_stored(feature):
    """The decoders that leave a feature, and those of which it consists, as they are stored."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _as_stored(one) for name, one in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        return _as_stored(feature.feature)
    return _AsStored()


class _AsStored(tfds.decode.SkipDecoding):
    """Also for features in a sequence, for which TFDS has it only with TensorFlow."""

    decode_batch_example_np = decode_ragged_example_np = tfds.decode.SkipDecoding.decode_example_np


def _check_channels(name, builder):
    image = builder.info.features["image"]
    if image.shape[-1] not in (1, 3):
        raise ValueError(
            f"the images of {name!r} are neither grey nor RGB: {image}; let its builder declare 1 or 3"
        )


def _check_labels(name, split, labels):
    missing = np.less(labels, 0)  # what TFDS stores for missing labels, as in ImageNet's test split
    if np.all(missing):
        raise ValueError(f"split {split!r} of {name!r} has no labels")
    if np.any(missing):
        raise ValueError(
            f"{missing.sum():,} of the {missing.size:,} examples in split {split!r} of {name!r} have no "
            "label; data.feed = 'stream' can skip them (data.stream.max_damaged)"
        )


def _parts(builder, split, prefix=""):
    """Parses a split expression into its parts: [(name of a whole split, first, end)].

    Args:
      builder: a TFDS builder.
      split: a split expression.
      prefix: text that error messages put before the expression.

    Raises:
      ValueError: the data set has no such split, or the split is empty.
    """
    strange = [base for base in builder.info.splits if not re.fullmatch(r"\w[\w.-]*", base)]
    if strange:  # they become file names
        raise ValueError(f"{builder.data_path} has a split named {strange[0]!r}, which is not a word")
    try:
        absolute = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except (ValueError, KeyError, NotImplementedError) as error:  # TFDS's last is for a part of 'all'
        raise ValueError(
            f"{prefix or 'split '}{split!r} of {builder.info.name!r} cannot be read: it has "
            f"{', '.join(builder.info.splits)} ({' '.join(str(error).split())})"
            + ("; name others, as in 'train[90%:]', or '' to leave this split out" if prefix else "")
        ) from error
    parts = []
    for part in absolute:
        size = builder.info.splits[part.splitname].num_examples
        parts.append((part.splitname, part.from_ or 0, size if part.to is None else part.to))
    if any(start > end for _, start, end in parts):  # some of TFDS's readers fail on it
        raise ValueError(
            f"{prefix or 'split '}{split!r} of {builder.info.name!r} has a part that ends before it starts"
        )
    if all(start == end for _, start, end in parts):
        raise ValueError(f"{prefix or 'split '}{split!r} of {builder.info.name!r} has no examples")
    return parts


def _decode(builder, split, image_size=0):
    """Images uint8 [N, H, W, C] and labels int32 [N] of a split; `image_size` 0: no resizing."""
    images, labels = None, []
    for image, label in _examples(builder, split):
        kept = resize(image, image_size, image_size) if image_size else image
        if images is None:  # filled in place, because stacking a list would take twice the memory
            count = sum(end - start for _, start, end in _parts(builder, split))
            memory.check(count, kept.shape, "data.feed to 'stream'")
            images = np.empty((count, *kept.shape), np.uint8)
        if kept.shape != images.shape[1:]:
            raise ValueError(_unlike(builder, images[0], image))
        images[len(labels)] = kept
        labels.append(label)
    return images, np.array(labels, np.int32)


def _unlike(builder, one, other):
    """Says why two images of a data set cannot be in one array, and what helps."""
    declared, name = builder.info.features["image"].shape, builder.info.name
    shapes = ["x".join(map(str, image.shape)) for image in (one, other)]
    difference = f"the images of {name!r} differ in size ({', '.join(shapes)})"
    if None not in declared:  # TFDS does not check it, and such a set is decoded before it is resized
        return (
            f"{difference}, but its builder declares {declared}; declare (None, None, {declared[-1]}) for "
            "images of any size, and prepare the set again with a higher VERSION"
        )
    return f"{difference}; set data.image_size to resize them"


def _examples(builder, split):
    """Yields image uint8 [H, W, C] and label of each example of a split, decoded as in a stream."""
    channels = builder.info.features["image"].shape[-1]
    try:
        source = _open(builder, split)
        # Reading many at once is three times as fast as one by one; reading all at once fills the memory.
        for first in range(0, len(source), 1000):
            examples = source.__getitems__(range(first, min(first + 1000, len(source))))
            for number, example in enumerate(examples, start=first):
                what = f"example {number} of {builder.info.name!r}, {split!r}"
                yield _decoded(example, channels, what), example["label"]
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{builder.data_path} is damaged ({error}); delete it and prepare {builder.info.name!r} again"
        ) from error


def _decoded(example, channels, what):
    try:
        return decode.decode(example["image"], channels)
    except ValueError as error:
        file = decode.file_of(example)
        reason = f"{file}: {error}" if file else error
        raise ValueError(
            f"{what}, is damaged: {reason}; data.feed = 'stream' can skip it (data.stream.max_damaged)"
        ) from error


def _decode_once(builder, base):
    """Images uint8 [N, H, W, C] and labels int32 [N] of a whole split, cached next to the prepared data set.

    Reading CIFAR-10's decoded pixels takes a tenth of a second, decoding them several seconds. If the data
    set's files have changed since, or the cached ones are damaged, they are decoded again.
    """
    place = pathlib.Path(builder.data_path)
    files = sorted(place.glob(f"*-{base}.*"))
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = f"{zlib.crc32(repr(told).encode()):08x}"
    names = ("image", "label", "checksums")
    paths = [place / "decoded" / f"{base}-{name}-{version}.npy" for name in names]
    shape = (builder.info.splits[base].num_examples, *builder.info.features["image"].shape)
    try:
        *arrays, checksums = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        images, labels = arrays
        is_sound = (images.shape, images.dtype, labels.shape) == (shape, np.uint8, shape[:1])
        if is_sound and np.array_equal(checksums, _checksums(arrays)):
            return images, labels
    except (OSError, ValueError, EOFError, tokenize.TokenError):
        pass  # missing, incomplete or with a damaged header, which NumPy reads as Python's tokens
    arrays = _decode(builder, base)
    for name, path, array in zip(names, paths, [*arrays, _checksums(arrays)], strict=True):
        sources.keep(path, functools.partial(np.save, arr=array, allow_pickle=False))
        current = set(path.parent.glob(f"{path.stem}*.npy"))  # another process may just be writing it
        for other in set(path.parent.glob(f"{base}-{name}*.npy")) - current:
            with contextlib.suppress(OSError):
                other.unlink()  # decoded from earlier files
    return arrays


def _checksums(arrays):
    return np.array([zlib.crc32(np.ascontiguousarray(array)) for array in arrays])


def resize(image, height, width):
    """Resizes an image uint8 [h, w, C] (bilinear; when shrinking, each pixel averages the area it covers)."""
    channels = [Image.fromarray(image[..., channel]) for channel in range(image.shape[-1])]
    return np.stack([channel.resize((width, height), Image.Resampling.BILINEAR) for channel in channels], -1)
