import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.models import fast
from cnn_cases.models.layers import (
    BatchNorm,
    Conv,
    ConvUnit,
    Dense,
    Dropout,
    local_response_norm,
)
from cnn_cases.models.lenet import Subsampling, TableConv
from tests.conftest import drawn
from tests.models.tracing import convolutions, inputs_and_outputs


def drop(x, rate=0.5, train=True, axis_name=None, seed=0):
    return Dropout(rate, axis_name).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


def test_dropout_keeps_the_mean_and_zeroes_the_rate():
    y = drop(jnp.ones((64, 1000)), rate=0.3)
    assert abs(float(y.mean()) - 1) < 0.01
    assert abs(float((y == 0).mean()) - 0.3) < 0.01


def test_dropout_drops_every_value_of_a_map_apart():
    kept = np.asarray(drop(jnp.ones((4, 6, 7, 5)))) > 0
    for axis in (1, 2, 3):
        assert kept.std(axis=axis).mean() > 0.4


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
@pytest.mark.parametrize("train", [True, False])
def test_dropout_refuses_a_rate_that_is_none(rate, train):
    with pytest.raises(ValueError, match=r"the rate of Dropout, .*, must be in \[0, 1\)"):
        drop(jnp.ones((2, 3)), rate=rate, train=train)


def test_dropout_is_the_identity_in_evaluation():
    x = drawn(0, 4, 5)
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


def paper_formula(a, k, n, alpha, beta):
    b = np.empty_like(a)
    channels = a.shape[-1]
    for i in range(channels):
        first, last = max(0, i - n // 2), min(channels - 1, i + n // 2)
        b[..., i] = a[..., i] / (k + alpha * (a[..., first : last + 1] ** 2).sum(-1)) ** beta
    return b


@pytest.mark.parametrize(
    "constants",
    [dict(k=2.0, n=5, alpha=1e-4, beta=0.75), dict(k=1.0, n=3, alpha=0.5, beta=0.5)],
)
@pytest.mark.parametrize("channels", [1, 3, 9])  # fewer than a window, and more
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_response_norm_is_the_papers_formula(constants, channels, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    a = np.random.default_rng(0).normal(0, 100, (2, 3, 4, channels))
    b = local_response_norm(jnp.asarray(a, jnp.float32), **constants)
    np.testing.assert_allclose(b, paper_formula(a, **constants), rtol=1e-5)


def test_response_norm_by_hand_with_the_papers_constants():
    # Five channels of 100: the middle one sees a sum of 50,000, the first a sum of 30,000.
    b = local_response_norm(jnp.full((1, 1, 1, 5), 100.0))
    np.testing.assert_allclose(b[0, 0, 0, 2], 100 / 7**0.75, rtol=1e-6)
    np.testing.assert_allclose(b[0, 0, 0, 0], 100 / 5**0.75, rtol=1e-6)


def test_response_norm_of_bfloat16_is_the_float32_result_rounded_once():
    x = 50 * drawn(0, 1, 2, 2, 16).astype(jnp.bfloat16)
    b = local_response_norm(x)
    assert b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(b, local_response_norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_response_norm_has_the_gradient_of_the_papers_formula(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # By hand, for k = 1, alpha = beta = 1 and one window over all channels: with s = 1 + |a|^2, the gradient
    # of the sum of a / s is 1 / s - 2 a sum(a) / s^2.
    a = np.array([0.5, -1.0, 2.0], np.float32)
    gradient = jax.grad(lambda a: local_response_norm(a, k=1.0, n=5, alpha=1.0, beta=1.0).sum())(a)
    s = 1 + (a**2).sum()
    np.testing.assert_allclose(gradient, 1 / s - 2 * a * a.sum() / s**2, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01)])
def test_on_a_gpu_the_gradient_of_response_norm_keeps_its_input_alone(dtype, tolerance):
    x, gradient = 50 * drawn(0, 2, 3, 4, 16).astype(dtype), drawn(1, 2, 3, 4, 16).astype(dtype)
    expected = jax.vjp(local_response_norm, x.astype(jnp.float32))[1](gradient.astype(jnp.float32))[0]
    with fast.written_for("gpu"):
        _, pull = jax.vjp(local_response_norm, x)
        (kept,) = jax.tree.leaves(pull)
        (found,) = pull(gradient)
    np.testing.assert_array_equal(kept, x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("ours", "flax", "arguments"),
    [
        (Conv, nn.Conv, dict(features=6, kernel_size=(3, 5))),
        (Conv, nn.Conv, dict(features=6, kernel_size=(5, 5), strides=2, padding="VALID")),
        (Conv, nn.Conv, dict(features=6, kernel_size=(3, 3), strides=(2, 1), padding=1, use_bias=False)),
        (Conv, nn.Conv, dict(features=6, kernel_size=(3, 1), padding=(1, 0), feature_group_count=2)),
        (Conv, nn.Conv, dict(features=6, kernel_size=(3, 3), padding=((0, 2), (1, 1)))),
        (Dense, nn.Dense, dict(features=6)),
    ],
    ids=str,
)
def test_layers_have_the_variables_and_the_values_of_flax_s(ours, flax, arguments, dtype):
    arguments |= {} if "use_bias" in arguments else {"bias_init": nn.initializers.normal(1)}
    x = drawn(0, 2, 9, 8, 4)
    (one, variables), (other, expected) = (
        layer(**arguments, dtype=dtype).init_with_output(jax.random.key(0), x) for layer in (ours, flax)
    )
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert one.dtype == dtype
    np.testing.assert_allclose(
        one.astype(float), other.astype(float), rtol=1e-5 if dtype == jnp.float32 else 0.02
    )


@pytest.mark.parametrize(
    "layer",
    [Conv(2, (1, 1)), Dense(2), Subsampling(), TableConv(((0,), (1,)))],
    ids=lambda layer: type(layer).__name__,
)
def test_gradients_of_few_parameters_are_summed_in_float32(layer):
    """In bfloat16, 1 added to 256 is 256, so a sum of ones would not grow further."""
    layer = layer.copy(dtype=jnp.bfloat16)
    x = jnp.ones((8, 68, 68, 2))
    variables = layer.init(jax.random.key(0), x)
    gradients = jax.jit(jax.grad(lambda variables: layer.apply(variables, x).astype(jnp.float32).sum()))(
        variables
    )
    places = jax.eval_shape(layer.apply, variables, x).size // 2
    np.testing.assert_allclose(gradients["params"]["bias"], places, rtol=0.01)
    if "coefficient" in gradients["params"]:
        np.testing.assert_allclose(gradients["params"]["coefficient"], 4 * places, rtol=0.01)


def unit_shapes(unit, height, width):
    x = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    y, variables = jax.eval_shape(unit.init_with_output, jax.random.key(0), x)
    return y.shape[1:], variables["params"]


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (5, 5), (1, 7), (7, 1)])
def test_a_conv_unit_keeps_the_size_of_the_map(window):
    shape, params = unit_shapes(ConvUnit(4, window), 6, 9)
    assert shape == (6, 9, 4)
    assert params["conv"]["kernel"].shape == (*window, 3, 4)


