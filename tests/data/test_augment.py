import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.data import augment
from cnn_cases.data.augment import Settings
from configs import common

# Compiled, as in a step, and because it takes less time than operation by operation.
geometry = jax.jit(augment.geometry, static_argnums=2)
colours = jax.jit(augment.colours, static_argnums=2)
split_streams = jax.jit(augment.split_streams)
elastic_fields = jax.jit(
    jax.vmap(augment.elastic_field, (0, None, None, None, None)), static_argnums=(1, 2, 4)
)


def keys_of(batch):
    return jax.jit(augment.example_keys)(jax.random.key(0), np.arange(batch))


def streams_of(batch):
    return split_streams(keys_of(batch))


def random_images(batch=64, size=6):
    return np.random.default_rng(9).integers(1, 256, (batch, size, size, 3), dtype=np.uint8)


def unit_images(batch=64, size=6):
    """Not so bright that a small change would be clipped."""
    return (random_images(batch, size) / 512 + 0.2).astype(np.float32)


def oblong_images(batch=64):
    """Of 6x10 pixels, which tell rows from columns."""
    return unit_images(batch, size=10)[:, :6]


def grey_of(image):
    return np.asarray(image) @ np.array([0.299, 0.587, 0.114])


# The list of what there is.


def test_the_defaults_of_the_configs_are_those_of_the_settings_and_do_nothing():
    settings = Settings(**common.get_config().data.augment)
    assert settings == Settings()
    augment.check(settings, (1, 1, 1))
    image, streams = unit_images(), streams_of(64)
    np.testing.assert_array_equal(colours(image, streams, settings, None), image)
    np.testing.assert_array_equal(geometry(image, streams, settings), image)


def test_streams_differ_and_a_new_one_leaves_the_others_alone():
    keys = keys_of(3)
    streams = augment.split_streams(keys)
    everything = np.stack([jax.random.key_data(streams[name]) for name in augment.STREAMS])
    assert len(np.unique(everything.reshape(-1, 2), axis=0)) == 3 * len(augment.STREAMS)
    for number in range(3):
        fewer = jax.random.split(keys[number], 2)
        assert (streams["pad"][number], streams["flip"][number]) == tuple(fewer)


ALL = Settings(
    pad=2, flip=True, lighting=0.1, brightness=0.3, contrast=0.3, saturation=0.3, shift=1.0, scale=0.1,
    squeeze=0.1, shear=0.1, elastic=5.0, elastic_sigma=2.0, cutout=3,
)  # fmt: skip


def augmented(image, keys):
    """All that happens to one example alone."""
    streams = augment.split_streams(keys)
    image = augment.colours(image, streams, ALL, augment.IMAGENET_BASIS)
    image = augment.geometry(image, streams, ALL)
    return augment.random_cutout(image, streams["cutout"], ALL.cutout)


def test_an_example_is_augmented_by_its_own_key_alone():
    image, keys = unit_images(), keys_of(64)
    whole = jax.jit(augmented)(image, keys)
    assert not np.allclose(whole, image)
    one_by_one = jax.vmap(lambda image, key: augmented(image[None], key[None])[0])
    np.testing.assert_allclose(whole, jax.jit(one_by_one)(image, keys), atol=1e-6)


@pytest.mark.parametrize(
    ("own", "settings"),
    [
        ("pad", {"pad": 2}),
        ("flip", {"flip": True}),
        ("affine", {"shift": 2.0}),
        ("elastic", {"elastic": 20.0}),
    ],
)
def test_where_pixels_go_depends_on_the_augmentations_own_stream_alone(own, settings):
    image, streams, settings = unit_images(), streams_of(64), Settings(**settings)
    others = split_streams(jax.random.split(jax.random.key(1), 64))
    seen = geometry(image, streams, settings)
    np.testing.assert_array_equal(geometry(image, others | {own: streams[own]}, settings), seen)
    assert not np.allclose(geometry(image, streams | {own: others[own]}, settings), seen)


def test_switching_the_flip_on_does_not_move_the_crop():
    image, streams = random_images(), streams_of(64)
    cropped = geometry(image, streams, Settings(pad=2))
    both = geometry(image, streams, Settings(pad=2, flip=True))
    mirrored = (both != cropped).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(
        both, jnp.where(mirrored[:, None, None, None], cropped[:, :, ::-1], cropped)
    )


