import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.models import make_model
from cnn_cases.models.lenet import (
    C3_INPUTS,
    RBF,
    LeNet5,
    LeNet5Original,
    Subsampling,
    TableConv,
    digit_codes,
    squash,
)
from tests.conftest import draw, drawn
from tests.models.tracing import count, inputs_and_outputs


def shapes(model, *image_shape):
    """The variables of a model and the outputs of its layers, as shapes; nothing is computed."""
    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), image)
    _, state = jax.eval_shape(
        lambda v, x: model.apply(v, x, False, capture_intermediates=True, mutable=["intermediates"]),
        variables,
        image,
    )
    outputs = {
        layer: values["__call__"][0]
        for layer, values in state["intermediates"].items()
        if layer != "__call__"
    }
    return variables["params"], outputs, state["intermediates"]["__call__"][0]


def init(model, image):
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), image)


@pytest.fixture(scope="module")
def image():
    return jax.random.uniform(jax.random.key(1), (3, 32, 32, 1), minval=-0.1, maxval=1.175)


@pytest.fixture(scope="module")
def variables(image):
    """The original's."""
    return init(LeNet5Original(), image)


# The lecture's


def test_lecture_layers_have_the_parameters_and_shapes_of_its_slide():
    params, outputs, logits = shapes(LeNet5(), 32, 32, 1)
    assert {layer: count(params[layer]) for layer in params} == {
        "conv1": 156,
        "conv2": 2416,
        "dense1": 48120,
        "dense2": 10164,
        "logits": 850,
    }
    assert count(params) == 61706
    assert outputs["conv1"].shape == (2, 28, 28, 6)
    assert outputs["conv2"].shape == (2, 10, 10, 16)
    assert logits.shape == (2, 10)


def test_lecture_net_takes_16_pixels_and_refuses_15():
    assert shapes(LeNet5(num_classes=3), 16, 40, 5)[2].shape == (2, 3)
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 40x15"):
        shapes(LeNet5(), 40, 15, 1)


# The paper's


def test_original_has_60_000_parameters_layer_by_layer():
    params, _, _ = shapes(LeNet5Original(), 32, 32, 1)
    assert {layer: count(params[layer]) for layer in params} == {
        "c1": 156,
        "s2": 12,
        "c3": 1516,
        "s4": 32,
        "c5": 48120,
        "f6": 10164,
    }
    assert count(params) == 60000


def test_original_layers_have_the_shapes_of_figure_2():
    _, outputs, logits = shapes(LeNet5Original(), 32, 32, 1)
    assert {layer: output.shape[1:] for layer, output in outputs.items()} == {
        "c1": (28, 28, 6),
        "s2": (14, 14, 6),
        "c3": (10, 10, 16),
        "s4": (5, 5, 16),
        "c5": (1, 1, 120),
        "f6": (84,),
        "rbf": (10,),
    }
    assert logits.shape == (2, 10)


