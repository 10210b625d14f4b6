"""A feed for sets that fit in device memory.

The images live on the device as uint8; a batch is a list of indices. Gathering, augmentation and
normalisation happen inside the jitted step. A feed has the same calls whatever its kind:

    feed.arrays                        what lives on the devices, an argument of every step
    feed.train_batch(seed, step)       the batch of a training step, a pure function of its arguments
    feed.eval_batches(role)            the batches of a whole split, padded and masked
    feed.prepare(arrays, batch, key)   a batch -> image, label, inside the step
"""

import functools

import jax.numpy as jnp
import numpy as np

from cnn_cases.data import augment as augmentations
from cnn_cases.data import sources

NORMALIZATIONS = ("none", "channel", "pixel_mean", "pixel_mean_255", "lenet5_1998")


class ResidentFeed:
    """Whole splits in memory, drawn by index.

    Attributes:
      arrays: {"image": uint8 [N, H, W, C], "label": int32 [N]}, the splits one after another.
      image_shape: (H, W, C).
      num_classes: number of classes.
    """

    def __init__(
        self, splits, *, num_classes, batch_size, eval_batch_size, normalization="none", pad=0, flip=False
    ):
        """Takes whole splits.

        Args:
          splits: {role: (image uint8 [N, H, W, C], label int32 [N])}, with the role "train" among them.
          num_classes: number of classes.
          batch_size: examples of a training step, over all devices.
          eval_batch_size: examples of an evaluation step, over all devices.
          normalization: one of NORMALIZATIONS, computed from the training split. Images are scaled to [0, 1]
            ("none"); then "channel" subtracts the mean and divides by the standard deviation of each
            channel, "pixel_mean" subtracts the mean image (He et al. 2015, section 4.2), "pixel_mean_255"
            does so in the range [0, 255] (Krizhevsky et al. 2012, section 2, whose small initial weights need
            it), and "lenet5_1998" puts black at -0.1 and white at 1.175 (LeCun et al. 1998, section II.B).
          pad, flip: see `augment.augment`.

        Raises:
          ValueError: a batch is larger than the training split, a value is out of range, or a
            normalisation is unknown.
        """
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"data.normalization = {normalization!r} is unknown; known: {', '.join(NORMALIZATIONS)}"
            )
        if pad < 0:
            raise ValueError(f"data.pad = {pad} must be 0 or more")
        self._num_train = len(splits["train"][0])
        if not 1 <= batch_size <= self._num_train:
            raise ValueError(
                f"batch_size = {batch_size} must be between 1 and the {self._num_train} training examples"
            )
        if eval_batch_size < 1:
            raise ValueError(f"evaluation.batch_size = {eval_batch_size} must be 1 or more")
        self.num_classes = num_classes
        self.image_shape = splits["train"][0].shape[1:]
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._ranges, start = {}, 0
        for role, (images, _) in splits.items():
            self._ranges[role] = range(start, start + len(images))
            start += len(images)
        # One array for all splits: a step that takes it is compiled once, not once a split.
        self.arrays = {
            "image": np.concatenate([images for images, _ in splits.values()]),
            "label": np.concatenate([labels for _, labels in splits.values()]),
        }
        mean, std = _statistics(splits["train"][0], normalization)
        self.prepare = functools.partial(_prepare, mean=mean, std=std, pad=pad, flip=flip)

    def train_batch(self, seed, step):
        """The batch of training step `step` (the first is 0).

        Each epoch is a permutation of its own; the batch that an epoch's end cuts takes its rest from the
        next one, so every example is seen equally often.

        Returns:
          {"index": int32 [batch_size], "position": int32 [batch_size] in the global batch}.
        """
        epoch, first = divmod(step * self._batch_size, self._num_train)
        order = _permutation(seed, epoch, self._num_train)[first : first + self._batch_size]
        if len(order) < self._batch_size:
            rest = _permutation(seed, epoch + 1, self._num_train)[: self._batch_size - len(order)]
            order = np.concatenate([order, rest])
        index = order + self._ranges["train"].start
        return {"index": index.astype(np.int32), "position": np.arange(self._batch_size, dtype=np.int32)}

    def eval_batches(self, role):
        """The batches of a whole split: {"index": int32 [eval_batch_size], "mask": float32 [...]}.

        The mask is 1 for every example exactly once, and 0 for the padding of the last batch.
        """
        indices = np.asarray(self._ranges[role], np.int32)
        for first in range(0, len(indices), self._eval_batch_size):
            index = indices[first : first + self._eval_batch_size]
            padding = (0, self._eval_batch_size - len(index))
            mask = np.pad(np.ones(len(index), np.float32), padding)
            yield {"index": np.pad(index, padding, mode="edge"), "mask": mask}


@functools.lru_cache(maxsize=4)  # an epoch's order is asked for at each of its steps
def _permutation(seed, epoch, size):
    return np.random.default_rng((seed, epoch)).permutation(size)


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


def _prepare(arrays, batch, key, *, mean, std, pad, flip):
    """Inside the step: indices -> image float32 [B, H, W, C] and label int32 [B].

    `key` is None in evaluation, where nothing is augmented.
    """
    image, label = arrays["image"][batch["index"]], arrays["label"][batch["index"]]
    if key is not None:
        keys = augmentations.example_keys(key, batch["position"])
        image = augmentations.augment(image, keys, pad=pad, flip=flip)
    image = (image.astype(jnp.float32) / 255 - mean) / std
    return image, label


def load(
    *, name, data_dir, splits, image_size, border, normalization, pad, flip, batch_size, eval_batch_size
):
    """The feed of a TFDS set.

    Args:
      name, data_dir, image_size, border: see `sources.load_split`.
      splits: {role: TFDS split expression}, such as {"train": "train[:90%]", "validation": "train[90%:]"}.
      normalization, pad, flip, batch_size, eval_batch_size: see `ResidentFeed`.
    """
    loaded = {
        role: sources.load_split(name, split, data_dir, image_size, border) for role, split in splits.items()
    }
    num_classes = loaded["train"][2]
    return ResidentFeed(
        {role: (images, labels) for role, (images, labels, _) in loaded.items()},
        num_classes=num_classes,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        normalization=normalization,
        pad=pad,
        flip=flip,
    )