def test_switching_elastic_on_does_not_move_the_affine_map():
    image, streams = unit_images(size=12), streams_of(64)
    affine = warp(image, streams, shift=3.0, scale=0.2)
    both = warp(image, streams, shift=3.0, scale=0.2, elastic=1e-4)
    np.testing.assert_allclose(both, affine, atol=1e-3)


# Crop and flip.


def test_every_crop_is_a_window_of_the_padded_image_and_all_windows_occur():
    image, pad = random_images(200), 1
    cropped = np.asarray(augment.random_crop(image, keys_of(200), pad))
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    seen = set()
    for picture, crop in zip(padded, cropped, strict=True):
        windows = [
            (i, j) for i in range(3) for j in range(3) if (picture[i : i + 6, j : j + 6] == crop).all()
        ]
        assert len(windows) == 1
        seen.update(windows)
    assert len(seen) == 9


@pytest.mark.parametrize("pad", [1, 4, 6])
def test_products_cut_what_slices_cut(pad):
    image = oblong_images()
    offsets = np.random.default_rng(0).integers(-pad, pad + 1, (len(image), 2)).astype(np.int32)
    offsets[:4] = [[-pad, pad], [pad, -pad], [0, 0], [0, pad]]
    slices = augment._cut_slices(image, offsets, pad)
    np.testing.assert_array_equal(augment._cut_by_products(image, offsets), slices)


def test_products_that_cut_are_at_full_precision():
    program = jax.make_jaxpr(augment._cut_by_products)(oblong_images(2), np.zeros((2, 2), np.int32))
    products = [one.params for one in program.eqns if one.primitive.name == "dot_general"]
    assert [one["precision"] for one in products] == 2 * [(jax.lax.Precision.HIGHEST,) * 2]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_products_cut_on_a_tpu_alone(platform):
    crop = jax.jit(lambda image, keys: augment.random_crop(image, keys, 2))
    text = crop.trace(random_images(8), keys_of(8)).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == (platform == "tpu") != ("gather" in text)


def test_a_flip_mirrors_about_half_of_the_images():
    image = random_images(400)
    flipped = np.asarray(augment.random_flip(image, keys_of(400)))
    same = (flipped == image).all(axis=(1, 2, 3))
    mirrored = (flipped == image[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_crop_and_flip_keep_the_type():
    settings = Settings(pad=2, flip=True)
    assert geometry(random_images(), streams_of(64), settings).dtype == jnp.uint8


# Colours.


def test_lighting_adds_one_colour_an_image_spread_as_the_principal_colours_are():
    image, std = unit_images(4_000, size=2), 0.1
    values, vectors = augment.IMAGENET_BASIS
    added = colours(image, streams_of(4_000), Settings(lighting=std), (values, vectors)) - image
    colour = np.asarray(added.mean(axis=(1, 2)))
    np.testing.assert_allclose(added, np.broadcast_to(colour[:, None, None], added.shape), atol=1e-6)
    # In the basis of the eigenvectors the three are independent, of deviation std times the eigenvalue.
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)
    along = colour @ vectors
    np.testing.assert_allclose(along.mean(axis=0), 0, atol=std * values.max() / 20)
    np.testing.assert_allclose(along.std(axis=0), std * values, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(along.T), np.eye(3), atol=0.06)


def test_the_principal_colours_of_imagenet_are_those_of_the_published_covariance():
    values, vectors = augment.IMAGENET_BASIS
    np.testing.assert_allclose(values, [0.2175, 0.0188, 0.0045])  # fb.resnet.torch, datasets/imagenet.lua
    deviations = np.sqrt(np.diag(vectors * values @ vectors.T))
    np.testing.assert_allclose(deviations, [0.284, 0.276, 0.290], atol=5e-4)  # of red, green and blue
    assert (np.sign(vectors[:, 0]) == -1).all(), "the first colour is grey"


def test_lighting_comes_after_the_other_changes_of_colours_and_is_not_clipped():
    image, basis = unit_images(), augment.IMAGENET_BASIS
    changes = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5}

    def changed(**settings):
        return colours(image, streams_of(64), Settings(**settings), basis)

    added = changed(lighting=5.0) - image
    both = changed(lighting=5.0, **changes)
    np.testing.assert_allclose(both, changed(**changes) + added, atol=1e-5)
    assert both.min() < 0


