"""Augmentations of image batches, as pure functions inside the jitted step.

Every random function takes one key per example, so the result for an example depends only on its own key
(and, where two examples are mixed, on the example before it). `Settings` lists the augmentations, and
`pixels` applies them in order. Section numbers of Simard's paper and of papers after 2012 are cited from
memory.

RandAugment-style policies are not included. The one JAX library that is still maintained, dm-pix (checked in
version 0.4.5), has no such policy, nor does augmax (0.4.1); imax has them, but is a pre-release from 2024.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.ndimage import map_coordinates

from cnn_cases import checks

# Each augmentation has its own stream of random numbers, so that switching one on does not change another.
# Append new streams at the end, which leaves the existing ones unchanged.
STREAMS = (
    "pad",
    "flip",
    "lighting",
    "order",
    "brightness",
    "contrast",
    "saturation",
    "affine",
    "elastic",
    "cutout",
    "mixup",
    "cutmix",
)
BASES = ("train", "imagenet")
# The covariance of ImageNet's colours in [0, 1]: its eigenvalues, and its eigenvectors in columns, with red,
# green and blue in rows (published in fb.resnet.torch, datasets/imagenet.lua).
IMAGENET_BASIS = (
    np.float32([0.2175, 0.0188, 0.0045]),
    np.float32([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]),
)


class Settings(NamedTuple):
    """The augmentations of training images; the defaults leave images unchanged.

    Attributes:
      pad: zero pixels added to every side before a random crop to the original size.
      flip: mirror each image left to right with probability 1/2.
      lighting: standard deviation of the multiples of the principal colours; AlexNet's is 0.1.
      lighting_basis: principal colours of the training images ("train"), or "imagenet".
      brightness, contrast, saturation: s, for factors in [1 - s, 1 + s]; Howard's are 0.5.
      shift: maximum translation along each axis, in pixels.
      scale: s, to enlarge by a factor in [1 - s, 1 + s].
      squeeze: s; the width is multiplied, and the height divided, by a factor in [1 - s, 1 + s].
      shear: maximum horizontal displacement, in pixels per row above or below the centre.
      elastic: pixels by which smoothed noise is multiplied, the alpha of Simard et al. 2003; theirs is 34.
      elastic_sigma: standard deviation, in pixels, of the Gaussian that smooths the noise; theirs is 4.
      cutout: side of the square that is cut out, in pixels.
      mixup: the alpha of Beta(alpha, alpha), from which the shares of two mixed examples are drawn.
      cutmix: the same, for the share of the image's area that comes from another example.
    """

    pad: int = 0
    flip: bool = False
    lighting: float = 0.0
    lighting_basis: str = "train"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    squeeze: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    elastic_sigma: float = 4.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0


def check(settings, image_shape):
    """Raises ValueError if images of shape [H, W, C] cannot be augmented with `settings`."""
    height, width, channels = image_shape

    def demand(is_right, key, allowed):
        if not is_right:
            raise ValueError(f"data.augment.{key} = {getattr(settings, key)!r} must be {allowed}")

    for key in ("pad", "lighting", "shift", "shear", "elastic", "cutout", "mixup", "cutmix"):
        checks.not_negative(f"data.augment.{key}", getattr(settings, key))
    for key in ("brightness", "contrast", "saturation"):
        demand(0 <= getattr(settings, key) <= 1, key, "in [0, 1]")
    for key in ("scale", "squeeze"):
        demand(0 <= getattr(settings, key) < 1, key, "in [0, 1)")
    checks.positive("data.augment.elastic_sigma", settings.elastic_sigma)
    side = min(height, width)
    up_to_side = f"at most {side}, the pixels of an image's side (data.image_size)"
    # A wider Gaussian moves all pixels alike, and takes long to compute.
    demand(settings.elastic_sigma <= side or not settings.elastic, "elastic_sigma", up_to_side)
    checks.one_of("data.augment.lighting_basis", settings.lighting_basis, BASES)
    for key in ("pad", "shift", "cutout"):
        demand(getattr(settings, key) <= side, key, up_to_side)
    for key in ("lighting", "saturation"):
        is_right = not getattr(settings, key) or channels == 3
        demand(is_right, key, f"0 for images of {channels} channels, not 3")
    demand(
        not (settings.mixup and settings.cutmix),
        "mixup",
        f"0, because data.augment.cutmix = {settings.cutmix!r}: use mixup or cutmix, not both",
    )


def example_keys(key, position):
    """One key per example. key, position [B] in the global batch -> keys [B]."""
    return jax.vmap(lambda p: jax.random.fold_in(key, p))(position)


def split_streams(keys):
    """Splits each example's key by augmentation: keys [B] -> {name in STREAMS: keys [B]}."""
    split = jax.vmap(lambda key: jax.random.split(key, len(STREAMS)))(keys)
    return {name: split[:, number] for number, name in enumerate(STREAMS)}


