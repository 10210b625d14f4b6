"""The order of the training examples, a pure function of seed, step and position in the batch.

The examples form an endless sequence of epochs, each with its own permutation. The sequence depends neither
on the feed nor on the number of processes.
"""

import functools

import numpy as np


def examples_of_step(seed, step, batch_size, size):
    """Which of `size` training examples make up the whole batch of a step (the first is 0): int32 [B].

    A stream replaces damaged examples by others.
    """
    return examples_at(seed, places_in_order(step, batch_size, np.arange(batch_size)), size)


def check_batch_size(batch_size, size):
    """Raises ValueError unless a training batch spans at most two epochs, as `examples_at` needs."""
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size = {batch_size} must be between 1 and the {size} training examples")


def own_positions(batch_size, process_index, process_count):
    """The positions in a batch, int32, of one process's examples; contiguous, and equally many for each."""
    return np.split(np.arange(batch_size, dtype=np.int32), process_count)[process_index]


def places_in_order(step, batch_size, position):
    """Maps positions in a batch, int [B], to places in the endless sequence of examples, int64 [B]."""
    return int(step) * batch_size + position.astype(np.int64)  # int32 overflows in long runs


def examples_at(seed, numbers, size):
    """Looks up training examples in the endless sequence of epochs, each of which is a permutation.

    Args:
      seed: of the order.
      numbers: int [B], increasing places in the sequence, from at most two successive epochs.
      size: number of training examples.

    Returns:
      int32 [B], indices of training examples.
    """
    epochs, places = np.divmod(numbers, size)
    first = _permutation(seed, epochs[0].item(), size)[places]
    if epochs[0] == epochs[-1]:
        return first
    return np.where(epochs == epochs[0], first, _permutation(seed, epochs[-1].item(), size)[places])


@functools.lru_cache(maxsize=4)  # every step of an epoch needs its order
def _permutation(seed, epoch, size):
    return np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
