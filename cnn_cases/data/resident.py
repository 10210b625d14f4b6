"""A feed for sets that fit in device memory.

The images live on the device as uint8; a batch is a list of indices. Gathering, augmentation and
normalisation happen inside the jitted step.
"""

import functools

import numpy as np


class ResidentFeed:
    """Whole splits in memory, drawn by index; `feeds` says what a feed is.

    Attributes:
      arrays: {"image": uint8 [N, H, W, C], "label": int32 [N]}, the splits one after another, and what
        `pixels` needs.
      image_shape: (H, W, C).
      num_classes: number of classes.
    """

    def __init__(self, splits, *, num_classes, batch_size, eval_batch_size, pixels):
        """Takes whole splits.

        Args:
          splits: {role: (image uint8 [N, H, W, C], label int32 [N])}, with the role "train" among them.
          num_classes: number of classes.
          batch_size: examples of a training step, over all devices.
          eval_batch_size: examples of an evaluation step, over all devices.
          pixels: of `pixels.make_pixels`.

        Raises:
          ValueError: a batch is larger than the training split, or empty.
        """
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
        self._pixels = pixels
        self._ranges, start = {}, 0
        for role, (images, _) in splits.items():
            self._ranges[role] = range(start, start + len(images))
            start += len(images)
        # One array for all splits: a step that takes it is compiled once, not once a split.
        self.arrays = pixels.arrays | {
            "image": np.concatenate([images for images, _ in splits.values()]),
            "label": np.concatenate([labels for _, labels in splits.values()]),
        }

    def train_batches(self, seed, first_step):
        """The batches of the training steps from `first_step` on (the first of all is 0), without end.

        Each epoch is a permutation of its own; the batch that an epoch's end cuts takes its rest from the
        next one, so every example is seen equally often.

        Yields:
          {"index": int32 [batch_size], "position": int32 [batch_size] in the global batch}.
        """
        position = np.arange(self._batch_size, dtype=np.int32)
        while True:
            index = training_order(seed, first_step * self._batch_size + position, self._num_train)
            yield {"index": index + np.int32(self._ranges["train"].start), "position": position}
            first_step += 1

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

    def examples(self, role):
        """Yields the examples of a split in its order, as they are stored: (image uint8 [H, W, C], label)."""
        for index in self._ranges[role]:
            yield self.arrays["image"][index], int(self.arrays["label"][index])

    def view(self, image):
        """A stored image as evaluation shows it: as it is."""
        return image

    def normalize(self, arrays, image):
        """Inside the step: images uint8 [B, H, W, C] -> float32, as the network takes them in evaluation."""
        return self._pixels.evaluate(arrays, image)

    def prepare(self, arrays, batch, key):
        """Inside the step: a batch -> image float32 [B, H, W, C], label or target; see `feeds`."""
        image, label = arrays["image"][batch["index"]], arrays["label"][batch["index"]]
        if key is None:
            return self.normalize(arrays, image), label
        return self._pixels.train(arrays, image, label, batch["position"], key)


def training_order(seed, numbers, size):
    """Which training examples come, in an endless sequence of epochs that are permutations each.

    Args:
      seed: of the order.
      numbers: int [B], increasing: places in the sequence, of two successive epochs at most.
      size: number of training examples.

    Returns:
      int32 [B], indices of training examples.
    """
    epochs, places = np.divmod(numbers, size)
    first = _permutation(seed, epochs[0].item(), size)[places]
    if epochs[0] == epochs[-1]:
        return first
    return np.where(epochs == epochs[0], first, _permutation(seed, epochs[-1].item(), size)[places])


@functools.lru_cache(maxsize=4)  # an epoch's order is asked for at each of its steps
def _permutation(seed, epoch, size):
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
