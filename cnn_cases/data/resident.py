"""A feed for sets that fit in device memory.

The images live on the device as uint8; a batch is a list of indices. Gathering, augmentation and
normalisation happen inside the jitted step.
"""

import zlib

import numpy as np

from cnn_cases.data import order


class ResidentFeed:
    """Whole splits in memory, drawn by index; `feeds` describes the interface.

    Attributes:
      arrays: {"image": uint8 [N, H * W * C], "label": int32 [N]}, the concatenated splits, and the arrays of
        `pixels`. Each image is a row, because a TPU pads height and width axes to its tiles, and would copy
        the whole set into that form at each call.
      image_shape: (H, W, C).
      border: see `feeds`.
      num_classes: number of classes.
      num_train: number of training examples.
      pixels: a `pixels.Pixels`.
    """

    def __init__(
        self,
        splits,
        *,
        num_classes,
        batch_size,
        eval_batch_size,
        pixels,
        process_index=0,
        process_count=1,
    ):
        """Makes a feed of whole splits.

        Args:
          splits: {role: (image uint8 [N, H, W, C], label int32 [N])}; must contain the role "train".
          num_classes: number of classes.
          batch_size: examples in a training step, over all devices of all processes.
          eval_batch_size: examples in an evaluation step, likewise.
          pixels: from `pixels.make_pixels`.
          process_index, process_count: see `feeds.make_feed`; both batch sizes are multiples of the count.

        Raises:
          ValueError: a training batch is larger than the training split, or empty.
        """
        self.num_train = len(splits["train"][0])
        order.check_batch_size(batch_size, self.num_train)
        self.num_classes = num_classes
        self.image_shape, self.border = splits["train"][0].shape[1:], 0  # the images have theirs
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._share = process_index, process_count
        self.pixels = pixels
        self._ranges, start = {}, 0
        for role, (images, _) in splits.items():
            self._ranges[role] = range(start, start + len(images))
            start += len(images)
        # One array for all splits, so that a step is compiled once, and not once per split.
        self.arrays = pixels.arrays | {
            "image": np.concatenate([images for images, _ in splits.values()]).reshape(start, -1),
            "label": np.concatenate([labels for _, labels in splits.values()]),
        }

    def train_batches(self, seed, first_step):
        """Yields the batches of the training steps from `first_step` on (the first of all is 0), endlessly.

        Each epoch has its own permutation. A batch that an epoch's end cuts is filled from the next epoch, so
        every example is seen equally often.

        Yields:
          {"index": int32 [B], "position": int32 [B] in the global batch}, where B is this process's share.
        """
        position = order.own_positions(self._batch_size, *self._share)
        while True:
            numbers = order.places_in_order(first_step, self._batch_size, position)
            index = order.examples_at(seed, numbers, self.num_train)
            yield {"index": index + np.int32(self._ranges["train"].start), "position": position}
            first_step += 1

    def training_examples(self, seed, step):
        """Which examples of the training split make up the whole batch of a step: int32 [B]."""
        return order.examples_of_step(seed, step, self._batch_size, self.num_train)

    def eval_batches(self, role):
        """Yields the batches of a whole split: {"index": int32 [B], "mask": float32 [B]}; B as in training.

        The mask is 1 exactly once for every example, and 0 for the padding of the last batch.
        """
        indices = self._ranges[role]
        position = order.own_positions(self._eval_batch_size, *self._share)
        for first in range(indices.start, indices.stop, self._eval_batch_size):
            index = first + position
            mask = (index < indices.stop).astype(np.float32)
            yield {"index": np.minimum(index, np.int32(indices.stop - 1)), "mask": mask}

    def examples(self, role):
        """Yields this process's examples of a split as they are stored: (image uint8 [H, W, C], label)."""
        first, count = self._share
        for index in self._ranges[role][first::count]:
            image = self.arrays["image"][index].reshape(self.image_shape)
            yield image, int(self.arrays["label"][index])

    def fingerprint(self):
        """See `feeds`; the checksum covers all examples of a split."""
        return {
            role: [len(span), zlib.crc32(self._of(span, "label"), zlib.crc32(self._of(span, "image")))]
            for role, span in self._ranges.items()
        }

    def _of(self, span, name):
        return np.ascontiguousarray(self.arrays[name][span.start : span.stop])

    def view(self, image):
        """Returns the image unchanged: evaluation shows it as it is stored."""
        return image

    def prepare(self, arrays, batch, key):
        """Inside the step: a batch -> image float32 [B, H, W, C], label or target; see `feeds`."""
        image, label = arrays["image"][batch["index"]], arrays["label"][batch["index"]]
        image = image.reshape(-1, *self.image_shape)
        if key is None:
            return self.pixels.evaluate(arrays, image), label
        return self.pixels.train(arrays, image, label, batch["position"], key)
