"""What a network is shown, in a file of its run: so it can be asked about images without its data set."""

import io
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from cnn_cases.data import decode, splits


class Inputs(NamedTuple):
    """What a trained network takes.

    Attributes:
      image_shape: (H, W, C).
      class_names: of the K classes, in the order of their labels.
      statistics: of `pixels.Pixels`.
    """

    image_shape: tuple[int, int, int]
    class_names: list[str]
    statistics: dict[str, Any]


def to_bytes(inputs):
    """The content of a file for `from_bytes`; the same inputs give the same bytes."""
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
    """What `to_bytes` was given; raises ValueError where the content is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        shape, names = arrays.pop("image_shape").tolist(), arrays.pop("class_names").tolist()
    # RuntimeError: a damaged head says that the file is encrypted, or compressed in a way of the future.
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it holds no inputs ({error})") from error
    if set(arrays) not in ({"mean", "std"}, {"zca_mean", "zca_matrix"}):
        raise ValueError(f"it holds no inputs (of a normalisation it has {', '.join(arrays) or 'nothing'})")
    return Inputs(tuple(shape), names, arrays)


def make_preprocessing(image_shape, *, feed, border, crop):
    """Two functions that together turn an image of any size into what a network is shown in evaluation.

    Args:
      image_shape: (H, W, C) of what the network is shown, the border included.
      feed, border, crop: as in `feeds.make_feed`.

    Returns:
      store: uint8 [h, w, C] -> as the feed's `examples` have it; and view: that -> as its `view` shows it,
      uint8 [H, W, C].
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

    return (keep, frame) if feed == "stream" else (fit, keep)