def photometric(image, *limits):
    return np.asarray(jax.jit(augment.random_photometric)(image, streams_of(len(image)), limits))


def factors(after, before):
    """The one factor of each image, checked to be one; before and after [B, ...]."""
    after, before = (np.asarray(array).reshape(len(array), -1) for array in (after, before))
    found = (after * before).sum(axis=1) / (before**2).sum(axis=1)
    np.testing.assert_allclose(after, found[:, None] * before, atol=1e-5)
    return found


def check_spread(found, limit):
    """Uniform in [1 - limit, 1 + limit]."""
    assert found.min() >= 1 - limit - 1e-4
    assert found.max() <= 1 + limit + 1e-4
    np.testing.assert_allclose(np.quantile(found, [0.25, 0.75]), [1 - limit / 2, 1 + limit / 2], atol=0.05)


def test_brightness_multiplies_all_pixels_of_an_image():
    image = unit_images(500)
    check_spread(factors(photometric(image, 0.3, 0, 0), image), 0.3)


def test_contrast_keeps_the_mean_grey_and_stretches_the_rest():
    image = unit_images(500)
    after = photometric(image, 0, 0.3, 0)
    mean = grey_of(image).mean(axis=(1, 2))
    np.testing.assert_allclose(grey_of(after).mean(axis=(1, 2)), mean, atol=1e-5)
    mean = mean[:, None, None, None]
    check_spread(factors(after - mean, image - mean), 0.3)


def test_saturation_keeps_every_pixels_grey_and_stretches_its_colour():
    image = unit_images(500) / 2 + 0.2
    after = photometric(image, 0, 0, 0.3)
    np.testing.assert_allclose(grey_of(after), grey_of(image), atol=1e-5)
    grey = grey_of(image)[..., None]
    check_spread(factors(after - grey, image - grey), 0.3)


def test_distortions_stay_in_the_range_of_pixels_and_come_in_every_order():
    # Black, white and strong colours clip at once, and then the order of the three shows.
    pixels = [[0, 0, 0], [1, 1, 1], [0.9, 0.1, 0.3], [0.2, 0.8, 0.6]]
    image = np.tile(np.float32(pixels), (600, 1, 1, 1))
    after = photometric(image, 0.9, 0.9, 0.9)
    assert after.min() >= 0
    assert after.max() <= 1
    streams = streams_of(600)

    def distort(x, name):
        amount = 1 + 0.9 * jax.vmap(lambda key: jax.random.uniform(key, minval=-1, maxval=1))(streams[name])
        grey = grey_of(x)[..., None]
        mean = grey.mean(axis=(1, 2), keepdims=True)
        without = {"brightness": 0, "contrast": mean, "saturation": grey}[name]
        return np.clip(without + np.asarray(amount)[:, None, None, None] * (x - without), 0, 1)

    orders = itertools.permutations(("brightness", "contrast", "saturation"))
    ways = np.stack([functools.reduce(distort, order, image) for order in orders])
    came = np.abs(after - ways).max(axis=(2, 3, 4)) < 1e-5
    assert came.any(axis=0).all()
    alone = came[:, came.sum(axis=0) == 1]  # clipping can make the results of two orders equal
    assert alone.sum(axis=1).min() > 20


def test_images_of_one_channel_have_brightness_and_contrast():
    image = unit_images()[..., :1]
    after = colours(image, streams_of(64), Settings(brightness=0.3, contrast=0.3), None)
    assert after.shape == image.shape
    assert not np.allclose(after, image)


# The warp.


def blob(size=57):
    """A round Gaussian about the centre, of variance 16."""
    place = np.arange(size) - size // 2
    line = np.exp(-(place**2) / 32)
    return (line[:, None] * line[None, :])[..., None].astype(np.float32)


def moments(image):
    """Centre of mass [B, 2] about the middle, and covariance [B, 2, 2], in pixels."""
    image = np.asarray(image, np.float64)[..., 0]
    place = np.arange(image.shape[1]) - image.shape[1] // 2
    places = np.stack(np.meshgrid(place, place, indexing="ij"))
    image = image / image.sum(axis=(1, 2), keepdims=True)
    centre = np.einsum("bij,kij->bk", image, places)
    second = np.einsum("bij,kij,lij->bkl", image, places, places)
    return centre, second - centre[:, :, None] * centre[:, None, :]