def test_original_has_the_connections_that_the_paper_counts():
    params, outputs, _ = shapes(LeNet5Original(), 32, 32, 1)
    pixels = {layer: output.size // 2 // output.shape[-1] for layer, output in outputs.items()}
    connections = {layer: count(params[layer]) * pixels[layer] for layer in ("c1", "c3", "c5", "f6")}
    # A subsampling unit has four inputs and a bias, whose weights are shared.
    connections |= {layer: 5 * outputs[layer].size // 2 for layer in ("s2", "s4")}
    assert connections == {"c1": 122304, "c3": 151600, "c5": 48120, "f6": 10164, "s2": 5880, "s4": 2000}
    assert sum(connections.values()) + 84 * 10 == 340908


def test_connection_table_is_that_of_table_1():
    assert [len(inputs) for inputs in C3_INPUTS] == [3] * 6 + [4] * 9 + [6]
    assert len(set(C3_INPUTS)) == 16
    # Every map of S2 feeds ten maps of C3.
    assert np.bincount(np.concatenate(C3_INPUTS)).tolist() == [10] * 6


def test_table_convolution_sums_over_the_connected_maps_only():
    inputs = ((0, 2), (1,), (0, 1, 2))
    layer = TableConv(inputs)
    x = drawn(0, 2, 6, 7, 3)
    y, variables = jax.jit(layer.init_with_output)(jax.random.key(1), x)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    assert kernel.shape == (5, 5, 6)
    expected = np.zeros((2, 2, 3, 3))
    for row in range(2):
        for column in range(3):
            patch = np.asarray(x)[:, row : row + 5, column : column + 5]
            connection = 0
            for target, sources in enumerate(inputs):
                expected[:, row, column, target] = bias[target]
                for source in sources:
                    product = patch[..., source] * kernel[..., connection]
                    expected[:, row, column, target] += product.sum((1, 2))
                    connection += 1
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_subsampling_scales_the_sum_of_four_and_adds_a_bias_per_map():
    x = jnp.stack([jnp.arange(8.0).reshape(2, 4), jnp.ones((2, 4))], axis=-1)[None]
    params = {"coefficient": jnp.array([0.5, 3.0]), "bias": jnp.array([1.0, -2.0])}
    y = Subsampling().apply({"params": params}, x)
    # 0 + 1 + 4 + 5 = 10 and 2 + 3 + 6 + 7 = 18
    np.testing.assert_allclose(y[0, 0], [[0.5 * 10 + 1, 3 * 4 - 2], [0.5 * 18 + 1, 3 * 4 - 2]], rtol=1e-6)


def test_squashing_function_keeps_plus_and_minus_one():
    np.testing.assert_allclose(squash(jnp.array([-1.0, 0, 1, 100])), [-1, 0, 1, 1.7159], atol=2e-5)


def test_original_squashes_every_layer_up_to_f6_and_nothing_after(variables, image):
    layers = []

    @jax.jit
    def run(variables, image):
        seen = []

        def record(method, args, kwargs, context):
            y = method(*args, **kwargs)
            if context.module.name:
                layers.append(context.module.name)
                seen.append((args[0].ravel(), y.ravel()))
            return y

        with nn.intercept_methods(record):
            logits = LeNet5Original().apply(variables, image, False)
        return seen, logits

    seen, logits = run(variables, image)
    assert layers == ["c1", "s2", "c3", "s4", "c5", "f6", "rbf"]
    np.testing.assert_array_equal(seen[0][0], image.ravel())
    for (_, before), (after, _) in itertools.pairwise(seen):
        np.testing.assert_allclose(after, squash(before), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits.ravel(), -seen[-1][1])


def test_weights_start_uniform_within_2_4_over_the_fan_in(variables):
    inputs_of_c3 = np.array([len(inputs) for inputs in C3_INPUTS])
    fan_in = {"c1": 25, "s2": 4, "c3": 25 * inputs_of_c3, "s4": 4, "c5": 400, "f6": 120}
    # A kernel of C3 has the fan-in of the map it leads to.
    kernel_fan_in = fan_in | {"c3": np.repeat(25 * inputs_of_c3, inputs_of_c3)}
    for layer, params in variables["params"].items():
        for name, weights in params.items():
            share = np.abs(weights) * (kernel_fan_in if name == "kernel" else fan_in)[layer] / 2.4
            assert share.max() <= 1 + 1e-6, (layer, name)
            if weights.size > 100:
                assert share.max() > 0.97, (layer, name)
                assert 0.45 < share.mean() < 0.55, (layer, name)


def test_small_layers_start_uniform_within_2_4_over_the_fan_in_too():
    def limits(module, x):
        params = module.init(jax.random.key(0), x)["params"]
        return {name: np.abs(leaf).max() for name, leaf in params.items()}

    many = Subsampling(), jnp.zeros((1, 2, 2, 500))
    assert limits(*many) == {name: pytest.approx(2.4 / 4, rel=0.03) for name in ("coefficient", "bias")}
    many = TableConv(((0,),) * 500), jnp.zeros((1, 5, 5, 1))
    assert limits(*many) == {name: pytest.approx(2.4 / 25, rel=0.03) for name in ("kernel", "bias")}
    colour = draw(LeNet5Original(), (32, 32, 3), 0)
    assert np.abs(colour["params"]["c1"]["kernel"]).max() == pytest.approx(2.4 / 75, rel=0.03)


def test_bitmap_codes_are_readable_and_far_apart():
    codes = digit_codes()
    assert codes.shape == (10, 7 * 12)
    assert set(np.unique(codes)) == {-1, 1}
    seven = (
        ["#######"] * 2 + ["##...##"] + ["....##."] * 2 + ["...##.."] * 2 + ["..##..."] * 2 + [".##...."] * 3
    )
    assert ["".join("#" if ink > 0 else "." for ink in row) for row in codes[7].reshape(12, 7)] == seven
    ink = [46, 35, 40, 37, 42, 46, 42, 36, 49, 42]
    assert (codes > 0).sum(axis=1).tolist() == ink
    hamming = (84 - codes @ codes.T) / 2
    assert hamming[~np.eye(10, dtype=bool)].min() == 20


def test_rbf_penalties_are_squared_distances_to_the_codes():
    codes = digit_codes()
    penalties = RBF(10).apply({}, jnp.asarray(codes))
    np.testing.assert_allclose(penalties, 2 * (84 - codes @ codes.T))  # 4 for each pixel that differs
    x = drawn(0, 84)
    expected = [((x - code) ** 2).sum() for code in codes]
    np.testing.assert_allclose(RBF(10).apply({}, x[None])[0], expected, rtol=1e-5)


def test_fewer_classes_use_the_first_codes(variables, image):
    three, ten = (
        jax.jit(functools.partial(LeNet5Original(num_classes).apply, train=False))(variables, image)
        for num_classes in (3, 10)
    )
    np.testing.assert_allclose(three, ten[:, :3], rtol=1e-6)


def test_every_parameter_of_the_original_learns(variables, image):
    def loss(params):
        logits = LeNet5Original().apply({"params": params}, image, True)
        return (logits[:, 0] - 2 * logits[:, 1] + 3 * logits[:, 2]).mean()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"])):
        assert jnp.isfinite(gradient).all()
        assert (gradient != 0).all()


def test_original_computes_in_bfloat16_up_to_float32_distances():
    model = LeNet5Original(dtype=jnp.bfloat16)
    params, outputs, logits = shapes(model, 32, 32, 1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert {layer for layer, output in outputs.items() if output.dtype == jnp.bfloat16} == set(outputs) - {
        "rbf"
    }
    assert logits.dtype == jnp.float32


def test_lecture_net_computes_in_bfloat16():
    params, _, logits = shapes(LeNet5(dtype=jnp.bfloat16), 32, 32, 1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert logits.dtype == jnp.bfloat16


def test_original_takes_colour():
    params, _, _ = shapes(LeNet5Original(), 32, 32, 3)
    assert count(params) == 60000 + 2 * 25 * 6


@pytest.mark.parametrize("size", [(31, 32), (32, 33), (28, 28)])
def test_original_refuses_other_sizes_than_32(size):
    with pytest.raises(ValueError, match=rf"images of 32x32 pixels.*got {size[0]}x{size[1]}"):
        shapes(LeNet5Original(), *size, 1)


def test_original_refuses_more_classes_than_codes():
    with pytest.raises(ValueError, match="num_classes = 11 must be at most 10"):
        shapes(LeNet5Original(num_classes=11), 32, 32, 1)


@pytest.mark.parametrize(("name", "module"), [("lenet5", LeNet5), ("lenet5_1998", LeNet5Original)])
def test_registered(name, module):
    assert make_model(name, num_classes=7, dtype="bfloat16") == module(num_classes=7, dtype=jnp.bfloat16)


def test_lecture_net_has_relu_after_every_layer_but_the_last_and_averages(image):
    variables = init(LeNet5(), image)
    seen = inputs_and_outputs(lambda: LeNet5().apply(variables, image, False))
    layers = ["conv1", "conv2", "dense1", "dense2", "logits"]
    for before, after in itertools.pairwise(layers):
        expected = nn.relu(seen[before][1])
        if before.startswith("conv"):
            expected = nn.avg_pool(expected, (2, 2), (2, 2))
        np.testing.assert_allclose(
            seen[after][0], expected.reshape(seen[after][0].shape), rtol=1e-6, err_msg=after
        )


def test_weights_start_on_both_sides_of_zero(variables):
    for layer in ("c1", "c3", "c5", "f6"):
        kernel = variables["params"][layer]["kernel"]
        assert abs((kernel > 0).mean() - 0.5) < 0.15, layer


def test_the_connections_are_those_of_the_papers_table():
    rows = """
        X . . . X X X . . X X X X . X X
        X X . . . X X X . . X X X X . X
        X X X . . . X X X . . X . X X X
        . X X X . . X X X X . . X . X X
        . . X X X . . X X X X . X X . X
        . . . X X X . . X X X X . X X X
    """
    table = [row.split() for row in rows.strip().splitlines()]
    for target, inputs in enumerate(C3_INPUTS):
        assert inputs == tuple(source for source in range(6) if table[source][target] == "X")
