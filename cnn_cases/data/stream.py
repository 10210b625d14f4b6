"""A feed for sets that do not fit on a device: decoded and cropped on the host while the devices compute.

grain distributes whole batches over threads of this process or over worker processes, and returns the batches
in order. A resumed run restores nothing here: the batch of a step is a pure function of seed and step. Its
examples come in the order of `data.order`, as in a resident feed, and the crop of each example is drawn from
(seed, place in that order).

A record that cannot be read or decoded is damaged. In training the next intact record in the order replaces
it; in evaluation its mask is 0. A warning names each damaged record, and more of them than the config allows
end the run. Workers report damaged records along with each batch, since no process sees all records.
"""

import concurrent.futures
import contextlib
import functools
import logging
import re
import signal
import threading
import weakref
import zlib
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from cnn_cases import stopping
from cnn_cases.data import decode, memory, order

MAX_WORKERS = 1024  # one for each core of a large host, and more
MAX_BUFFER = 1024  # batches
MAX_SAMPLE = 2048  # images from which the statistics of the pixels are computed
NUM_COMPARED = 64  # examples of a split that enter its fingerprint
# Of batches in shared memory, for each worker: one that it fills, and one in this process. Each holds as many
# as the buffer, and in front of each waits another batch (counted with grain 0.2.18).
_QUEUES = 2
MAX_WAIT = 10  # seconds for a thread that only unlinks files
_CROP_STREAM = 1  # separates the random numbers of crops from those of the order
_ENDLESS = 2**62  # batches
# Signals by which the system ends a worker for lack of memory.
_DEATHS = {
    signal.SIGBUS: f"{memory.SHARED} is full, or a file of the data set became shorter (SIGBUS); enlarge it "
    "(`docker run --shm-size`), remove what killed runs have left there, or use fewer data.stream.workers",
    signal.SIGKILL: "perhaps for lack of memory (SIGKILL); use fewer data.stream.workers",
}

logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """How to make the examples of a split; small, because it is sent to other processes.

    Attributes:
      records: from `splits.open_split`.
      channels: 1 or 3.
      image_size: height and width of a crop, in pixels.
      border: zero pixels then added to every side.
      crop: the settings of `data.crop`, a mapping.
      max_damaged: records of the split that may be damaged; less than all of them.
    """

    records: Any
    channels: int
    image_size: int
    border: int
    crop: dict
    max_damaged: int


def check_stream(*, workers, buffer, max_damaged):
    """Raises ValueError if a setting of `data.stream` is invalid; see `StreamFeed`."""
    if not 0 <= workers <= MAX_WORKERS:
        raise ValueError(f"data.stream.workers = {workers} must be 0 or more, and at most {MAX_WORKERS}")
    if not 1 <= buffer <= MAX_BUFFER:
        raise ValueError(f"data.stream.buffer = {buffer} must be 1 or more, and at most {MAX_BUFFER}")
    if not 0 <= max_damaged < 1:
        raise ValueError(f"data.stream.max_damaged = {max_damaged} must be in [0, 1)")


