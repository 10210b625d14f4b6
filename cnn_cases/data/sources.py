"""Prepares and opens TFDS data sets, and caches arrays next to them."""

import functools
import importlib.util
import logging
import os
import pathlib
import re
import secrets
import shlex
import sys
import zipfile
import zlib

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.extractor import ExtractError
from tensorflow_datasets.core.download.util import DownloadError

from cnn_cases.data import digits  # registers the builder

# "mnist", "imagenette/320px-v2", "digits:1.0.0". TFDS also accepts builder settings, and namespaces, whose
# data sets come with code that it downloads.
_NAME = re.compile(r"[a-zA-Z]\w*(/\w[\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?")

# Data sets that are prepared on first use; they need neither a download nor TensorFlow.
BUNDLED = (digits.Digits.name,)


def make_builder(name, data_dir):
    """Returns the TFDS builder of `name`, whose files are (or will be) below `data_dir`.

    Args:
      name: a TFDS name, with a config if the data set has several: "cifar10", "imagenette/320px-v2".
      data_dir: a directory; "" for TFDS's default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      ValueError: TFDS knows no such data set, or `data_dir` is a bucket, not a directory.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"data.name = {name!r} is not a name of a TFDS data set, such as 'mnist', "
            "'imagenette/320px-v2' or 'digits:1.0.0'"
        )
    # A shell does not expand the ~ of --data_dir=~/x, and TFDS that of $TFDS_DATA_DIR only in some places.
    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    if re.match(r"\w+:/", data_dir):
        raise ValueError(f"data.data_dir = {data_dir!r} must be a directory; mount the bucket first")
    try:
        # array_record files can be read without TensorFlow.
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        place = os.path.abspath(data_dir)
        raise ValueError(
            f"data.name = {name!r} is not a TFDS data set, and none of that name is prepared in "
            f"data.data_dir = {place!r}; known: {', '.join(BUNDLED)} and the names that "
            "`python -c 'import tensorflow_datasets as tfds; print(tfds.list_builders())'` lists"
        ) from None
    except (AssertionError, ValueError) as error:
        # An unknown version or config, or a data set that was prepared in TFDS's default format.
        raise ValueError(
            f"data.name = {name!r} cannot be opened in data.data_dir = {data_dir!r}: {error}; a set that was "
            "prepared in another format than array_record has to be prepared again, in another data_dir"
        ) from error


def prepare(name, data_dir=""):
    """Downloads and prepares a data set, unless it is already prepared.

    Raises:
      ValueError: there is no such data set, or TFDS lacks what it needs to prepare it: a package, or archives
        that only the user may download.
      ConnectionError: the download failed, or the set could not be written.
    """
    builder = make_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    stock = type(builder).__module__.startswith("tensorflow_datasets.")
    if stock and importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"TFDS needs TensorFlow, once, to prepare {name!r}; `make data DATASET={name}` has it in an "
            "environment of its own, or install it with `pip install tensorflow-cpu`"
        )
    downloader.MAX_RETRIES = 1  # by TFDS's default, a machine without network waits for minutes
    try:
        builder.download_and_prepare()
    # What TFDS raises if a manual download is missing, or a package that it needs to read an archive.
    except (AssertionError, ImportError) as error:
        raise ValueError(f"{name!r} cannot be prepared in {builder.data_path}: {error}") from error
    # RuntimeError: what array_record raises if the disk is full.
    except (OSError, RuntimeError, DownloadError, NonMatchingChecksumError, ExtractError) as error:
        if is_prepared(other := make_builder(name, data_dir)):  # another process was faster
            return other
        raise ConnectionError(
            f"{name!r} could not be prepared in {builder.data_path}: {type(error).__name__}: {error}"
        ) from error
    return builder


def is_prepared(builder):
    """Returns whether a set is prepared; TFDS's own function reads a bracket in its path as a pattern."""
    return (pathlib.Path(builder.data_path) / "dataset_info.json").exists()


def open_prepared(name, data_dir=""):
    """Returns the builder of a prepared set of labelled images; prepares a bundled one if necessary.

    Raises:
      ValueError: the data set is unknown or not prepared, or lacks classes or images of one byte per channel.
    """
    builder = make_builder(name, data_dir)
    if not is_prepared(builder):
        if builder.name not in BUNDLED:
            where = f" DATA_DIR={shlex.quote(data_dir)}" if data_dir else ""
            raise ValueError(
                f"data.name = {name!r} is not prepared in {builder.data_path}; "
                f"run `make data DATASET={name}{where}`"
            )
        tfds.disable_progress_bar()  # preparing takes a second
        try:
            builder = prepare(name, data_dir)
        finally:
            tfds.enable_progress_bar()
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data.name = {name!r} has no image and label; it has {', '.join(features)}")
    image, label = features["image"], features["label"]
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise ValueError(f"data.name = {name!r} must have images of one byte per channel, not {image}")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"data.name = {name!r} is not a classification data set: its labels are {label}, and must be a "
            "tfds.features.ClassLabel"
        )
    if label.num_classes < 2:  # every network would be right at once
        names = ", ".join(label.names) or "none"
        raise ValueError(f"data.name = {name!r} has fewer than two classes: {names}")
    return builder


def computed_once(name, data_dir, key, compute):
    """Computes arrays of a data set, or reads them from the file in which an earlier start stored them.

    Args:
      name, data_dir: see `make_builder`.
      key: the name of the file, unique among the arrays of the data set.
      compute: () -> {name: array}.
    """
    path = pathlib.Path(open_prepared(name, data_dir).data_path) / "decoded" / f"{key}.npz"
    try:
        # Opened here, because NumPy does not close a damaged file that it has opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error):
        pass  # missing or damaged; RuntimeError: a damaged header may claim that the file is encrypted
    arrays = compute()
    keep(path, functools.partial(np.savez, allow_pickle=False, **arrays))
    return arrays


def keep(path, save):
    """Lets `save` write a file, completely or not at all; if that fails, logs a warning."""
    try:
        path.parent.mkdir(exist_ok=True)
        # Renamed when complete, since another process may be reading or writing the same file. Python's own
        # temporary files would not be readable for other users of the data set.
        unfinished = path.with_name(f"{path.stem}-{secrets.token_hex(8)}{path.suffix}")
        try:
            with unfinished.open("xb") as file:
                save(file)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        logging.getLogger(__name__).warning("%s could not be saved for the next start: %s", path, error)


def _class_of_feature(name, of_tfds=tfds.features.FeatureConnector.cls_from_name):
    # A prepared data set names the classes of its features, and TFDS would import any module named there. The
    # data set may come from a stranger, with a module next to it.
    module = name.rpartition(".")[0]
    if module not in sys.modules and not module.startswith("tensorflow_datasets."):
        raise ValueError(
            f"features.json names the class {name}, which TFDS does not have; import its module first"
        )
    return of_tfds(name)


tfds.features.FeatureConnector.cls_from_name = staticmethod(_class_of_feature)

# TFDS warns at each start that an empty directory is empty.
_NOISE = "has no dataset_info.json"
logging.getLogger("absl").addFilter(lambda record: _NOISE not in record.getMessage())