def colours(image, streams, settings, basis):
    """Applies photometric distortions and then lighting, in the order of Howard 2013.

    Args:
      image: float32 [B, H, W, C] in [0, 1].
      streams: from `split_streams`.
      settings: Settings.
      basis: the principal colours for `random_lighting`; None if it is off.
    """
    limits = settings.brightness, settings.contrast, settings.saturation
    if any(limits):
        image = random_photometric(image, streams, limits)
    if settings.lighting:
        image = random_lighting(image, streams["lighting"], settings.lighting, basis)
    return image


def geometry(image, streams, settings):
    """Applies the warp, the crop and the flip; pixels from outside are 0. [B, H, W, C] -> [B, H, W, C]."""
    if any((settings.shift, settings.scale, settings.squeeze, settings.shear, settings.elastic)):
        image = random_warp(image, streams, settings)
    if settings.pad:
        image = random_crop(image, streams["pad"], settings.pad)
    if settings.flip:
        image = random_flip(image, streams["flip"])
    return image


def random_crop(image, keys, pad):
    """Pads every side with `pad` zero pixels, crops at random to the original size (He et al. 2015, 4.2).

    Shapes: image [B, H, W, C], keys [B] -> [B, H, W, C], same dtype.
    """
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), -pad, pad + 1))(keys)
    # A TPU cuts slices one after another, which its compiler estimates to take a tenth of a ResNet-20's step.
    cut = functools.partial(_cut_slices, pad=pad)
    return lax.platform_dependent(image, offsets, tpu=_cut_by_products, default=cut)