@functools.partial(jax.jit, static_argnames=("elastic", "elastic_sigma"))
def warp(image, streams, **settings):
    return augment.random_warp(image, streams, augment.Settings(**settings))


def warped(picture, batch=200, **settings):
    return moments(warp(jnp.tile(picture, (batch, 1, 1, 1)), streams_of(batch), **settings))


def test_a_shift_moves_and_does_nothing_else():
    centre, covariance = warped(blob(), shift=5.0)
    assert 4.5 < abs(centre).max() <= 5.01
    assert (abs(centre.mean(axis=0)) < 0.6).all()
    assert abs(np.corrcoef(centre.T)[0, 1]) < 0.2
    # Bilinear sampling blurs by a quarter of a squared pixel at most.
    np.testing.assert_allclose(covariance, np.broadcast_to(16 * np.eye(2), covariance.shape), atol=0.3)


def test_a_scaling_enlarges_both_sides_by_the_same_factor():
    centre, covariance = warped(blob(), scale=0.4)
    np.testing.assert_allclose(centre, 0, atol=1e-3)
    np.testing.assert_allclose(covariance[:, 0, 0], covariance[:, 1, 1], rtol=1e-3)
    factor = np.sqrt(covariance[:, 0, 0] / 16)
    assert 0.6 <= factor.min() < 0.65
    assert 1.35 < factor.max() <= 1.41


def test_a_squeeze_widens_as_much_as_it_flattens():
    centre, covariance = warped(blob(), squeeze=0.4)
    np.testing.assert_allclose(centre, 0, atol=1e-3)
    wider, taller = np.sqrt(covariance[:, 1, 1] / 16), np.sqrt(covariance[:, 0, 0] / 16)
    np.testing.assert_allclose(wider * taller, 1, atol=0.03)
    assert wider.min() < 0.7
    assert wider.max() > 1.3


def test_a_shear_moves_rows_to_the_side_by_their_height():
    _, covariance = warped(blob(), shear=0.5)
    np.testing.assert_allclose(covariance[:, 0, 0], 16, rtol=0.02)
    slant = covariance[:, 0, 1] / covariance[:, 0, 0]
    assert 0.45 < abs(slant).max() <= 0.51
    assert (slant > 0).any()
    assert (slant < 0).any()
    np.testing.assert_allclose(covariance[:, 1, 1], 16 * (1 + slant**2), rtol=0.02)


def test_scaling_squeezing_and_shearing_leave_the_centre_of_an_oblong_image_in_its_place():
    image = oblong_images()
    image = image + image[:, ::-1, ::-1]
    changed = warp(image, streams_of(64), scale=0.4, squeeze=0.4, shear=0.5)
    np.testing.assert_allclose(changed, changed[:, ::-1, ::-1], atol=1e-4)
    assert not np.allclose(changed, image, atol=0.1)


def test_a_shear_leaves_the_centre_of_an_image_where_the_shift_has_put_it():
    shifted, _ = warped(blob(), shift=5.0)
    sheared, _ = warped(blob(), shift=5.0, shear=0.5)
    np.testing.assert_allclose(sheared, shifted, atol=0.02)


def test_the_distortions_of_an_image_are_drawn_apart_from_each_other():
    centre, covariance = warped(blob(), batch=400, shift=3.0, scale=0.3, squeeze=0.3, shear=0.3)
    slant = covariance[:, 0, 1] / covariance[:, 0, 0]
    height = np.sqrt(covariance[:, 0, 0])
    width = np.sqrt(covariance[:, 1, 1] - slant**2 * covariance[:, 0, 0])
    correlations = np.corrcoef([*centre.T, height * width, width / height, slant])
    assert abs(correlations - np.eye(5)).max() < 0.2


def test_what_comes_in_from_outside_is_zero_and_no_distortion_is_the_identity():
    image = jnp.ones((200, 8, 8, 1))
    moved = np.asarray(warp(image, streams_of(200), shift=8.0))
    assert moved.min() == 0
    assert moved.max() == 1
    image = jnp.arange(200 * 8 * 8).reshape(200, 8, 8, 1) / 1e4
    np.testing.assert_allclose(warp(image, streams_of(200)), image, atol=1e-5)


