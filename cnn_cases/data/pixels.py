"""What happens to pixels inside the jitted step, whichever feed they come from."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cnn_cases.data import augment as augmentations

NORMALIZATIONS = ("none", "channel", "pixel_mean", "pixel_mean_255", "lenet5_1998")


class Pixels(NamedTuple):
    """The two ways from stored pixels to what a network sees.

    Attributes:
      arrays: what both need on the devices, to be handed to every step; often nothing.
      train: (arrays, image uint8 [B, H, W, C], label int32 [B], position int32 [B] in the global batch, key)
        -> image float32 [B, H, W, C], label int32 [B].
      evaluate: (arrays, image uint8 [B, H, W, C]) -> image float32 [B, H, W, C]; nothing is drawn.
    """

    arrays: dict[str, Any]
    train: Callable
    evaluate: Callable


def make_pixels(image, *, normalization, augment):
    """The pixel functions of a data set.

    Args:
      image: uint8 [N, H, W, C], the training images, or as many of them as statistics shall be taken from.
      normalization: one of NORMALIZATIONS. Images are scaled to [0, 1] ("none"); then "channel" subtracts the
        mean and divides by the standard deviation of each channel, "pixel_mean" subtracts the mean image (He
        et al. 2015, section 4.2), "pixel_mean_255" does so in the range [0, 255] (Krizhevsky et al. 2012,
        section 2, whose small initial weights need it), and "lenet5_1998" puts black at -0.1 and white at
        1.175 (LeCun et al. 1998, section II.B).
      augment: the settings of `augment.augment`, a mapping.

    Raises:
      ValueError: a normalisation or an augmentation is unknown, or a value is out of range.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"data.normalization = {normalization!r} is unknown; known: {', '.join(NORMALIZATIONS)}"
        )
    augment = dict(**augment)
    augmentations.check(augment)
    normalize = functools.partial(_normalize, *_statistics(image, normalization))

    def train(arrays, image, label, position, key):
        del arrays
        keys = augmentations.example_keys(key, position)
        return normalize(augmentations.augment(image, keys, **augment)), label

    def evaluate(arrays, image):
        del arrays
        return normalize(image)

    return Pixels({}, train, evaluate)


def _normalize(mean, std, image):
    return (image.astype(jnp.float32) / 255 - mean) / std


def _statistics(images, normalization):
    """Mean and standard deviation of images in [0, 1], to subtract and to divide by."""
    if normalization == "none":
        return np.float32(0), np.float32(1)
    if normalization == "lenet5_1998":
        return np.float32(0.1 / 1.275), np.float32(1 / 1.275)
    if normalization in ("pixel_mean", "pixel_mean_255"):
        divisor = 1 / 255 if normalization == "pixel_mean_255" else 1
        return (images.mean(axis=0) / 255).astype(np.float32), np.float32(divisor)
    # From the counts of the 256 values: exact, and without a float copy of the images.
    values = np.arange(256) / 255
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    mean = np.array([np.average(values, weights=count) for count in counts])
    variance = np.array(
        [np.average((values - m) ** 2, weights=count) for m, count in zip(mean, counts, strict=True)]
    )
    return mean.astype(np.float32), np.maximum(np.sqrt(variance), 1e-6).astype(np.float32)
