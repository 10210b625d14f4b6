import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.data import augment as augmentations
from cnn_cases.data import pixels as pixels_lib
from cnn_cases.data.pixels import make_pixels
from configs import common

IMAGE = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
AUGMENT = dict(**common.get_config().data.augment)
OFF = {"normalization": "none", "augment": AUGMENT, "num_classes": 5}


def everything(image=IMAGE, **settings):
    pixels = make_pixels(image, **OFF | settings)
    return np.asarray(jax.jit(pixels.evaluate)(pixels.arrays, image))


def trained(image=IMAGE, normalization="none", **augment):
    """What a training step sees of the images, whose labels are 0 to 4 by turns."""
    settings = OFF | {"normalization": normalization, "augment": AUGMENT | augment}
    pixels = make_pixels(image, **settings)
    label, position = np.arange(len(image)) % 5, np.arange(len(image))
    seen, label = jax.jit(pixels.train)(pixels.arrays, image, label, position, jax.random.key(0))
    return np.asarray(seen), np.asarray(label)


def correlated_images(count=400, size=4):
    """Images whose neighbouring pixels and colours resemble each other, as natural ones' do."""
    rng = np.random.default_rng(1)
    coarse = rng.normal(size=(count, 2, 2, 1)).repeat(size // 2, 1).repeat(size // 2, 2)
    noise = rng.normal(size=(count, size, size, 3))
    return np.clip(128 + 60 * coarse + 20 * noise, 0, 255).astype(np.uint8)


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


def test_imagenets_statistics_are_constants():
    image = everything(normalization="imagenet")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(image * std + mean, IMAGE / 255, atol=1e-6)


def test_images_of_another_size_lose_the_mean_images_mean_colour():
    pixels = make_pixels(IMAGE, **OFF | {"normalization": "pixel_mean"})
    larger = np.random.default_rng(3).integers(0, 256, (2, 7, 6, 3), np.uint8)
    expected = larger / 255 - IMAGE.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(pixels.evaluate(pixels.arrays, larger), expected, atol=1e-6)


@pytest.mark.parametrize("normalization", ["channel", "gcn_zca"])
def test_constant_images_do_not_divide_by_zero(normalization):
    black = np.zeros((6, 2, 2, 1), np.uint8)
    np.testing.assert_array_equal(everything(black, normalization=normalization), 0)


def test_images_of_one_grey_have_no_contrast_to_normalize():
    grey = np.float32([1, 77, 254]).reshape(3, 1, 1, 1) / 255 * np.ones((3, 32, 32, 3), np.float32)
    for xp in (np, jnp):
        np.testing.assert_allclose(pixels_lib.contrast_normalized(xp.asarray(grey), xp), 0, atol=1e-6)


def test_contrast_normalization_gives_mean_zero_and_the_norm_of_pylearn2():
    image = pixels_lib.contrast_normalized(IMAGE.astype(np.float32), np).reshape(23, -1)
    np.testing.assert_allclose(image.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 55, rtol=1e-5)
    # One mean and one norm of all channels: what is redder than the others stays so.
    centred = IMAGE.reshape(23, -1) - IMAGE.mean(axis=(1, 2, 3))[:, None]
    expected = 55 * centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(image, expected, atol=1e-4)
    # Brightness and contrast of an image are gone.
    other = pixels_lib.contrast_normalized(IMAGE.astype(np.float32) / 255 * 3 + 7, np)
    np.testing.assert_allclose(other.reshape(23, -1), image, atol=1e-4)


def test_whitening_leaves_no_covariance_but_for_the_bias():
    images = correlated_images()
    before = pixels_lib.contrast_normalized(images.astype(np.float32) / 255, np).reshape(400, -1)
    before = np.cov(before.T, bias=True)
    white = everything(images, normalization="gcn_zca").reshape(400, -1)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    after = np.cov(white.T, bias=True)
    # In the basis of the eigenvectors, a variance v has become v / (v + 0.1): nearly 1 where there is any.
    values, vectors = np.linalg.eigh(before)
    np.testing.assert_allclose(vectors.T @ after @ vectors, np.diag(values / (values + 0.1)), atol=1e-3)
    assert abs(np.corrcoef(before)[0, 1]) > 0.5
    off_diagonal = after - np.diag(np.diag(after))
    assert abs(off_diagonal).max() < 0.05
    # Of all that whiten, this one leaves the picture as it was as far as it can: its matrix is symmetric.
    matrix = make_pixels(images, **OFF | {"normalization": "gcn_zca"}).arrays["zca_matrix"]
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)