def test_a_conv_unit_takes_stride_and_padding():
    assert unit_shapes(ConvUnit(4, (7, 7), 2), 224, 224)[0] == (112, 112, 4)
    assert unit_shapes(ConvUnit(4, (3, 3), 2, (0, 0)), 299, 35)[0] == (149, 17, 4)


def test_a_conv_unit_has_biases_or_a_normalisation():
    assert set(unit_shapes(ConvUnit(4, (3, 3)), 5, 5)[1]["conv"]) == {"kernel", "bias"}
    norm = functools.partial(BatchNorm, use_running_average=True, epsilon=1e-5)
    params = unit_shapes(ConvUnit(4, (3, 3), norm=norm), 5, 5)[1]
    assert {name: set(layer) for name, layer in params.items()} == {
        "conv": {"kernel"},
        "norm": {"scale", "bias"},
    }


def test_a_conv_unit_ends_in_a_relu():
    x = jnp.ones((1, 1, 1, 1))
    kernel = jnp.asarray([[[[-2.0, 2.0]]]])
    y = ConvUnit(2, (1, 1)).apply({"params": {"conv": {"kernel": kernel, "bias": jnp.full(2, 0.5)}}}, x)
    np.testing.assert_array_equal(y, [[[[0, 2.5]]]])


def test_a_conv_unit_normalises_what_it_convolves_and_cuts_what_it_has_normalised():
    norm = functools.partial(BatchNorm, use_running_average=True, epsilon=1e-3)
    unit, x = ConvUnit(3, (3, 3), norm=norm), drawn(0, 2, 5, 5, 3)
    variables = jax.tree.map(lambda leaf: leaf + 0.5, unit.init(jax.random.key(0), x))
    seen = inputs_and_outputs(lambda: unit.apply(variables, x))
    convolved, (given, normalised) = seen["conv"][1], seen["norm"]
    assert given is convolved
    assert convolved.min() < 0
    assert normalised.min() < 0
    np.testing.assert_array_equal(seen[""][1], nn.relu(normalised))


