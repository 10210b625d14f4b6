import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.data import augment


def keys_of(batch, seed=0):
    return augment.example_keys(jax.random.key(seed), jnp.arange(batch))


def random_images(batch=64, size=6):
    return jax.random.randint(jax.random.key(9), (batch, size, size, 3), 1, 256).astype(jnp.uint8)


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


def test_a_flip_mirrors_about_half_of_the_images():
    image = random_images(400)
    flipped = np.asarray(augment.random_flip(image, keys_of(400)))
    same = (flipped == image).all(axis=(1, 2, 3))
    mirrored = (flipped == image[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_nothing_asked_for_is_the_identity():
    image = random_images()
    np.testing.assert_array_equal(augment.augment(image, keys_of(64), pad=0, flip=False), image)


def test_switching_the_flip_on_does_not_move_the_crop():
    image, keys = random_images(), keys_of(64)
    cropped = augment.augment(image, keys, pad=2, flip=False)
    both = augment.augment(image, keys, pad=2, flip=True)
    mirrored = (both != cropped).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(
        both, jnp.where(mirrored[:, None, None, None], cropped[:, :, ::-1], cropped)
    )


@pytest.mark.parametrize("part", [slice(0, 16), slice(48, 64)])
def test_an_example_is_augmented_by_its_position_alone(part):
    image, keys = random_images(), keys_of(64)
    whole = augment.augment(image, keys, pad=2, flip=True)
    alone = augment.augment(image[part], keys[part], pad=2, flip=True)
    np.testing.assert_array_equal(whole[part], alone)


def test_the_type_is_kept():
    assert augment.augment(random_images(), keys_of(64), pad=2, flip=True).dtype == jnp.uint8
