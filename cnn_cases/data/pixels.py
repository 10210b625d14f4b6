"""Augmentation and normalisation inside the jitted step, the same for all feeds."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn_cases import checks
from cnn_cases.data import augment as augmentations

NORMALIZATIONS = (
    "none",
    "channel",
    "pixel_mean",
    "pixel_mean_255",
    "lenet5_1998",
    "imagenet",
    "gcn_zca",
)
# Of the channels of ImageNet's training images in [0, 1] (from fb.resnet.torch, datasets/imagenet.lua). These
# are the usual constants; over all pixels the deviations are larger, 0.284, 0.276 and 0.290 according to
# `augment.IMAGENET_BASIS`, so the network's inputs have a standard deviation of about 1.25.
IMAGENET_MEAN = np.float32([0.485, 0.456, 0.406])
IMAGENET_STD = np.float32([0.229, 0.224, 0.225])
# The norm of an image, and the constant added to the variances, in pylearn2, with which Goodfellow et al.
# 2013 preprocessed CIFAR-10 (scripts/datasets/make_cifar10_gcn_whitened.py).
GCN_SCALE = 55.0
ZCA_BIAS = 0.1
MAX_WHITENED = 16_384  # values of an image; the whitening matrix has as many rows and columns


class Pixels(NamedTuple):
    """The functions that turn stored pixels into a network's input, in training and in evaluation.

    Attributes:
      statistics: the normalisation's statistics of the training images; all that `make_normalize` needs.
      arrays: arrays that both functions need on the devices, an argument of every step; often empty.
      train: (arrays, image uint8 [B, H, W, C], label int32 [B], position int32 [B] in the global batch, key)
        -> image float32 [B, H, W, C], label int32 [B], or, where examples are mixed, the target float32
        [B, num_classes].
      evaluate: (arrays, image uint8 [B, H, W, C], also of `views`) -> image float32 [B, H, W, C];
        deterministic.
    """

    statistics: dict[str, Any]
    arrays: dict[str, Any]
    train: Callable
    evaluate: Callable


def make_pixels(
    image, *, normalization, augment, num_classes, axis_name=None, keep=lambda _, compute: compute()
):
    """Makes the pixel functions of a data set.

    Args:
      image: uint8 [N, H, W, C], the training images, or a sample of them, from which to compute statistics.
      normalization: one of NORMALIZATIONS. Images are scaled to [0, 1] ("none"); then "channel" subtracts the
        mean and divides by the standard deviation of each channel, "imagenet" does so with ImageNet's,
        "pixel_mean" subtracts the mean image (He et al. 2015, section 4.2), "pixel_mean_255" does so in the
        range [0, 255] (Krizhevsky et al. 2012, section 2, whose small initial weights need it),
        "lenet5_1998" puts black at -0.1 and white at 1.175 (LeCun et al. 1998, section II.B), and "gcn_zca"
        is global contrast normalisation and ZCA whitening (Goodfellow et al. 2013, followed by Lin et al.
        2013, section 4.2).
      augment: the `augment.Settings`, as a mapping.
      num_classes: number of classes.
      axis_name: the axis over which a training batch is split; None if it is not split.
      keep: (key, compute) -> the arrays {name: array} that `compute()` returns, possibly a copy that an
        earlier start stored under the key; by default nothing is stored.

    Raises:
      ValueError: a normalisation or an augmentation is unknown, a value is out of range, or the images are
        not suitable.
    """
    checks.one_of("data.normalization", normalization, NORMALIZATIONS)
    if normalization == "imagenet" and image.shape[-1] != 3:
        raise ValueError(
            f"data.normalization = 'imagenet' is for images of 3 channels; these have {image.shape[-1]}"
        )
    if normalization == "gcn_zca" and image[0].size > MAX_WHITENED:
        raise ValueError(
            f"data.normalization = 'gcn_zca' is for images of at most {MAX_WHITENED:,} values; these of "
            f"{'x'.join(map(str, image.shape[1:]))} have {image[0].size:,} (data.image_size, data.border)"
        )
    settings = augmentations.Settings(**augment)
    augmentations.check(settings, image.shape[1:])
    basis = None
    if settings.lighting:
        if settings.lighting_basis == "imagenet":
            basis = augmentations.IMAGENET_BASIS
        else:
            kept = keep(
                f"colours-{_digest(image)}",
                lambda: dict(zip(("values", "vectors"), colour_basis(image), strict=True)),
            )
            basis = kept["values"], kept["vectors"]
    if normalization == "gcn_zca":
        # The key contains the constants that determine the matrix, since another version may change them.
        key = f"zca-{GCN_SCALE:g}-{ZCA_BIAS:g}-{_digest(image)}"
        statistics = arrays = keep(key, lambda: _whitening(image))
    else:
        statistics, arrays = dict(zip(("mean", "std"), _statistics(image, normalization), strict=True)), {}
    normalize = make_normalize(statistics)
    # Statistics that differ between positions are subtracted before the crop moves the pixels: in the papers,
    # crops are taken from normalised images, padded with zeros. Otherwise the padding is black.
    by_place = "zca_mean" in statistics or statistics["mean"].ndim == 3

    def train(arrays, image, label, position, key):
        streams = augmentations.split_streams(augmentations.example_keys(key, position))
        image = augmentations.colours(to_unit(image), streams, settings, basis)
        if by_place:
            image = normalize(arrays, image)
        image = augmentations.geometry(image, streams, settings)
        if not by_place:
            image = normalize(arrays, image)
        if settings.cutout:
            # After the normalisation, where 0 is the mean and so carries no information.
            image = augmentations.random_cutout(image, streams["cutout"], settings.cutout)
        if settings.mixup or settings.cutmix:
            # Last: both papers mix the network's inputs. Most normalisations could just as well come
            # after, but not the contrast normalisation, which is not affine, nor the cutout.
            image, label = augmentations.mix(image, label, streams, settings, num_classes, axis_name)
        return image, label

    def evaluate(arrays, image):
        return normalize(arrays, to_unit(image))

    return Pixels(statistics, arrays, train, evaluate)


def make_normalize(statistics):
    """Makes a normalisation: (arrays, image float32 [B, H, W, C] in [0, 1]) -> float32 [B, H, W, C].

    Args:
      statistics: those of `Pixels`: "mean" and "std", float32, of any shape that broadcasts to [H, W, C]; or
        the result of `_whitening`, of which `arrays` must then be a copy.
    """
    if "zca_mean" in statistics:
        return _whiten
    mean, std = statistics["mean"], statistics["std"]

    def normalize(arrays, image):
        del arrays
        here = mean
        if mean.ndim == 3 and mean.shape != image.shape[1:]:
            # For images of another size, only the mean colour of the mean image is meaningful.
            here = mean.mean(axis=(0, 1))
        return (image - here) / std

    return normalize


def to_unit(image):
    """uint8 -> float32 in [0, 1]."""
    return image.astype(jnp.float32) / 255


def _statistics(images, normalization):
    """The mean to subtract from images in [0, 1], and the standard deviation to divide by."""
    if normalization == "none":
        return np.float32(0), np.float32(1)
    if normalization == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    if normalization == "lenet5_1998":
        return np.float32(0.1 / 1.275), np.float32(1 / 1.275)
    if normalization in ("pixel_mean", "pixel_mean_255"):
        divisor = 1 / 255 if normalization == "pixel_mean_255" else 1
        return (images.mean(axis=0) / 255).astype(np.float32), np.float32(divisor)
    # Computed from the counts of the 256 values, which is exact and needs no float copy of the images. They
    # are counted in parts, because bincount makes a copy with eight bytes per value.
    values = np.arange(256) / 255
    counts = [
        sum(np.bincount(part[..., c].ravel(), minlength=256) for part in _parts(images, 100))
        for c in range(images.shape[-1])
    ]
    mean = np.array([np.average(values, weights=count) for count in counts])
    variance = np.array(
        [np.average((values - m) ** 2, weights=count) for m, count in zip(mean, counts, strict=True)]
    )
    return mean.astype(np.float32), np.maximum(np.sqrt(variance), 1e-6).astype(np.float32)


def colour_basis(images):
    """The principal colours of images, for `augment.random_lighting`.

    Args:
      images: uint8 [N, H, W, C].

    Returns:
      The eigenvalues [C] of the covariance of their colours in [0, 1], the largest first, and the
      eigenvectors [C, C] in columns.
    """
    channels = images.shape[-1]
    total, squares = np.zeros(channels), np.zeros((channels, channels))
    for part in _parts(images):
        colours = part.reshape(-1, channels).astype(np.float64) / 255
        total += colours.sum(axis=0)
        squares += colours.T @ colours
    count = images.size // channels
    mean = total / count
    values, vectors = np.linalg.eigh(squares / count - np.outer(mean, mean))
    return values[::-1].astype(np.float32), vectors[:, ::-1].astype(np.float32)


def _digest(images):
    """A short hash of the content of images."""
    content = hashlib.blake2b(str(images.shape).encode(), digest_size=8)
    content.update(np.ascontiguousarray(images))
    return content.hexdigest()


def _parts(images, size=1_000):
    """The images in parts small enough for a float copy."""
    return (images[first : first + size] for first in range(0, len(images), size))


def contrast_normalized(image, xp=jnp):
    """Scales each image to mean 0 and norm GCN_SCALE, over all pixels and channels together.

    Args:
      image: float32 [B, H, W, C]; an image whose values are all equal becomes 0.
      xp: the module that computes, jax.numpy or numpy.
    """
    centred = image - image.mean(axis=(1, 2, 3), keepdims=True)
    divisor = xp.sqrt((centred**2).sum(axis=(1, 2, 3), keepdims=True)) / GCN_SCALE
    # pylearn2's limit is 1e-8, for exact arithmetic; a single grey level of 1/255 in one pixel gives 7e-5.
    return centred / xp.where(divisor < 1e-6, 1, divisor)


def _whiten(arrays, image):
    mean, matrix = arrays["zca_mean"], arrays["zca_matrix"]
    if image.shape[1:] != mean.shape:
        raise ValueError(
            f"data.normalization = 'gcn_zca' whitens images of the training images' shape {mean.shape}, "
            f"and these have {image.shape[1:]}"
        )
    flat = (contrast_normalized(image) - mean).reshape(len(image), -1)
    return jnp.matmul(flat, matrix, precision=lax.Precision.HIGHEST).reshape(image.shape)


def _whitening(images):
    """The arrays that `_whiten` needs, for training images uint8 [N, H, W, C].

    With D = H W C, these are {"zca_mean": float32 [H, W, C], "zca_matrix": float32 [D, D]}. The
    contrast-normalised images have the covariance V diag(lambda) V^T, and the matrix is
    V diag((lambda + 0.1)^(-1/2)) V^T. For CIFAR-10 it takes 38 MB, so it is an argument of the step and not a
    constant in it.
    """
    size = images[0].size

    def flat(part):
        return contrast_normalized(part.astype(np.float32) / 255, np).reshape(-1, size)

    mean = sum(flat(part).sum(axis=0, dtype=np.float64) for part in _parts(images)) / len(images)
    mean = mean.astype(np.float32)
    covariance = np.zeros((size, size))
    for part in _parts(images):
        centred = flat(part) - mean
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance / len(images))
    # Rounding can make an eigenvalue of 0 negative.
    matrix = (vectors / np.sqrt(np.maximum(values, 0) + ZCA_BIAS)) @ vectors.T
    return {"zca_mean": mean.reshape(images.shape[1:]), "zca_matrix": matrix.astype(np.float32)}
