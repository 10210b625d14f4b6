"""A TFDS set of small pictures in the formats and sizes that photographs come in; two of them are damaged."""

import io
import re

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cnn_cases.data import splits

SIZES = {"train": 24, "test": 11}
DAMAGED = {"train": (5, 17), "test": (3,)}


def picture(index, mode="RGB"):
    """A picture of its own size and colours, with one of four labels."""
    height, width = 20 + 3 * (index % 5), 24 + 5 * (index % 3)
    rng = np.random.default_rng(index)
    colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(index, image_format="JPEG", mode="RGB"):
    file = io.BytesIO()
    picture(index, mode).save(file, image_format, quality=90)
    return file.getvalue()


def contents(split, index):
    """The bytes of a record: JPEG, now and then in CMYK, in grey or as PNG; half a file for the damaged."""
    if index in DAMAGED[split]:
        return encoded(index)[:300]
    kinds = {1: ("JPEG", "CMYK"), 2: ("JPEG", "L"), 4: ("PNG", "RGB"), 6: ("PNG", "RGBA")}
    return encoded(index, *kinds.get(index, ("JPEG", "RGB")))


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """`tfds.builder("tiny_photos")`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=4),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        for index in range(SIZES[split]):
            image = io.BytesIO(contents(split, index))
            yield index, {"image": image, "label": index % 4, "file_name": f"{split}_{index}.jpg"}


def file_number(directory, split, index):
    """The number that is in the name of a record; TFDS shuffles them."""
    record = splits.open_split("tiny_photos", split, directory)[0][index]
    return int(re.search(r"_(\d+)", record["file_name"].decode())[1])


def damaged_indices(directory, split):
    numbers = {index: file_number(directory, split, index) for index in range(SIZES[split])}
    return [index for index, number in numbers.items() if number in DAMAGED[split]]
