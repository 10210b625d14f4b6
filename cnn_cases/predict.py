"""Classifies your own images with a trained network.

    python -m cnn_cases.predict --workdir=runs/lenet5 seven.png photo.jpg

prints the most likely classes of each image. It needs only the run's workdir, not the data set. In Python:

    network = predict.load("runs/lenet5")
    probabilities = network(images)    # uint8 [N, h, w, C], or a list of [h, w, C] of any sizes -> [N, K]
    network.class_names[probabilities[0].argmax()]

Images are cropped and resized as in evaluation, and get the border of `data.border`, if any. Nothing else is
adapted: a network that was trained on white digits on black needs such images.
"""

import functools
import pathlib

import jax
import numpy as np
from absl import flags

from cnn_cases import command, saved_runs
from cnn_cases.data import decode, inputs, pixels, views
from cnn_cases.training import checkpoint, predictions, programs, steps
from cnn_cases.training.state import shapes_of_state

FILES_AT_ONCE = 64  # a photograph of a telephone takes 40 MB of memory


class TrainedNetwork:
    """A network from a checkpoint, ready to classify images.

    Attributes:
      config: of its run.
      step: of the checkpoint.
      class_names: of the K classes.
      image_shape: (H, W, C) of the network's input, including the border.
      model: the Linen module.
      state: a `TrainState` without the optimizer's part; `model` is applied to its `variables`.
    """

    def __init__(self, config, step, model, state, shown):
        """Called by `load`; `shown` is an `inputs.Inputs`."""
        self.config, self.step, self.model = config, step, model
        self.class_names, self.image_shape = shown.class_names, shown.image_shape
        self.state, self._statistics = jax.device_put((state, shown.statistics))
        normalize = pixels.make_normalize(shown.statistics)
        self._normalize = jax.jit(lambda arrays, image: normalize(arrays, pixels.to_unit(image)))
        self._predict = jax.jit(
            steps.make_predict_step(model.apply, self._normalize, programs.images_at_once(model.apply))
        )

    def normalize(self, images):
        """Turns images of `image_shape`, uint8 [N, H, W, C], into those that `model` takes, float32.

        Raises:
          ValueError: the images have another type or shape.
        """
        if getattr(images, "dtype", None) != np.uint8 or images.shape[1:] != self.image_shape:
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be uint8 [N, {shape}]; they are a {_kind(images)}")
        return self._normalize(self._statistics, images)

    def __call__(self, images, protocol="single"):
        """Predicts the probability of each class.

        Args:
          images: uint8 [N, h, w, C], or a list of uint8 [h, w, C] of any sizes, without a border.
          protocol: a key of `views.PROTOCOLS`.

        Returns:
          float64 [N, K]; each row sums to 1.

        Raises:
          ValueError: an image has another type or shape, there are no images, or the protocol does not suit
            the network.
        """
        channels = self.image_shape[-1]
        for number, image in enumerate(images):
            if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[-1] != channels:
                raise ValueError(f"image {number} must be uint8 [h, w, {channels}]; it is a {_kind(image)}")
            if not image.size:
                raise ValueError(f"image {number} has no pixels: {image.shape}")
        if not len(images):
            raise ValueError("there are no images")
        data = self.config.data
        store, view, border = inputs.make_preprocessing(
            self.image_shape, feed=data.feed, border=data.border, crop=dict(**data.crop)
        )
        shown = views.make_views(protocol, self.image_shape, view, border)
        shapes = programs.check_views(
            self._predict, self.state, self._statistics, protocol, self.image_shape, shown
        )

        def batch_size(shape):
            most = programs.views_at_once(self.image_shape, shape, self.config.evaluation.batch_size)
            # Dense views of an image that is not square have other shapes than those of a square image.
            return min(most, len(images) * max(1, shapes.count(shape)))

        probabilities, _ = predictions.average_views(
            ((store(image), 0) for image in images),
            shown,
            functools.partial(self._predict, self.state, self._statistics),
            batch_size=batch_size,
        )
        return probabilities


def _kind(value):
    """The type of what is given for images and, if it is an array, its dtype and shape."""
    return " ".join([type(value).__name__, *(str(getattr(value, key, "")) for key in ("dtype", "shape"))])


def load(workdir, which="last"):
    """Loads the network of a run of train.py.

    Args:
      workdir: of the run.
      which: "last", "best" or a step.

    Raises:
      ValueError: there is no such run or checkpoint, or it is damaged.
    """
    config = saved_runs.load_config(workdir)
    saved_runs.read_starts(workdir)  # warns if the code has changed
    path = pathlib.Path(workdir) / "inputs.npz"
    try:
        shown = inputs.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is missing or damaged: {error}; starting the run again writes it, unless the run "
            "has ended"
        ) from error
    model, tx, _ = programs.make_network(config, len(shown.class_names))
    like = shapes_of_state(model, tx, shown.image_shape, with_ema=config.ema_decay > 0)
    checkpoints = pathlib.Path(workdir) / "checkpoints"
    step, state = checkpoint.find_and_read(checkpoints, which, like)
    return TrainedNetwork(config, step, model, state.replace(opt_state=()), shown)


def read_image(path, channels):
    """Reads the pixels of an image file, uint8 [h, w, channels]; see `decode.decode`.

    Raises:
      ValueError: there is no such file, it is not a readable image, or `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"{path}: image files are read as grey or colour, but the network takes {channels} channels"
        )
    try:
        return decode.decode(pathlib.Path(path).read_bytes(), channels)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def main(paths):
    """Prints the most likely classes of each image file; other files lead to an error at the end."""
    if not paths:
        raise ValueError("no images: list their files after the flags")
    given = flags.FLAGS
    network = load(given.workdir, given.step)
    errors = []
    for first in range(0, len(paths), FILES_AT_ONCE):
        read, images = [], []
        for path in paths[first : first + FILES_AT_ONCE]:
            try:
                images.append(read_image(path, network.image_shape[-1]))
                read.append(path)
            except ValueError as error:
                errors.append(str(error))
        rows = network(images, given.protocol) if images else []
        for path, row in zip(read, rows, strict=True):
            if np.isnan(row).any():
                errors.append(f"{path}: step {network.step} predicts NaN; choose another one (--step)")
                continue
            best = np.argsort(-row, kind="stable")[: given.top]
            print(f"{path}:", ", ".join(f"{network.class_names[k]} ({row[k]:.1%})" for k in best))
    if errors:
        raise ValueError("\n".join(errors))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The directory of a run of train.py.", required=True)
    flags.DEFINE_string("step", "last", "Which checkpoint: its step, 'last' or 'best'.")
    flags.DEFINE_string("protocol", "single", "Which views of each image are averaged.")
    flags.DEFINE_integer("top", 3, "How many classes to print.", lower_bound=1)
    command.run(main, takes_files=True)