def drifting_images():
    """More than two thousand images of 2x2 pixels, the later the redder."""
    images = correlated_images(2_500, size=2)
    images[..., 0] = images[..., 0] * np.linspace(0, 1, 2_500)[:, None, None]
    return images


def test_a_whitening_is_of_all_images_however_many():
    images = drifting_images()
    normalized = pixels_lib.contrast_normalized(images / 255, np).reshape(2_500, -1)
    arrays = pixels_lib._whitening(images)
    np.testing.assert_allclose(arrays["zca_mean"].ravel(), normalized.mean(axis=0), atol=1e-4)
    values, vectors = np.linalg.eigh(np.cov(normalized.T, bias=True))
    expected = vectors @ np.diag((values + pixels_lib.ZCA_BIAS) ** -0.5) @ vectors.T
    np.testing.assert_allclose(arrays["zca_matrix"], expected, atol=1e-5)


def test_a_whitening_is_multiplied_at_full_precision():
    arrays = make_pixels(IMAGE, **OFF | {"normalization": "gcn_zca"}).arrays
    program = jax.make_jaxpr(pixels_lib._whiten)(arrays, IMAGE.astype(np.float32))
    products = [one.params for one in program.eqns if one.primitive.name == "dot_general"]
    assert [one["precision"] for one in products] == [(jax.lax.Precision.HIGHEST,) * 2]


def test_the_whitening_is_an_argument_of_the_step():
    pixels = make_pixels(IMAGE, **OFF | {"normalization": "gcn_zca"})
    assert pixels.arrays["zca_matrix"].shape == (48, 48)
    nothing = pixels.arrays | {"zca_matrix": np.zeros((48, 48), np.float32)}
    np.testing.assert_array_equal(pixels.evaluate(nothing, IMAGE), 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization": "gcn_zca"},
        {"augment": OFF["augment"] | {"lighting": 0.1, "lighting_basis": "train"}},
    ],
)
def test_what_takes_long_is_kept_under_a_key_of_the_images(settings):
    kept = {}

    def keep(key, compute):
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def shown(image, **how):
        pixels = make_pixels(image, **OFF | settings | how)
        label, position = np.zeros(9, np.int32), np.arange(9, dtype=np.int32)
        return pixels.train(pixels.arrays, IMAGE[:9], label, position, jax.random.key(0))[0]

    first, again, other = (shown(image, keep=keep) for image in (IMAGE, IMAGE.copy(), IMAGE[:9]))
    assert len(kept) == 2
    for place in (0, -1):
        changed = IMAGE.copy()
        changed[place, -1, -1, -1] ^= 1
        shown(changed, keep=keep)
    assert len(kept) == 4
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, shown(IMAGE))
    assert not np.allclose(first, other)


@pytest.mark.parametrize("normalization", ["gcn_zca", "pixel_mean", "pixel_mean_255"])
def test_images_whose_places_differ_are_normalised_whole_before_they_are_cropped(normalization):
    whole = everything(normalization=normalization)
    seen, _ = trained(normalization=normalization, pad=2, flip=True)
    streams = augmentations.split_streams(augmentations.example_keys(jax.random.key(0), np.arange(23)))
    expected = augmentations.geometry(whole, streams, augmentations.Settings(pad=2, flip=True))
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    assert (seen == 0).all(axis=-1).any()


@pytest.mark.parametrize("normalization", ["channel", "pixel_mean"])
def test_colours_change_before_the_normalisation(normalization):
    normalize = pixels_lib.make_normalize(
        make_pixels(IMAGE, **OFF | {"normalization": normalization}).statistics
    )

    def expected(image, key):
        streams = augmentations.split_streams(augmentations.example_keys(key, np.arange(23)))
        settings = augmentations.Settings(brightness=0.3)
        return normalize({}, augmentations.colours(pixels_lib.to_unit(image), streams, settings, None))

    seen, _ = trained(normalization=normalization, brightness=0.3)
    np.testing.assert_allclose(seen, jax.jit(expected)(IMAGE, jax.random.key(0)), atol=1e-5)


def test_other_images_are_padded_with_black():
    seen, _ = trained(normalization="channel", pad=2)
    black = pixels_lib.make_pixels(IMAGE, **OFF | {"normalization": "channel"}).evaluate(
        {}, np.zeros((1, 1, 1, 3), np.uint8)
    )
    assert (np.abs(seen - black) < 1e-5).all(axis=-1).any()