def test_a_conv_unit_pads_all_edges_alike_even_where_it_subsamples():
    unit, x = ConvUnit(1, (7, 7), 2), jnp.zeros((1, 8, 8, 1))
    with fast.written_for("tpu"):  # in a convolution of `lax`
        (convolution,) = convolutions(unit.init_with_output, jax.random.key(0), x)
    assert convolution.params["padding"] == ((3, 3), (3, 3))


def norms(train, **settings):
    """Ours and Flax's, with variables that are not those of the start."""
    ours = BatchNorm(use_running_average=not train, epsilon=1e-3, **settings)
    flax = nn.BatchNorm(use_running_average=not train, epsilon=1e-3, momentum=0.9, **settings)
    x = 3 * drawn(0, 8, 5, 5, 6) + jnp.arange(6)
    variables = jax.tree.map(lambda leaf: leaf + jnp.linspace(0, 1, 6), ours.init(jax.random.key(1), x))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, flax.init(jax.random.key(1), x))
    return ours, flax, x, variables


@pytest.mark.parametrize("train", [True, False])
def test_batch_normalisation_is_that_of_flax(train):
    ours, flax, x, variables = norms(train)
    stats, weights = variables["batch_stats"], drawn(2, *x.shape)

    def apply(norm):
        def loss(x, params):
            y, updated = norm.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return (y * weights).sum(), (y, updated)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, variables["params"])

    found, expected = apply(ours), apply(flax)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_batch_normalisation_over_an_axis_is_that_of_the_whole_batch(num_parts):
    ours, _, x, variables = norms(train=True)
    whole, updated = ours.apply(variables, x, mutable=["batch_stats"])
    split = functools.partial(ours.clone(axis_name="batch").apply, mutable=["batch_stats"])
    parts, each = jax.vmap(split, (None, 0), axis_name="batch")(variables, x.reshape(num_parts, -1, 5, 5, 6))
    np.testing.assert_allclose(parts.reshape(x.shape), whole, atol=1e-5)
    for one, other in zip(jax.tree.leaves(each), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(one, np.broadcast_to(other, one.shape), rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_batch_normalisation_computes_in_float32(train):
    ours, _, x, variables = norms(train)
    x = x.astype(jnp.bfloat16)
    expected, stats = ours.apply(variables, x.astype(jnp.float32), mutable=["batch_stats"])
    found, updated = ours.clone(dtype=jnp.bfloat16).apply(variables, x, mutable=["batch_stats"])
    assert found.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, updated, stats)


@pytest.mark.parametrize("mean", [10, 100])
def test_batch_normalisation_of_channels_far_from_zero(mean):
    ours, _, x, _ = norms(train=True)
    x = x + mean
    found, _ = ours.init_with_output(jax.random.key(0), x)
    x = np.asarray(x, np.float64)
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
    np.testing.assert_allclose(found, expected, atol=5e-7 * mean**2)  # E[x^2] - E[x]^2 loses as much


def test_batch_normalisation_of_channels_of_one_value_is_finite():
    # E[x^2] - E[x]^2 is then zero but for rounding, which can make it negative.
    x = jnp.broadcast_to(1_000 * drawn(0, 500), (7, 5, 5, 500))
    ours = BatchNorm(use_running_average=False, epsilon=1e-5)
    found, updated = jax.jit(functools.partial(ours.apply, mutable=["batch_stats"]))(
        ours.init(jax.random.key(0), x), x
    )
    assert np.isfinite(found).all()
    assert updated["batch_stats"]["var"].min() >= 0.9


def test_batch_normalisation_starts_from_mean_0_and_variance_1_whatever_it_is_shown():
    stats = BatchNorm(use_running_average=False, epsilon=1e-5).init(jax.random.key(0), 9 + drawn(0, 8, 6))
    np.testing.assert_array_equal(stats["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(stats["batch_stats"]["var"], 1)


def test_batch_normalisation_is_float32_even_where_jax_has_float64():
    with jax.enable_x64(True):
        norm, x = BatchNorm(use_running_average=False, epsilon=1e-5), jnp.ones((4, 3), jnp.float32)
        variables = norm.init(jax.random.key(0), x)
        _, updated = norm.apply(variables, x, mutable=["batch_stats"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves((variables, updated))} == {"float32"}


def test_a_conv_unit_starts_as_he_et_al_draw_it_cut_off_at_two_deviations():
    variables = ConvUnit(64, (3, 3)).init(jax.random.key(0), jnp.zeros((1, 3, 3, 16)))
    kernel, deviation = variables["params"]["conv"]["kernel"], np.sqrt(2 / (3 * 3 * 16))
    assert not variables["params"]["conv"]["bias"].any()
    assert np.std(kernel) == pytest.approx(deviation, rel=0.03)
    assert np.abs(kernel).max() < 2.3 * deviation  # of what is cut off, the deviation is 0.88 of the normal's
