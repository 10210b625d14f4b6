import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_cases.models.layers import Dropout, conv_general_dilated

PLAIN = dict(
    lhs_dilation=(1, 1),
    rhs_dilation=(1, 1),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=1,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 0))])
def test_the_matrix_product_is_the_convolution(size, stride, padding):
    x = jax.random.normal(jax.random.key(0), (3, size, size, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 4))
    ours = conv_general_dilated(x, kernel, (stride, stride), padding, **PLAIN)
    reference = lax.conv_general_dilated(x, kernel, (stride, stride), padding, **PLAIN)
    np.testing.assert_allclose(ours, reference, atol=1e-5)


@pytest.mark.parametrize("options", [{"feature_group_count": 2}, {"rhs_dilation": (2, 2)}])
def test_groups_and_dilation_are_left_to_xla(options):
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4 // options.get("feature_group_count", 1), 6))
    padding = ((2, 2), (2, 2))
    ours = conv_general_dilated(x, kernel, (2, 2), padding, **PLAIN | options)
    np.testing.assert_array_equal(
        ours, lax.conv_general_dilated(x, kernel, (2, 2), padding, **PLAIN | options)
    )


def drop(x, rate=0.5, train=True, axis_name=None, seed=0):
    return Dropout(rate, axis_name).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


def test_dropout_keeps_the_mean_and_zeroes_the_rate():
    y = drop(jnp.ones((64, 1000)), rate=0.3)
    assert abs(float(y.mean()) - 1) < 0.01
    assert abs(float((y == 0).mean()) - 0.3) < 0.01


def test_dropout_is_the_identity_in_evaluation():
    x = jax.random.normal(jax.random.key(0), (4, 5))
    np.testing.assert_array_equal(drop(x, train=False), x)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_dropout_does_not_depend_on_the_number_of_devices(num_devices):
    x = jnp.ones((8, 50))
    split = jax.pmap(
        lambda share: drop(share, axis_name="batch"), "batch", devices=jax.devices()[:num_devices]
    )(x.reshape(num_devices, -1, 50))
    np.testing.assert_array_equal(split.reshape(8, 50), drop(x))


def test_dropout_masks_every_example_and_every_step_apart():
    y = drop(jnp.ones((8, 50)))
    assert len({row.tobytes() for row in np.asarray(y)}) == 8
    assert not np.array_equal(y, drop(jnp.ones((8, 50)), seed=1))
