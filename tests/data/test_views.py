"""What a network is shown of an image: known by where each pixel of a view comes from."""

import numpy as np
import pytest

from cnn_cases.data import views


def index_image(height, width, channels=3):
    """An image whose pixel (row, column) holds (row, column, 0)."""
    grid = np.stack(np.mgrid[:height, :width], axis=-1).astype(np.uint8)
    return np.concatenate([grid, np.zeros((height, width, 1), np.uint8)], axis=-1)[..., :channels]


def smooth_image(height, width):
    """No symmetry, and no two windows of it are alike."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 3, (height, width, 3))
    return (steps.cumsum(axis=0).cumsum(axis=1) ** 0.7 % 256).astype(np.uint8)


def window(view):
    """Where a view of an index image begins, and whether it is mirrored."""
    mirrored = view[0, 0, 1] > view[0, -1, 1]
    return int(view[0, 0, 0]), int(view[0, -1 if mirrored else 0, 1]), bool(mirrored)


def make_views(protocol, image_shape):
    """With a feed's view that is the whole image, cut at the bottom and at the right, or repeated there."""

    def view(image):
        height, width = image_shape[:2]
        padded = np.pad(image, ((0, height), (0, width), (0, 0)), mode="edge")
        return padded[:height, :width]

    return views.make_views(protocol, image_shape, view)


@pytest.mark.parametrize(
    ("protocol", "count"),
    [
        ("single", 1),
        ("flip", 2),
        ("centre_crop", 1),
        ("ten_crop", 10),
        ("multi_scale_dense", 6),
        ("resnet_dense", 5),
        ("googlenet_144", 144),
    ],
)
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (50, 33, 3), (41, 90, 1)])
def test_every_protocol_gives_as_many_views_of_any_image(protocol, count, shape):
    found = make_views(protocol, (32, 32, shape[2]))(np.zeros(shape, np.uint8))
    assert len(found) == count
    assert {view.dtype for view in found} == {np.dtype(np.uint8)}
    assert {view.shape[2] for view in found} == {shape[2]}
    if not protocol.endswith("_dense"):
        assert {view.shape for view in found} == {(32, 32, shape[2])}


def test_the_list_of_the_docstring_is_that_of_the_table():
    assert all(f"\n    {protocol} " in views.__doc__ for protocol in views.PROTOCOLS)


@pytest.mark.parametrize("size", [(20, 30), (40, 40)])
def test_an_image_is_shown_as_the_feed_does(size):
    image = index_image(*size)
    seen = image[:20, :30]
    (single,) = make_views("single", (20, 30, 3))(image)
    np.testing.assert_array_equal(single, seen)
    shown = make_views("flip", (20, 30, 3))(image)
    np.testing.assert_array_equal(shown, [seen, seen[:, ::-1]])


def test_a_larger_image_is_shown_by_the_centre_of_its_resized_self():
    # 37 is the shorter side, so nothing is resized here.
    image = index_image(37, 60)
    (centre,) = make_views("centre_crop", (32, 32, 3))(image)
    assert window(centre) == (2, 14, False)
    np.testing.assert_array_equal(centre, image[2:34, 14:46])


def test_ten_crops_are_corners_and_centre_of_the_central_square_and_their_mirror_images():
    image = index_image(37, 60)  # whose central square begins at column 11
    shown = make_views("ten_crop", (32, 32, 3))(image)
    windows = [(0, 11), (0, 16), (5, 11), (5, 16), (2, 13)]
    assert [window(view) for view in shown] == [
        *((row, column, False) for row, column in windows),
        *((row, column, True) for row, column in windows),
    ]
    for view, (row, column) in zip(shown[:5], windows, strict=True):
        np.testing.assert_array_equal(view, image[row : row + 32, column : column + 32])
    for view, mirror in zip(shown[:5], shown[5:], strict=True):
        np.testing.assert_array_equal(view[:, ::-1], mirror)


@pytest.mark.parametrize(("crop", "side"), [(224, 256), (227, 259), (299, 342), (32, 37), (8, 9)])
def test_sizes_go_with_the_networks(crop, side):
    assert views.scaled(256, crop) == side


