import numpy as np
import pytest
from sklearn.datasets import load_digits

from cnn_cases.data import splits
from cnn_cases.data.digits import split_names

SIZES = {"train": 1257, "validation": 185, "test": 355}


@pytest.mark.parametrize("split", SIZES)
def test_a_split_holds_its_own_examples_of_the_original(split, data_dir):
    images, labels, num_classes = splits.load_split("digits", split, data_dir)
    assert (images.shape, images.dtype, num_classes) == ((SIZES[split], 8, 8, 1), np.uint8, 10)
    pixels, digits = load_digits(return_X_y=True)
    mine = np.array(split_names(digits)) == split
    original = np.round(pixels[mine] * 255 / 16).astype(np.uint8)
    ours = {(row.tobytes(), label) for row, label in zip(images.reshape(-1, 64), labels, strict=True)}
    theirs = {(row.tobytes(), label) for row, label in zip(original, digits[mine], strict=True)}
    assert ours == theirs


def test_of_ten_the_fifth_and_the_tenth_are_test_examples_and_the_first_is_one_of_validation():
    ten = ["validation", *3 * ["train"], "test", *4 * ["train"], "test"]
    assert split_names(np.zeros(20, int)) == 2 * ten


def test_splits_are_stratified():
    labels = load_digits().target
    names = np.array(split_names(labels))
    for split, size in SIZES.items():
        shares = np.bincount(labels[names == split]) / np.bincount(labels)
        assert np.ptp(shares) < 0.02
        assert (names == split).sum() == size


def test_splits_do_not_depend_on_other_classes():
    labels = np.array([0] * 10 + [1] * 10)
    assert split_names(labels)[:10] == split_names(labels)[10:] == split_names(labels[:10])
