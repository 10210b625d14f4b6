"""The handwritten digits that ship with scikit-learn, as a TFDS data set.

1,797 real digits of 8x8 pixels, written by 13 people (the test part of the UCI "Optical recognition of
handwritten digits" set, Alpaydin and Kaynak 1998). Nothing is downloaded and TensorFlow is not needed.

The splits are fixed and stratified. Of every ten examples of a class, in the order of the data set, the fifth
and the tenth are test examples and the first is a validation example. All three splits therefore hold digits
by the same people, and the test error says nothing about digits by other people.

    split         examples
    train            1,257
    validation         185
    test               355
"""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_SPLIT_OF_REMAINDER = {0: "validation", 4: "test", 9: "test"}


def split_names(labels):
    """The name of the split to which each example belongs. labels [N] -> list of N names."""
    seen = dict.fromkeys(np.unique(labels).tolist(), 0)
    names = []
    for label in labels.tolist():
        names.append(_SPLIT_OF_REMAINDER.get(seen[label] % 10, "train"))
        seen[label] += 1
    return names


class Digits(tfds.core.GeneratorBasedBuilder):
    """`tfds.builder("digits")`: image uint8 [8, 8, 1], white on black, and label 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels, bundled with scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the data ships with scikit-learn
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split):
        from sklearn.datasets import load_digits  # importing it takes two seconds

        images, labels = load_digits(return_X_y=True)
        # An intensity counts the black pixels in a 4x4 cell, 0 to 16.
        images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        for index, name in enumerate(split_names(labels)):
            if name == split:
                # TFDS needs TensorFlow to encode an array, but not to encode a PIL image.
                yield index, {"image": Image.fromarray(images[index]), "label": int(labels[index])}