@pytest.mark.parametrize("shape", [(300, 451), (451, 300)])
def test_144_crops_of_an_image_that_is_not_square_are_all_different(shape):
    shown = make_views("googlenet_144", (224, 224, 3))(smooth_image(*shape))
    assert {view.shape for view in shown} == {(224, 224, 3)}
    assert len({view.tobytes() for view in shown}) == 144
    for view, mirror in zip(shown[:72], shown[72:], strict=True):
        np.testing.assert_array_equal(view[:, ::-1], mirror)


def test_144_crops_are_of_the_papers_four_sizes(monkeypatch):
    sides, resize = [], views._resize_shorter
    monkeypatch.setattr(
        views, "_resize_shorter", lambda image, side: sides.append(side) or resize(image, side)
    )
    make_views("googlenet_144", (224, 224, 3))(smooth_image(300, 451))
    assert sides == [256, 288, 320, 352]


def test_144_crops_reach_both_ends_of_the_longer_side():
    image = index_image(73, 146)  # crop 64: the first size is 73, so nothing is resized in it
    shown = make_views("googlenet_144", (64, 64, 3))(image)
    of_first_size = [window(view) for n, view in enumerate(shown[:18]) if n % 6 != 5]
    assert of_first_size == [
        (row + top, column + left, False)
        for column in (0, 36, 73)
        for top, left in [(0, 0), (0, 9), (9, 0), (9, 9), (4, 4)]
        for row in [0]
    ]


def test_dense_views_keep_the_whole_shorter_side_and_a_longer_one_that_repeats():
    shown = make_views("multi_scale_dense", (224, 224, 3))(smooth_image(300, 500))
    # 300 to 256: 500 becomes 427, cut to 256 + 5 * 32.
    assert [view.shape[:2] for view in shown[:3]] == [(256, 416), (384, 640), (512, 832)]
    for view, mirror in zip(shown[:3], shown[3:], strict=True):
        np.testing.assert_array_equal(view[:, ::-1], mirror)
    five = make_views("resnet_dense", (224, 224, 3))(smooth_image(300, 500))
    assert [min(view.shape[:2]) for view in five] == [224, 256, 384, 480, 640]
    upright = make_views("multi_scale_dense", (32, 32, 3))(smooth_image(80, 37))
    assert [view.shape[:2] for view in upright[:3]] == [(69, 37), (119, 55), (137, 73)]


def test_resizing_keeps_a_constant_image_constant():
    for size in ((300, 500), (20, 17)):
        for protocol in views.PROTOCOLS:
            shown = make_views(protocol, (64, 64, 1))(np.full((*size, 1), 77, np.uint8))
            assert all((view == 77).all() for view in shown)


def test_impossible_views_are_refused():
    with pytest.raises(ValueError, match=r"protocol = 'tencrop' is unknown; known: single, flip, centre"):
        make_views("tencrop", (32, 32, 3))
    with pytest.raises(ValueError, match=r"'ten_crop' takes square crops, .* 20x30 pixels; use 'single'"):
        make_views("ten_crop", (20, 30, 3))


@pytest.mark.parametrize("height", [2, 6])
def test_enlarging_fills_in_even_where_the_other_side_shrinks(height):
    ramp = np.tile(np.uint8([[0, 240]]), (4, 1))[..., None]
    (line, *_) = views._resize(ramp, height, 8)[..., 0]
    assert ((line > 0) & (line < 240)).sum() == 4


def test_shrinking_takes_the_mean_over_areas():
    fine = np.tile(np.uint8([[0, 0, 0, 240]] * 2), (128, 64))[..., None]  # of 256x256, a line in four
    (seen,) = make_views("centre_crop", (56, 56, 1))(fine)  # of 64x64
    np.testing.assert_array_equal(seen, 60)


def test_a_border_that_the_feed_adds_is_around_every_view():
    image = smooth_image(40, 50)
    for protocol in ("centre_crop", "ten_crop", "multi_scale_dense", "googlenet_144"):
        inner = make_views(protocol, (28, 28, 3))(image)
        framed = views.make_views(protocol, (32, 32, 3), None, border=2)(image)
        for one, other in zip(framed, inner, strict=True):
            np.testing.assert_array_equal(one[2:-2, 2:-2], other)
            assert one.sum() == other.sum(), "zero around it"