class StreamFeed:
    """Splits on disk; `feeds` describes the interface.

    Attributes:
      arrays: the arrays of `pixels` on the devices.
      image_shape: (H, W, C).
      border: see `feeds`.
      num_classes: number of classes.
      num_train: number of training examples, including damaged ones.
      pixels: the result of `make_pixels`.
    """

    def __init__(
        self,
        splits,
        *,
        image_size,
        border,
        crop,
        batch_size,
        eval_batch_size,
        workers,
        buffer,
        max_damaged,
        make_pixels,
        process_index=0,
        process_count=1,
    ):
        """Reads a sample of the training images; starts no workers.

        Args:
          splits: {role: result of `splits.open_split`}; must contain the role "train".
          image_size: height and width of a crop, in pixels.
          border: zero pixels then added to every side.
          crop: the settings of `data.crop`, a mapping that has passed `decode.check`.
          batch_size: examples in a training step, over all devices of all processes.
          eval_batch_size: examples in an evaluation step, likewise.
          workers: processes that make training batches; 0 for threads of this process.
          buffer: batches that each worker makes in advance; without workers, the number of threads, each of
            which makes one batch. Evaluation uses max(buffer, workers) threads.
          max_damaged: fraction of a split's records that may be damaged. It, `workers` and `buffer` have
            passed `check_stream`.
          make_pixels: training images, uint8 [N, H, W, C] -> `pixels.Pixels`. Called with the evaluation
            crops of at most MAX_SAMPLE images, evenly spaced in the split.
          process_index, process_count: see `feeds.make_feed`; both batch sizes are multiples of the count.

        Raises:
          ValueError: a value is invalid, or too much of the sample is damaged.
        """
        records, features = splits["train"]
        if image_size < 1:
            raise ValueError(
                f"data.image_size = {image_size} must be 1 or more for data.feed = 'stream': its images "
                "differ in size, and those of a batch may not"
            )
        order.check_batch_size(batch_size, len(records))
        channels, side = features["image"].shape[-1], image_size + 2 * border
        self.image_shape, self.border = (side, side, channels), border
        self.num_classes, self.num_train = features["label"].num_classes, len(records)
        self._workers, self._buffer, self._threads = workers, buffer, max(buffer, workers)
        kept = workers * _QUEUES * (buffer + 1) if workers else buffer
        # Those of training stay while an evaluation makes its own.
        made_ahead = kept * batch_size + self._threads * eval_batch_size
        memory.check(
            made_ahead // process_count + min(MAX_SAMPLE, len(records)),
            self.image_shape,
            "data.stream.workers, data.stream.buffer, evaluation.batch_size, batch_size or data.image_size",
        )
        if workers:
            memory.check_shared(
                kept * batch_size // process_count,
                self.image_shape,
                "data.stream.workers (0 needs none), data.stream.buffer, batch_size or data.image_size",
            )
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._share = process_index, process_count
        self._recipes = {
            role: Recipe(records, channels, image_size, border, crop, int(max_damaged * len(records)))
            for role, (records, _) in splits.items()
        }
        self._damaged = {role: set() for role in splits}
        self.pixels = make_pixels(self._sample(), num_classes=self.num_classes)
        self.arrays = self.pixels.arrays

    def train_batches(self, seed, first_step):
        """Yields the batches of the training steps from `first_step` on (the first of all is 0), endlessly.

        Close the iterator to end its threads or processes.

        Yields:
          {"image": uint8 [B, H, W, C], "label": int32 [B], "position": int32 [B] in the global batch}, where
          B is this process's share.

        Raises:
          ValueError: more records are damaged than allowed.
        """
        make = functools.partial(
            training_batch,
            recipe=self._recipes["train"],
            seed=seed,
            batch_size=self._batch_size,
            position=order.own_positions(self._batch_size, *self._share),
        )
        steps = grain.MapDataset.range(first_step, _ENDLESS).map(make)
        made = self._by_workers(steps) if self._workers else self._by_threads(steps)
        yield from self._reported("train", made)

    def training_examples(self, seed, step):
        """Which examples of the training split make up the whole batch of a step: int32 [B]."""
        return order.examples_of_step(seed, step, self._batch_size, self.num_train)

    def eval_batches(self, role):
        """Yields the batches of a whole split: {"image", "label", "mask": float32}; shapes as in training.

        The mask is 1 exactly once for every example, and 0 for damaged examples and for the padding of the
        last batch. Threads of this process make the batches, since an evaluation may be over before a process
        has started.
        """
        recipe = self._recipes[role]
        position = order.own_positions(self._eval_batch_size, *self._share)
        firsts = grain.MapDataset.range(0, len(recipe.records), self._eval_batch_size)
        batches = firsts.map(lambda first: evaluation_batch(recipe, first + position))
        yield from self._reported(role, self._by_threads(batches))

    def examples(self, role):
        """Yields this process's intact examples, in order: (image uint8 [H, W, C], label), not cropped."""
        recipe, (first, count) = self._recipes[role], self._share
        indices = grain.MapDataset.range(first, len(recipe.records), count)
        stored = indices.map(functools.partial(stored_example, recipe=recipe))
        with contextlib.closing(self._by_threads(stored)) as examples:
            for index, image, label in examples:
                if image is None:
                    self._note(role, [index])
                else:
                    yield image, label

    def fingerprint(self):
        """See `feeds`; the checksum covers a few evenly spaced records of a split, except damaged ones."""
        return {role: _fingerprint(recipe.records) for role, recipe in self._recipes.items()}

    def view(self, image):
        """An image uint8 [h, w, C] of any size as evaluation shows it: uint8 `image_shape`."""
        recipe = self._recipes["train"]
        return decode.evaluation_view(image, recipe.image_size, recipe.border, recipe.crop)

    def prepare(self, arrays, batch, key):
        """Inside the step: a batch -> image float32 [B, H, W, C], label or target; see `feeds`."""
        image, label = batch["image"], batch["label"]
        if key is None:
            return self.pixels.evaluate(arrays, image), label
        return self.pixels.train(arrays, image, label, batch["position"], key)

    def _by_threads(self, dataset):
        """An iterator over what threads of this process make; close it to end them."""
        return iter(dataset.to_iter_dataset(grain.ReadOptions(self._threads, self._threads)))

    def _by_workers(self, dataset):
        """Yields the batches that worker processes make; close the generator to end them."""
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._buffer)
        alone = grain.ReadOptions(0, 0)  # a worker makes one batch at a time
        batches = dataset.to_iter_dataset(alone).mp_prefetch(options, worker_init_fn=stopping.end_with_parent)
        try:
            with contextlib.closing(iter(batches)) as iterator, _deaths_explained():
                yield _copied(_first(iterator))
                yield from map(_copied, iterator)
        finally:
            _wait_until_freed()

    def _reported(self, role, made):
        """Yields the batches of a closable iterator, and notes the damaged records that they report."""
        with contextlib.closing(made):
            for batch in made:
                self._note(role, batch.pop("damaged").tolist())
                yield batch

    def _note(self, role, indices):
        """Warns of newly found damaged records; raises ValueError if there are too many in all."""
        recipe, known = self._recipes[role], self._damaged[role]
        new = sorted(set(indices) - known)
        known.update(new)
        if len(known) > recipe.max_damaged:
            named = "; ".join(describe(recipe, index) for index in sorted(known)[:5])
            named += "; ..." if len(known) > 5 else ""
            raise ValueError(
                f"data.stream.max_damaged allows {recipe.max_damaged} damaged of the {len(recipe.records)} "
                f"records of data.splits.{role}; found {len(known)}: {named}"
            )
        for index in new:
            logger.warning("data.splits.%s: skipped %s", role, describe(recipe, index))

    def _sample(self):
        recipe = self._recipes["train"]
        count = min(len(recipe.records), MAX_SAMPLE)
        indices = np.linspace(0, len(recipe.records) - 1, count).astype(int)
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            parts = [*pool.map(functools.partial(evaluation_batch, recipe), np.array_split(indices, 64))]
        self._note("train", np.concatenate([part["damaged"] for part in parts]).tolist())
        return np.concatenate([part["image"][part["mask"] == 1] for part in parts])


