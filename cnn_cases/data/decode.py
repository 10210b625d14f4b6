"""Decodes images on the host, and computes the boxes that the papers crop from them.

A crop is a box of the original pixels, which is then resized to the square that a network sees. The papers
resize before they crop; apart from rounding the box to whole pixels, the result is the same but costs more.
"""

import io
import math
import struct

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from cnn_cases import checks

CROPS = ("squeeze", "shorter_side", "area")
MAX_SIDE = 8192  # pixels of an image's side; no network here is meant for more
# The transposition that turns an image upright, by its EXIF orientation. Pillow's `exif_transpose` does the
# same, but rewrites all tags, which fails if any of them is damaged.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

cv2.setNumThreads(1)  # callers that decode in parallel already use a thread or a process per batch


def decode(data, channels):
    """Decodes an image, turns it upright, and puts transparent parts on white.

    libjpeg-turbo decodes JPEG files. Pillow decodes other formats, JPEG files that libjpeg-turbo refuses
    (CMYK, files with harmless flaws), and those that EXIF data turn, as phones write them.

    Args:
      data: the bytes of a file.
      channels: 1 for grey, 3 for RGB; the image is converted if necessary.

    Returns:
      uint8 [H, W, channels].

    Raises:
      ValueError: the bytes are not an image, the image is incomplete, or it is grey with more than 8 bits.
    """
    if simplejpeg.is_jpeg(data) and _is_upright(data):
        try:
            return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # turns a TIFF, and drops its tag
            turn = _turn(image)
            return _to_pixels(image if turn is None else image.transpose(turn), channels)
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # Pillow's plugins for the formats raise errors of many types
        # Pillow's message may quote the address of the buffer, which differs from run to run.
        reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(reason) from error


def _is_upright(data):
    """Whether a JPEG file is shown without rotation or mirroring."""
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads only the header
            return _turn(image) is None
    except (OSError, Image.DecompressionBombError):  # libjpeg-turbo may still open it
        return True