def _cut_slices(image, offsets, pad):
    """Moves each image up and left by its offsets, int32 [B, 2] in [-pad, pad], and fills with zeros."""
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def crop(picture, offset):
        return lax.dynamic_slice(picture, (offset[0] + pad, offset[1] + pad, 0), image.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def _cut_by_products(image, offsets):
    """Computes the same with matrices of 0 and 1, one for the rows and one for the columns of each image."""

    def moves(size, offsets):
        return jax.vmap(lambda offset: jnp.eye(size, k=offset, dtype=image.dtype))(offsets)

    rows, columns = map(moves, image.shape[1:3], offsets.T)
    # At full precision the products and sums are exact.
    image = jnp.einsum("bij,bjwc->biwc", rows, image, precision=lax.Precision.HIGHEST)
    return jnp.einsum("bij,bhjc->bhic", columns, image, precision=lax.Precision.HIGHEST)


def random_flip(image, keys):
    """Mirrors left to right with probability one half. image [B, H, W, C], keys [B] -> [B, H, W, C]."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)


def random_lighting(image, keys, std, basis):
    """Adds one random mixture of the principal colours to all pixels (Krizhevsky et al. 2012, section 4.1).

    The mixture is sum_i alpha_i lambda_i p_i, where alpha_i is normal with standard deviation `std`, and
    lambda_i and p_i are the eigenvalues and eigenvectors of the colours' covariance. The paper does not give
    the range of its pixels, on which lambda_i, a square, depends; here it is [0, 1], as for IMAGENET_BASIS.

    Args:
      image: float32 [B, H, W, 3] in [0, 1]; the result can lie outside this range.
      keys: [B].
      std: standard deviation of alpha.
      basis: eigenvalues [3], and eigenvectors [3, 3] in columns.
    """
    values, vectors = basis
    alphas = std * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    colour = ((alphas * values)[:, None, :] * vectors).sum(axis=-1)
    return image + colour[:, None, None, :]


def random_photometric(image, streams, limits):
    """Changes brightness, contrast and saturation, in random order (Howard 2013, section 2.2).

    As in the paper, each change blends the image with one that lacks the property: black, the mean grey, or
    the image in grey. Each result is clipped to [0, 1]; without clipping the order would not matter.

    Args:
      image: float32 [B, H, W, C] in [0, 1]; C is 3 where saturation changes.
      streams: from `split_streams`.
      limits: s of the three, for factors drawn from [1 - s, 1 + s]; 0 leaves the property unchanged.
    """

    def factor(name, limit):
        return jax.vmap(lambda key: jax.random.uniform(key, minval=1 - limit, maxval=1 + limit))(
            streams[name]
        )

    properties = ("brightness", "contrast", "saturation")
    factors = jnp.stack(list(map(factor, properties, limits)), axis=-1)
    orders = jnp.array(list(itertools.permutations(range(3))))
    order = orders[jax.vmap(lambda key: jax.random.randint(key, (), 0, len(orders)))(streams["order"])]
    for which in order.T:
        which = which[:, None, None, None]
        grey = _grey(image)
        mean = grey.mean(axis=(1, 2), keepdims=True)
        without = jnp.where(which == 0, 0, jnp.where(which == 1, mean, grey))
        amount = jnp.take_along_axis(factors, which[:, :, 0, 0], axis=1)[:, :, None, None]
        image = jnp.clip(without + amount * (image - without), 0, 1)
    return image


def _grey(image):
    """[B, H, W, C] -> [B, H, W, 1]; for three channels the luma of ITU-R BT.601, as in PIL."""
    if image.shape[-1] != 3:
        return image.mean(axis=-1, keepdims=True)
    return (image * np.float32([0.299, 0.587, 0.114])).sum(axis=-1, keepdims=True)


def random_warp(image, streams, settings):
    """Distorts images as LeCun et al. 1998, section III.B, and Simard et al. 2003, section 2, distort MNIST.

    One bilinear sampling applies a planar affine map (translation, scaling, squeezing, horizontal shearing)
    about the centre and random displacements that are similar for neighbouring pixels. Pixels from outside
    are 0.

    Shapes: image float32 [B, H, W, C], streams from `split_streams` -> [B, H, W, C].
    """
    height, width = image.shape[1:3]
    centre = np.float32([(height - 1) / 2, (width - 1) / 2])
    rows = np.arange(height, dtype=np.float32)[:, None] - centre[0]
    columns = np.arange(width, dtype=np.float32)[None, :] - centre[1]

    def warp(picture, affine_key, elastic_key):
        draws = jax.random.uniform(affine_key, (5,), minval=-1, maxval=1)
        down, right = settings.shift * draws[:2]
        enlarged, widened = 1 + settings.scale * draws[2], 1 + settings.squeeze * draws[3]
        slant = settings.shear * draws[4]
        # The inverse map: where the pixel at (rows, columns) comes from.
        source_rows = (rows - down) * widened / enlarged
        source_columns = (columns - right) / (widened * enlarged) - slant * source_rows
        source = jnp.stack(jnp.broadcast_arrays(source_rows + centre[0], source_columns + centre[1]))
        if settings.elastic:
            source += elastic_field(elastic_key, height, width, settings.elastic, settings.elastic_sigma)

        def sample(channel):
            return map_coordinates(channel, list(source), order=1, mode="constant", cval=0.0)

        return jax.vmap(sample, in_axes=-1, out_axes=-1)(picture)

    return jax.vmap(warp)(image, streams["affine"], streams["elastic"])


def elastic_field(key, height, width, alpha, sigma):
    """Uniform noise in [-1, 1], smoothed by a Gaussian, times alpha (Simard et al. 2003, section 2).

    At sigma = 4 the displacements have a standard deviation of about 0.041 alpha pixels.

    Returns:
      float32 [2, height, width], displacements in pixels.
    """
    down, across = _smoothing(height, sigma), _smoothing(width, sigma)
    noise = jax.random.uniform(key, (2, down.shape[1], across.shape[1]), minval=-1, maxval=1)
    return alpha * (down @ noise @ across.T)


def _smoothing(size, sigma):
    """A matrix [size, size + 2 r] that smooths size + 2 r values; r is three standard deviations."""
    radius = math.ceil(3 * sigma)
    offsets = np.arange(size + 2 * radius)[None, :] - radius - np.arange(size)[:, None]
    weights = np.where(abs(offsets) <= radius, np.exp(-(offsets**2) / (2 * sigma**2)), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def random_cutout(image, keys, side):
    """Sets a square to 0 (DeVries & Taylor 2017, section 3.2).

    Its centre can be any pixel, so it can lie partly outside.

    Shapes: image [B, H, W, C], keys [B] -> [B, H, W, C].
    """
    sides = jnp.full((len(image), 2), side)
    return jnp.where(_random_boxes(keys, sides, image.shape[1:3]), 0, image)


def mix(image, label, streams, settings, num_classes, axis_name):
    """Mixes each example with the one before it in the global batch, by mixup or CutMix.

    The first example is mixed with the last.

    Args:
      image: float32 [B, H, W, C], a device's share of the batch.
      label: int32 [B].
      streams: from `split_streams`.
      settings: Settings, with either mixup or cutmix.
      num_classes: number of classes.
      axis_name: the axis over which the batch is split, in order; None if it is not split.

    Returns:
      The image, and the target, float32 [B, num_classes], whose rows sum to 1.
    """
    target = jax.nn.one_hot(label, num_classes)
    other_image, other_target = (_one_before(array, axis_name) for array in (image, target))
    if settings.mixup:
        share = random_shares(streams["mixup"], settings.mixup)
        mixed = _blend(image, other_image, share)
    else:
        mixed, share = random_cutmix(image, other_image, streams["cutmix"], settings.cutmix)
    return mixed, _blend(target, other_target, share)


def _blend(one, other, share):
    share = share.reshape(-1, *[1] * (one.ndim - 1))
    return share * one + (1 - share) * other


def _one_before(array, axis_name):
    last = array[-1:]
    if axis_name is not None:
        size = lax.axis_size(axis_name)
        last = lax.ppermute(last, axis_name, [(one, (one + 1) % size) for one in range(size)])
    return jnp.concatenate([last, array[:-1]])


def random_shares(keys, alpha):
    """Draws the shares that examples keep from Beta(alpha, alpha) (Zhang et al. 2018, 2). [B] -> [B]."""
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


def random_cutmix(image, other, keys, alpha):
    """Replaces a box of each image by that of another (Yun et al. 2019, section 3.1).

    The box has the proportions of the image, and its centre can be any pixel. The share of the area that the
    image keeps is drawn from Beta(alpha, alpha), and grows where the border cuts the box.

    Shapes: image and other [B, H, W, C], keys [B] -> [B, H, W, C], and the share of `image` in it [B].
    """
    keys = jax.vmap(jax.random.split)(keys)
    size = np.array(image.shape[1:3])
    sides = jnp.sqrt(1 - random_shares(keys[:, 0], alpha))[:, None] * size
    boxes = _random_boxes(keys[:, 1], sides.astype(jnp.int32), size)
    return jnp.where(boxes, other, image), 1 - boxes.mean(axis=(1, 2, 3))


def _random_boxes(keys, sides, size):
    """Boxes centred at any pixel. keys [B], sides [B, 2], size (H, W) -> bool [B, H, W, 1]."""

    def box(key, sides):
        def inside(key, side, length):
            start = jax.random.randint(key, (), 0, length) - side // 2
            place = np.arange(length)
            return (start <= place) & (place < start + side)

        row, column = map(inside, jax.random.split(key), sides, size)
        return (row[:, None] & column[None, :])[..., None]

    return jax.vmap(box)(keys, sides)
