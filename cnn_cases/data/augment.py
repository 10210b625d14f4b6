"""Augmentations and normalisations of image batches, as pure functions inside the jitted step.

Every function that draws takes one key per example: what happens to an example depends on its own key alone.
"""

import jax
import jax.numpy as jnp
from jax import lax


def example_keys(key, position):
    """One key per example. key, position [B] in the global batch -> keys [B]."""
    return jax.vmap(lambda p: jax.random.fold_in(key, p))(position)


def random_crop(image, keys, pad):
    """Pads every side with `pad` zero pixels and crops at random to the old size (He et al. 2015, 4.2).

    Shapes: image [B, H, W, C], keys [B] -> [B, H, W, C], same dtype.
    """
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * pad + 1))(keys)

    def crop(picture, offset):
        return lax.dynamic_slice(picture, (offset[0], offset[1], 0), image.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def random_flip(image, keys):
    """Mirrors left and right with probability one half. image [B, H, W, C], keys [B] -> [B, H, W, C]."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)


def check(settings):
    """Raises ValueError where `augment` cannot do what `settings`, its keyword arguments, ask for."""
    if settings["pad"] < 0:
        raise ValueError(f"data.augment.pad = {settings['pad']} must be 0 or more")


def augment(image, keys, *, pad, flip):
    """The augmentations that the config asks for.

    Args:
      image: [B, H, W, C].
      keys: [B].
      pad: pixels around the image before the random crop; 0 for no crop.
      flip: mirror half of the images.
    """
    # Each augmentation draws from a stream of its own, so that switching one on does not change another.
    streams = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    if pad:
        image = random_crop(image, streams[:, 0], pad)
    if flip:
        image = random_flip(image, streams[:, 1])
    return image
