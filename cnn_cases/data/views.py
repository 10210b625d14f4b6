"""The papers' test protocols: a network sees each image as one or more views, and its outputs are averaged.

A protocol makes views of a stored image, uint8 [h, w, C] of any size, for a network that was trained on
square images of `crop` pixels. The papers' sizes assume crops of 224 pixels. They are scaled to the crop: 256
becomes round(crop * 256 / 224), which is 37 for a network with 32x32 inputs.

    protocol            views   what they are
    single                  1   the image as the feed shows it in evaluations during training
    flip                    2   that view and its mirror image
    centre_crop             1   the centre of the image after resizing its shorter side to 256
    ten_crop               10   corners and centre of the central 256x256 square, and their mirror images
                                (Krizhevsky et al. 2012, section 4.1)
    multi_scale_dense       6   the whole image with a shorter side of 256, 384 and 512, and mirror images
                                (Simonyan, Zisserman 2014, sections 3.2 and 4.2)
    resnet_dense            5   the whole image with a shorter side of 224, 256, 384, 480 and 640
                                (He et al. 2015, section 3.4)
    googlenet_144         144   corners, centre and the whole of three squares at four sizes, and their mirror
                                images (Szegedy et al. 2014, section 7)

The views of the two dense protocols are larger than `crop` and differ in shape. Their longer side is cropped
about the centre to the shorter side plus a multiple of 32 pixels, so that shapes repeat and few are compiled.
The papers do not crop. VGG's sizes are meant for a network that was trained on images of 256 to 512 pixels. A
ResNet averages its whole last feature map, so windows at the edges count for less than in the paper, which
averages the scores of all windows.
"""

import functools

import cv2
import numpy as np

from cnn_cases import checks

PAPER_CROP = 224  # pixels, side of the network's input in all these papers
VGG_SIDES = (256, 384, 512)
RESNET_SIDES = (224, 256, 384, 480, 640)
GOOGLENET_SIDES = (256, 288, 320, 352)
DENSE_STEP = 32  # pixels that five poolings reduce to one


def make_views(protocol, image_shape, view, border=0):
    """Returns the function of a protocol that makes the views of an image.

    Args:
      protocol: a key of PROTOCOLS.
      image_shape: (H, W, C) of the images that the network was trained on.
      view: the feed's `view`, which "single" and "flip" use.
      border: the feed's `border`: zero pixels that `view` adds to every side, and that all views get.

    Returns:
      uint8 [h, w, C] -> a list of uint8 views, of the same length for every image.

    Raises:
      ValueError: the protocol is unknown, or needs square training images and these are not square.
    """
    checks.one_of("evaluation.protocol", protocol, PROTOCOLS)
    height, width, _ = image_shape
    if protocol in ("single", "flip"):
        return functools.partial(PROTOCOLS[protocol], view=view)
    if height != width:
        raise ValueError(
            f"evaluation.protocol = {protocol!r} takes square crops, and this network was trained on images "
            f"of {height}x{width} pixels; use 'single' or 'flip'"
        )
    make = functools.partial(PROTOCOLS[protocol], crop=height - 2 * border)
    if not border:
        return make
    edge = (border, border)
    return lambda image: [np.pad(one, (edge, edge, (0, 0))) for one in make(image)]


def scaled(paper_side, crop):
    """Scales a length in a paper, in pixels, to a network that takes `crop` pixels instead of 224."""
    return round(crop * paper_side / PAPER_CROP)


def single(image, view):
    """[The image as the feed shows it]."""
    return [view(image)]


def flip(image, view):
    """The single view and its mirror image."""
    return _with_mirrors(single(image, view))


def centre_crop(image, crop):
    """[The centre of the image after resizing its shorter side to 256 / 224 of the crop]."""
    return [_centre(_resize_shorter(image, scaled(256, crop)), crop, crop)]


def ten_crop(image, crop):
    """Corners and centre of the central square, then their mirror images (Krizhevsky et al. 2012, 4.1)."""
    side = scaled(256, crop)
    square = _centre(_resize_shorter(image, side), side, side)
    return _with_mirrors(_corners_and_centre(square, crop))


def multi_scale_dense(image, crop):
    """The whole image at three sizes, then its mirror images (Simonyan, Zisserman 2014, 3.2 and 4.2)."""
    return _with_mirrors(_whole(image, crop, VGG_SIDES))


def resnet_dense(image, crop):
    """The whole image at five sizes (He et al. 2015, section 3.4)."""
    return _whole(image, crop, RESNET_SIDES)


def googlenet_144(image, crop):
    """4 sizes x 3 squares x 6 crops x 2 mirror images (Szegedy et al. 2014, section 7).

    The squares lie at both ends and in the middle of the longer side; in a square image they coincide.
    """
    views = []
    for paper_side in GOOGLENET_SIDES:
        side = scaled(paper_side, crop)
        resized = _resize_shorter(image, side)
        for numerator in (0, 1, 2):
            top, left = ((length - side) * numerator // 2 for length in resized.shape[:2])
            square = resized[top : top + side, left : left + side]
            views += [*_corners_and_centre(square, crop), _resize(square, crop, crop)]
    return _with_mirrors(views)


PROTOCOLS = {
    "single": single,
    "flip": flip,
    "centre_crop": centre_crop,
    "ten_crop": ten_crop,
    "multi_scale_dense": multi_scale_dense,
    "resnet_dense": resnet_dense,
    "googlenet_144": googlenet_144,
}


def _with_mirrors(views):
    return [*views, *(view[:, ::-1] for view in views)]


def _corners_and_centre(image, crop):
    bottom, right = image.shape[0] - crop, image.shape[1] - crop
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = [image[top : top + crop, left : left + crop] for top, left in corners]
    return [*crops, _centre(image, crop, crop)]


def _centre(image, height, width):
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _whole(image, crop, paper_sides):
    """The image at several sizes, for a network that averages over space at any size."""
    return [_cut_longer(_resize_shorter(image, scaled(side, crop))) for side in paper_sides]


def _cut_longer(image):
    shorter = min(image.shape[:2])
    return _centre(
        image, *(shorter + (side - shorter) // DENSE_STEP * DENSE_STEP for side in image.shape[:2])
    )


def _resize_shorter(image, side):
    """Resizes the shorter side to `side` pixels, and keeps the aspect ratio."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return _resize(image, round(height * side / shorter), round(width * side / shorter))


def _resize(image, height, width):
    if image.shape[:2] == (height, width):
        return image
    # The mean over areas avoids aliasing; it cannot enlarge.
    shrinks = height < image.shape[0] and width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)
    return resized.reshape(height, width, image.shape[2])  # OpenCV drops the axis of a single channel
