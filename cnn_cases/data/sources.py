"""TFDS sets: preparing them, opening them, and what is kept beside them."""

import functools
import importlib.util
import logging
import os
import pathlib
import re
import secrets
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

# "mnist", "imagenette/320px-v2", "digits:1.0.0". TFDS knows more: settings of a builder, and name spaces, to
# whose sets belongs code that it downloads.
_NAME = re.compile(r"[a-zA-Z]\w*(/\w[\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?")

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
        place = os.path.abspath(data_dir or tfds.core.constants.DATA_DIR)
        raise ValueError(
            f"data.name = {name!r} is no TFDS data set, nor is one of that name prepared in data.data_dir = "
            f"{place!r}; known are {', '.join(BUNDLED)} and the names that "
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
        try:
            builder = prepare(name, data_dir)
        finally:
            tfds.enable_progress_bar()
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data.name = {name!r} has no image and label; it has {', '.join(features)}")
    image, label = features["image"], features["label"]
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise ValueError(f"data.name = {name!r} has no images of one byte a channel, but {image}")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"data.name = {name!r} is no classification: its labels are {label}, and must be a "
            "tfds.features.ClassLabel"
        )
    return builder


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
    keep(path, functools.partial(np.savez, allow_pickle=False, **arrays))
    return arrays


def keep(path, save):
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
