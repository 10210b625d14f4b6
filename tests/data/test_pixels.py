import jax
import numpy as np
import pytest

from cnn_cases.data.pixels import make_pixels

IMAGE = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
AUGMENT = {"pad": 0, "flip": False}


def everything(image=IMAGE, **settings):
    pixels = make_pixels(image, **{"normalization": "none", "augment": AUGMENT} | settings)
    return np.asarray(jax.jit(pixels.evaluate)(pixels.arrays, image))


def test_channel_normalization_gives_mean_zero_and_deviation_one():
    image = everything(normalization="channel")
    np.testing.assert_allclose(image.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_pixel_mean_normalization_gives_a_mean_image_of_zero():
    image = everything(normalization="pixel_mean")
    np.testing.assert_allclose(image.mean(axis=0), 0, atol=1e-6)
    assert image.std() < 0.5  # not divided by a deviation


def test_pixel_mean_normalization_can_keep_the_range_of_256_values():
    small, large = (everything(normalization=name) for name in ("pixel_mean", "pixel_mean_255"))
    np.testing.assert_allclose(large, 255 * small, rtol=1e-5, atol=1e-4)


def test_the_input_of_lenet5_has_black_below_zero_and_white_above_one():
    expected = IMAGE / 255 * 1.275 - 0.1
    np.testing.assert_allclose(everything(normalization="lenet5_1998"), expected, atol=1e-6)


def test_constant_images_do_not_divide_by_zero():
    black = np.zeros((6, 2, 2, 1), np.uint8)
    np.testing.assert_array_equal(everything(black, normalization="channel"), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"normalization": "whiten"},
            "data.normalization = 'whiten' is unknown; known: none, channel, pixel_mean, pixel_mean_255",
        ),
        ({"augment": {"pad": -1, "flip": False}}, "data.augment.pad = -1 must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        everything(**settings)
