"""Which examples each training step sees: a pure function of seed, step and position in the batch.

The examples come in an endless sequence of epochs, each a permutation of its own, whichever the feed and
however many processes share the work.
"""

import functools

import numpy as np


def examples_of_step(seed, step, batch_size, size):
    """Which of `size` training examples make up the whole batch of a step (the first is 0): int32 [B].

    A stream takes another one in the place of a damaged one.
    """
    return examples_at(seed, places_in_order(step, batch_size, np.arange(batch_size)), size)


def own_positions(batch_size, process_index, process_count):
    """The positions in a batch, int32, of the examples of one process: contiguous, equally many for each."""
    return np.split(np.arange(batch_size, dtype=np.int32), process_count)[process_index]


def places_in_order(step, batch_size, position):
    """The places int64 [B] in the endless sequence of training examples of `position` int [B] in a batch."""
    return int(step) * batch_size + position.astype(np.int64)  # more than int32 holds in a long training


def examples_at(seed, numbers, size):
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