def test_a_whitening_refuses_images_of_another_size():
    pixels = make_pixels(IMAGE, **OFF | {"normalization": "gcn_zca"})
    with pytest.raises(
        ValueError, match=r"'gcn_zca' whitens .* shape \(4, 4, 3\), and these have \(5, 5, 3\)"
    ):
        pixels.evaluate(pixels.arrays, np.zeros((2, 5, 5, 3), np.uint8))


def test_the_principal_colours_are_those_of_the_images():
    images = correlated_images()
    values, vectors = pixels_lib.colour_basis(images)
    assert (np.diff(values) < 0).all()
    covariance = np.cov(images.reshape(-1, 3).T / 255, bias=True)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, atol=1e-6)


def test_the_principal_colours_are_of_all_images_however_many():
    images = drifting_images()
    values, vectors = pixels_lib.colour_basis(images)
    covariance = np.cov(images.reshape(-1, 3).T / 255, bias=True)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, atol=1e-6)


def test_lighting_takes_the_colours_that_are_asked_for():
    grey = np.full((200, 2, 2, 3), 128, np.uint8)
    grey[..., 0] += np.arange(200, dtype=np.uint8)[:, None, None] % 2 * 100  # red alone varies
    added = {
        basis: trained(grey, lighting=0.1, lighting_basis=basis)[0] - grey / 255
        for basis in ("train", "imagenet")
    }
    np.testing.assert_allclose(added["train"][..., 1:], 0, atol=1e-6)
    np.testing.assert_allclose(added["train"][..., 0].std(), 0.1 * grey[..., 0].var() / 255**2, rtol=0.2)
    assert (added["imagenet"].std(axis=(0, 1, 2)) > 0.005).all()


def test_a_cutout_is_the_mean():
    seen, _ = trained(normalization="channel", cutout=2)
    plain = everything(normalization="channel")
    cut = (seen == 0).all(axis=-1)
    np.testing.assert_allclose(seen[~cut], plain[~cut], atol=1e-6)
    assert 1 <= cut.sum(axis=(1, 2)).min() < cut.sum(axis=(1, 2)).max() == 4


def test_mixing_comes_last_and_turns_labels_into_targets():
    _, label = trained(cutout=2)
    np.testing.assert_array_equal(label, np.arange(23) % 5)
    seen, target = trained(normalization="channel", mixup=0.4)
    assert target.shape == (23, 5)
    share = target[np.arange(23), np.arange(23) % 5]
    assert np.roll(label, 1)[0] == 2  # 22 % 5, of the last: no example is mixed with its like
    plain = everything(normalization="channel")
    share = share[:, None, None, None]
    np.testing.assert_allclose(seen, share * plain + (1 - share) * np.roll(plain, 1, axis=0), atol=1e-5)


def test_nothing_is_drawn_in_evaluation():
    augment = AUGMENT | {
        "pad": 1,
        "brightness": 0.5,
        "lighting": 0.1,
        "cutout": 2,
        "mixup": 1.0,
        "shift": 2.0,
    }
    np.testing.assert_allclose(everything(augment=augment), IMAGE / 255, atol=1e-6)
    assert everything(augment=augment).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"normalization": "whiten"},
            "data.normalization = 'whiten' is unknown; known: none, channel, pixel_mean, pixel_mean_255",
        ),
        ({"augment": {"pad": -1, "flip": False}}, "data.augment.pad = -1 must be 0 or more"),
        ({"augment": {"cutout": 5}}, "data.augment.cutout = 5 must be at most 4, the pixels"),
        (
            {"normalization": "imagenet", "image": IMAGE[..., :1]},
            "data.normalization = 'imagenet' is for images of 3 channels; these have 1",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        everything(**settings)


def test_images_of_which_the_whitening_would_take_all_memory_are_refused():
    with pytest.raises(
        ValueError, match=r"'gcn_zca' is for images of at most 16,384 values; these of 128x129x1"
    ):
        make_pixels(np.zeros((1, 128, 129, 1), np.uint8), **OFF | {"normalization": "gcn_zca"})


@pytest.mark.parametrize("constant", ["GCN_SCALE", "ZCA_BIAS"])
def test_a_whitening_is_kept_under_a_key_of_its_constants(constant, monkeypatch):
    keys = []

    def keep(key, compute):
        keys.append(key)
        return compute()

    for value in (1.0, 2.0):
        monkeypatch.setattr(pixels_lib, constant, value)
        make_pixels(IMAGE, **OFF | {"normalization": "gcn_zca"}, keep=keep)
    assert len(set(keys)) == 2