def _fingerprint(records):
    checksum = 0
    for index in np.linspace(0, len(records) - 1, min(len(records), NUM_COMPARED)).astype(int).tolist():
        with contextlib.suppress(RuntimeError):  # see `read`
            record = records[index]
            checksum = zlib.crc32(b"%d" % record["label"], zlib.crc32(record["image"], checksum))
    return [len(records), checksum]


def read(recipe, index):
    """(image uint8 [H, W, C] at its own size, label) of a record; raises ValueError if it is damaged."""
    try:
        record = recipe.records[index]
    except RuntimeError as error:  # what array_record raises if the bytes have changed
        raise ValueError(str(error)) from error
    label = int(record["label"])
    if label < 0:  # what TFDS stores for a missing one
        raise ValueError("it has no label")
    return decode.decode(record["image"], recipe.channels), label


def describe(recipe, index):
    """Describes a damaged record: its index in the split, its file if known, and what is wrong."""
    file = ""
    with contextlib.suppress(RuntimeError):
        name = decode.file_of(recipe.records[index])
        file = name and f" ({name})"
    try:
        read(recipe, index)
    except ValueError as error:
        return f"record {index}{file}: {error}"
    return f"record {index}{file}: it could be read the second time"


def stored_example(index, *, recipe):
    """(index, image at its own size, label) of a record; image and label are None if it is damaged."""
    try:
        return index, *read(recipe, index)
    except ValueError:
        return index, None, None