def test_an_elastic_field_is_noise_of_the_stated_strength_that_neighbours_share():
    alpha, sigma = 34.0, 4.0
    field = np.asarray(elastic_fields(keys_of(300), 29, 29, alpha, sigma))
    # Uniform noise of variance 1/3, averaged with weights whose squares add up to 1 / (4 pi sigma^2).
    deviation = alpha * math.sqrt(1 / 3 / (4 * math.pi)) / sigma
    np.testing.assert_allclose(field.std(), deviation, rtol=0.03)
    np.testing.assert_allclose(deviation / alpha, 0.041, atol=5e-4)
    np.testing.assert_allclose(field[:, :, 0].std(), deviation, rtol=0.08)  # at the border as inside
    for lag in (1, 4, 8):
        found = np.mean(field[..., lag:] * field[..., :-lag]) / deviation**2
        np.testing.assert_allclose(found, np.exp(-(lag**2) / (4 * sigma**2)), atol=0.06)
    assert abs(np.corrcoef(field[:, 0].ravel(), field[:, 1].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_an_elastic_distortion_moves_pixels_by_its_field(axis):
    size = (21, 25)
    ramp = np.tile(np.indices(size, np.float32)[axis][..., None] + 5, (8, 1, 1, 1))
    keys = streams_of(8)
    bent = warp(ramp, keys, elastic=20.0, elastic_sigma=3.0)
    field = elastic_fields(keys["elastic"], *size, 20.0, 3.0)
    inside = (slice(None), slice(6, -6), slice(6, -6))
    np.testing.assert_allclose((bent - ramp)[..., 0][inside], field[:, axis][inside], atol=1e-4)


# Cutout.


def test_a_cutout_is_a_square_of_zeros_about_any_pixel_cut_at_the_border():
    image, side = jnp.ones((2_000, 6, 6, 3)), 4
    cut = np.asarray(jax.jit(augment.random_cutout, static_argnums=2)(image, keys_of(2_000), side))
    assert set(np.unique(cut)) == {0, 1}
    hole = cut[..., 0] == 0
    assert (hole[..., None] == (cut == 0)).all()
    rows, columns = hole.any(axis=2), hole.any(axis=1)
    np.testing.assert_array_equal(hole, rows[:, :, None] & columns[:, None, :])
    expected = {tuple(abs(place - centre + 0.5) < 2 for place in range(6)) for centre in range(6)}
    for lines in (rows, columns):
        assert {tuple(line) for line in lines.tolist()} == expected
    assert len({hole.tobytes() for hole in hole}) == 36


# Mixing.


@functools.partial(jax.jit, static_argnums=(2, 3))
def mixed(image, label, settings, axis_name=None):
    return augment.mix(image, label, streams_of(len(image)), settings, 5, axis_name)


def test_mixup_blends_each_example_and_its_label_with_the_one_before():
    image, label = unit_images(), jnp.arange(64) % 5
    blended, target = map(np.asarray, mixed(image, label, Settings(mixup=0.4)))
    np.testing.assert_allclose(target.sum(axis=1), 1, rtol=1e-6)
    share = target[np.arange(64), label][:, None, None, None]
    assert len(np.unique(share)) == 64, "each example has a share of its own"
    np.testing.assert_allclose(blended, share * image + (1 - share) * np.roll(image, 1, axis=0), atol=1e-6)
    np.testing.assert_allclose(target[np.arange(64), np.roll(label, 1)], 1 - share.ravel(), atol=1e-6)


def test_shares_are_beta_distributed():
    draw = jax.jit(augment.random_shares)
    for alpha in (0.2, 1.0, 4.0):
        share = np.asarray(draw(keys_of(4_000), alpha))
        np.testing.assert_allclose(share.mean(), 0.5, atol=0.03)
        np.testing.assert_allclose(share.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.08)


def test_cutmix_takes_a_box_from_the_one_before_and_its_part_of_the_label():
    image, label = oblong_images(300), jnp.arange(300) % 5
    pasted, target = map(np.asarray, mixed(image, label, Settings(cutmix=1.0)))
    before = np.roll(image, 1, axis=0)
    own, other = (pasted == image).all(axis=-1), (pasted == before).all(axis=-1)
    assert (own ^ other).all()
    rows, columns = other.any(axis=2), other.any(axis=1)
    np.testing.assert_array_equal(other, rows[:, :, None] & columns[:, None, :])
    np.testing.assert_allclose(target[np.arange(300), label], own.mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_allclose(target.sum(axis=1), 1, rtol=1e-6)
    # Where the border does not cut the box, it has the proportions of the image.
    inside = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    sides = zip(rows.sum(axis=1)[inside], columns.sum(axis=1)[inside], strict=True)
    assert set(sides) <= {(int(6 * part), int(10 * part)) for part in np.linspace(0, 1, 1_000)}
    assert 0.55 < own.mean() < 0.85  # a half is the mean of Beta(1, 1), the border's cut leaves more


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad": -1}, "data.augment.pad = -1 must be 0 or more"),
        ({"lighting": float("nan")}, "data.augment.lighting = nan must be 0 or more"),
        (
            {"lighting_basis": "cifar"},
            "data.augment.lighting_basis = 'cifar' is unknown; known: train, imagenet",
        ),
        ({"brightness": 1.5}, r"data.augment.brightness = 1.5 must be in \[0, 1\]"),
        ({"brightness": -0.1}, r"data.augment.brightness = -0.1 must be in \[0, 1\]"),
        ({"squeeze": 1.0}, r"data.augment.squeeze = 1.0 must be in \[0, 1\)"),
        ({"squeeze": -0.1}, r"data.augment.squeeze = -0.1 must be in \[0, 1\)"),
        ({"elastic_sigma": 0.0}, "data.augment.elastic_sigma = 0.0 must be above 0"),
        ({"elastic": 1.0, "elastic_sigma": 9.0}, "data.augment.elastic_sigma = 9.0 must be at most 8"),
        ({"cutout": 9}, "data.augment.cutout = 9 must be at most 8, the pixels of an image's side"),
        ({"shift": 8.5}, "data.augment.shift = 8.5 must be at most 8, the pixels of an image's side"),
        ({"mixup": -0.1}, "data.augment.mixup = -0.1 must be 0 or more"),
        (
            {"mixup": 0.2, "cutmix": 1.0},
            "data.augment.mixup = 0.2 must be 0, because data.augment.cutmix = 1.0",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        augment.check(Settings(**settings), (8, 10, 3))


@pytest.mark.parametrize("key", ["lighting", "saturation"])
def test_colours_are_refused_for_grey_images(key):
    with pytest.raises(ValueError, match=rf"data.augment.{key} = 0.1 must be 0 for images of 1 channels"):
        augment.check(Settings(**{key: 0.1}), (8, 8, 1))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_a_cutmix_box_has_the_share_of_the_area_that_is_drawn(alpha):
    image, label = unit_images(3_000, size=32)[..., :1], jnp.arange(3_000) % 5
    _, target = map(np.asarray, mixed(image, label, Settings(cutmix=alpha)))
    share = 1 - target[np.arange(3_000), label]
    # The part inside of a side of sqrt(u), by its centre; rows and columns have centres of their own.
    side = np.sqrt(np.random.default_rng(0).beta(alpha, alpha, (1_000, 1)))
    centre = (np.arange(32) + 0.5) / 32
    inside = np.minimum(centre + side / 2, 1) - np.maximum(centre - side / 2, 0)
    mean, mean_square = ((inside**power).mean(axis=1) ** 2 for power in (1, 2))
    np.testing.assert_allclose(share.mean(), mean.mean(), rtol=0.06)
    np.testing.assert_allclose((share**2).mean(), mean_square.mean(), rtol=0.1)


@pytest.mark.parametrize("side", [1, 3])
def test_a_cutout_of_an_odd_side_has_its_pixel_in_the_middle(side):
    image = jnp.ones((500, 6, 10, 1))
    hole = np.asarray(augment.random_cutout(image, keys_of(500), side))[..., 0] == 0
    for lines in (hole.any(axis=2), hole.any(axis=1)):
        places = range(lines.shape[1])
        expected = {tuple(abs(place - centre) <= side // 2 for place in places) for centre in places}
        assert {tuple(line) for line in lines.tolist()} == expected
