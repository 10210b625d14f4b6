"""A file in each workdir that describes the network's inputs, for predictions without the data set."""

import io
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from cnn_cases.data import decode, splits


class Inputs(NamedTuple):
    """The inputs of a trained network.

    Attributes:
      image_shape: (H, W, C).
      class_names: of the K classes, in the order of their labels.
      statistics: those of `pixels.Pixels`.
    """

    image_shape: tuple[int, int, int]
    class_names: list[str]
    statistics: dict[str, Any]


def to_bytes(inputs):
    """Encodes inputs for `from_bytes`; the same inputs give the same bytes."""
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        image_shape=inputs.image_shape,
        class_names=inputs.class_names,
        **inputs.statistics,
    )
    return content.getvalue()


def from_bytes(content):
    """Decodes the result of `to_bytes`; raises ValueError if the content is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        shape, names = arrays.pop("image_shape").tolist(), arrays.pop("class_names").tolist()
    # RuntimeError: a damaged header may claim that the file is encrypted, or compressed by an unknown method.
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it is not a file of inputs ({error})") from error
    if set(arrays) not in ({"mean", "std"}, {"zca_mean", "zca_matrix"}):
        raise ValueError(
            f"it is not a file of inputs (arrays of its normalisation: {', '.join(arrays) or 'none'})"
        )
    return Inputs(tuple(shape), names, arrays)


def make_preprocessing(image_shape, *, feed, border, crop):
    """Makes two functions that together turn an image of any size into a network's input in evaluation.

    Args:
      image_shape: (H, W, C) of the network's input, including the border.
      feed, border, crop: as in `feeds.make_feed`.

    Returns:
      store: uint8 [h, w, C] -> the image as the feed's `examples` yield it; view: a stored image -> the image
      as the feed's `view` returns it, uint8 [H, W, C]; and the feed's `border`, which `view` adds.
    """
    height, width = (side - 2 * border for side in image_shape[:2])

    def keep(image):
        return image

    def frame(image):
        return decode.evaluation_view(image, height, border, crop)

    def fit(image):
        if image.shape[:2] != (height, width):
            image = splits.resize(image, height, width)
        return np.pad(image, ((border, border), (border, border), (0, 0)))

    return (keep, frame, border) if feed == "stream" else (fit, keep, 0)