def training_batch(step, *, recipe, seed, batch_size, position):
    """Makes the share of a training step's batch at `position`; a pure function of its arguments.

    Returns:
      {"image", "label", "position", "damaged": int64, indices of the damaged records found}. If these exceed
      the limit, the remaining images are black.
    """
    size = len(recipe.records)
    numbers = order.places_in_order(step, batch_size, position)
    indices = order.examples_at(seed, numbers, size)
    batch = _black(recipe, len(position)) | {"position": position}
    damaged = set()
    for row, (number, index) in enumerate(zip(numbers.tolist(), indices.tolist(), strict=True)):
        rng = np.random.default_rng((seed, number, _CROP_STREAM))
        while len(damaged) <= recipe.max_damaged:
            try:
                image, label = read(recipe, index)
            except ValueError:
                damaged.add(index)
                number += 1
                index = order.examples_at(seed, np.array([number]), size).item()
                continue
            box = decode.training_box(*image.shape[:2], recipe.image_size, rng, recipe.crop)
            batch["image"][row] = decode.framed(image, box, recipe.image_size, recipe.border)
            batch["label"][row] = label
            break
    return batch | {"damaged": np.array(sorted(damaged), np.int64)}


def evaluation_batch(recipe, indices):
    """Makes an evaluation batch of the records at `indices`, int [B]; those past the last one are padding.

    Returns:
      {"image", "label", "mask", "damaged"}, the last as in `training_batch`.
    """
    batch = _black(recipe, len(indices)) | {"mask": np.zeros(len(indices), np.float32)}
    damaged = []
    for row, index in enumerate(indices.tolist()):
        if index >= len(recipe.records):
            break
        try:
            image, label = read(recipe, index)
        except ValueError:
            damaged.append(index)
            continue
        view = decode.evaluation_view(image, recipe.image_size, recipe.border, recipe.crop)
        batch["image"][row], batch["label"][row], batch["mask"][row] = view, label, 1
    return batch | {"damaged": np.array(damaged, np.int64)}


def _black(recipe, count):
    side = recipe.image_size + 2 * recipe.border
    return {
        "image": np.zeros((count, side, side, recipe.channels), np.uint8),
        "label": np.zeros(count, np.int32),
    }


def _copied(batch):
    """A batch outside of the shared memory in which a worker put it, and which is then freed at once."""
    return {name: np.array(leaf) for name, leaf in batch.items()}


def _first(iterator):
    """Starts the worker processes with signals blocked, and returns their first batch.

    A signal that ends the run (Ctrl-C, or a scheduler that signals the whole process group) must not end the
    workers, because the run may need more batches before it has saved.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain passes absl's flags to its workers, even if they are unused
    resource_tracker.ensure_running()  # otherwise starting a worker would do so, and unblock the signals
    with stopping.blocked(*stopping.SIGNALS):
        return next(iterator)


@contextlib.contextmanager
def _deaths_explained():
    """Turns grain's error for a worker that the system has killed into one that says why."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"terminated unexpectedly with exit code -(\d+)\b", str(error))
        reason = _DEATHS.get(found and int(found[1]))
        if reason is None:
            raise
        raise ChildProcessError(
            f"a worker of data.stream was killed: {reason}; start again to resume"
        ) from error


def _wait_until_freed():
    """Waits until the workers' unused batches are freed.

    A thread of grain unlinks the arrays in shared memory one by one. If the process ended first, Python would
    warn of the remaining arrays. This function adds one more array at the end, and waits until it is freed.
    """
    freed = threading.Event()
    last = grain.multiprocessing.SharedMemoryArray((1,))
    last.unlink_on_del()
    weakref.finalize(last.shm, freed.set)
    del last
    freed.wait(MAX_WAIT)