def _turn(image):
    """The value of TURNS for a Pillow image; None if it is upright or its EXIF data are damaged."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, struct.error):
        return None


def _to_pixels(image, channels):
    if image.mode.startswith(("I", "F")):  # Pillow would turn all values above 8 bits into white
        raise ValueError("it has more than 8 bits per channel; save it with 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def check(image_size, crop):
    """Raises ValueError if `crop`, the settings of `data.crop`, is not possible with `image_size`."""
    name, shorter_side, eval_shorter_side = crop["name"], crop["shorter_side"], crop["eval_shorter_side"]
    area, aspect = crop["area"], crop["aspect"]
    checks.one_of("data.crop.name", name, CROPS)
    if name == "shorter_side" and not image_size <= shorter_side[0] <= shorter_side[1] <= MAX_SIDE:
        raise ValueError(
            f"data.crop.shorter_side = {tuple(shorter_side)} must be at least data.image_size = {image_size} "
            f"and at most {MAX_SIDE}, the smaller one first"
        )
    if name == "area" and not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"data.crop.area = {tuple(area)} must be two fractions in (0, 1], the smaller first")
    if name == "area" and not 1 / MAX_SIDE <= aspect[0] <= aspect[1] <= MAX_SIDE:
        raise ValueError(
            f"data.crop.aspect = {tuple(aspect)} must be two ratios between 1/{MAX_SIDE} and {MAX_SIDE}, the "
            "smaller first"
        )
    if name != "squeeze" and not image_size <= eval_shorter_side <= MAX_SIDE:
        raise ValueError(
            f"data.crop.eval_shorter_side = {eval_shorter_side} must be at least "
            f"data.image_size = {image_size} and at most {MAX_SIDE}"
        )


def training_box(height, width, image_size, rng, crop):
    """Draws the random box that is cropped from a training image.

    The name of the crop decides:

    - "squeeze": the whole image.
    - "shorter_side": a square of `image_size` pixels anywhere in the image, whose shorter side is first
      resized to a length drawn uniformly from the range `shorter_side` (Krizhevsky et al. 2012, section 4.1;
      with several sizes Simonyan, Zisserman 2014, section 3.1).
    - "area": a box anywhere in the image, with a share of its area drawn uniformly from `area` and a ratio of
      width to height drawn from `aspect` (Szegedy et al. 2014, section 6). As is usual, but not from the
      paper, the ratio's logarithm is drawn uniformly, and after ten boxes that do not fit, the largest
      centred box with an allowed ratio is taken.

    Args:
      height, width: of the image, in pixels.
      image_size: height and width of the resized crop, in pixels, without the border.
      rng: a NumPy generator.
      crop: the settings of `data.crop`, a mapping that has passed `check`.

    Returns:
      (top, left, height, width) in pixels of the image.
    """
    if crop["name"] == "squeeze":
        return 0, 0, height, width
    if crop["name"] == "shorter_side":
        size = _square(height, width, image_size, rng.integers(*crop["shorter_side"], endpoint=True))
        return *_place(rng, height, width, size, size), size, size
    area, aspect = crop["area"], crop["aspect"]
    for _ in range(10):
        share, ratio = rng.uniform(*area), math.exp(rng.uniform(*map(math.log, aspect)))
        box_height = max(round(math.sqrt(share * height * width / ratio)), 1)
        box_width = max(round(math.sqrt(share * height * width * ratio)), 1)
        if box_height <= height and box_width <= width:
            return *_place(rng, height, width, box_height, box_width), box_height, box_width
    box_height = max(min(height, round(width / aspect[0])), 1)
    box_width = max(min(width, round(height * aspect[1])), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def evaluation_box(height, width, image_size, crop):
    """The box that evaluation crops from an image: the whole image for "squeeze", otherwise its centre.

    The centre is the square of `image_size` pixels once the shorter side has been resized to
    `eval_shorter_side` pixels. Arguments and result are as in `training_box`.
    """
    if crop["name"] == "squeeze":
        return 0, 0, height, width
    size = _square(height, width, image_size, crop["eval_shorter_side"])
    return (height - size) // 2, (width - size) // 2, size, size


def evaluation_view(image, image_size, border, crop):
    """An image as evaluation shows it: its `evaluation_box`, `framed`. uint8 [H, W, C] -> uint8 [S, S, C]."""
    return framed(image, evaluation_box(*image.shape[:2], image_size, crop), image_size, border)


def framed(image, box, image_size, border):
    """Resizes a box of an image to a square with a border of zeros. uint8 [H, W, C] -> uint8 [S, S, C].

    S is image_size + 2 * border.
    """
    top, left, height, width = box
    part = image[top : top + height, left : left + width]
    # Linear interpolation reads 2x2 pixels, and so skips none up to a factor of two. The mean over areas
    # never skips any, but OpenCV uses it only if neither side grows.
    if max(height, width) > 2 * image_size:
        sides = min(width, image_size), min(height, image_size)
        part = cv2.resize(part, sides, interpolation=cv2.INTER_AREA)
    square = cv2.resize(part, (image_size, image_size), interpolation=cv2.INTER_LINEAR)
    square = square.reshape(image_size, image_size, image.shape[2])  # OpenCV drops a single channel
    edge = (border, border)
    return np.pad(square, (edge, edge, (0, 0)))


def _square(height, width, image_size, shorter_side):
    """The side of a square that becomes `image_size` when the shorter side is resized to `shorter_side`."""
    return max(round(min(height, width) * image_size / int(shorter_side)), 1)


def _place(rng, height, width, box_height, box_width):
    return int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))


def file_of(record):
    """The name of the file that a record of a data set was made from; "" if the set does not hold it."""
    names = [record[key] for key in ("file_name", "image/filename") if key in record]
    if not names:
        return ""
    # A set may call another thing so, such as a number.
    return names[0].decode(errors="replace") if isinstance(names[0], bytes) else str(names[0])
