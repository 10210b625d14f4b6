import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.analysis import costs
from cnn_cases.models import make_model
from cnn_cases.models.layers import Conv, Dropout
from cnn_cases.models.nin import NIN, MLPConv, halving_max_pool
from tests.models.tracing import count, output_shapes, sources, variable_shapes

NETS = {"cifar": (NIN(), 32), "imagenet": (NIN(variant="imagenet", num_classes=1000), 224)}
COUNTS = {
    "cifar": [14_592, 30_880, 15_456, 460_992, 37_056, 37_056, 331_968, 37_056, 1_930],
    "imagenet": [
        *(34_944, 9_312, 9_312, 614_656, 65_792, 65_792),
        *(885_120, 147_840, 147_840, 3_539_968, 1_049_600, 1_025_000),
    ],
}
SHAPES = {  # input and output of each mlpconv
    "cifar": [
        ((32, 32, 3), (32, 32, 96)),
        ((16, 16, 96), (16, 16, 192)),
        ((8, 8, 192), (8, 8, 10)),
    ],
    "imagenet": [
        ((224, 224, 3), (54, 54, 96)),
        ((27, 27, 96), (27, 27, 256)),
        ((13, 13, 256), (13, 13, 384)),
        ((6, 6, 384), (6, 6, 1000)),
    ],
}


@pytest.mark.parametrize(("variant", "total"), [("cifar", 966_986), ("imagenet", 7_595_176)])
def test_parameters_layer_by_layer(trace, variant, total):
    params = trace(*NETS[variant])[0]["params"]
    stages = [params[f"mlpconv{number}"] for number in range(1, len(params) + 1)]
    assert [count(stage[layer]) for stage in stages for layer in ("conv", "mlp1", "mlp2")] == COUNTS[variant]
    assert count(params) == total


@pytest.mark.parametrize("variant", NETS)
def test_shapes(trace, variant):
    _, calls = trace(*NETS[variant])
    assert [call.shapes for call in calls if isinstance(call.module, MLPConv)] == SHAPES[variant]


def test_an_mlpconv_is_one_perceptron_at_every_place():
    random = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 5), "mlp1": (1, 1, 5, 4), "mlp2": (1, 1, 4, 3)}
    params = {
        name: {"kernel": random.normal(0, 1, shape), "bias": random.normal(0, 1, shape[-1:])}
        for name, shape in shapes.items()
    }
    x = random.normal(0, 1, (1, 6, 6, 2))
    layer = MLPConv((5, 4, 3), kernel_size=3, stride=1, padding=1, stds=(1.0, 1.0, 1.0), dtype=jnp.float32)
    maps = layer.apply({"params": params}, x)
    expected = np.zeros((6, 6, 3))
    padded = np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    for i, j in np.ndindex(6, 6):
        y = padded[i : i + 3, j : j + 3].reshape(-1)
        for layer in params.values():
            y = np.maximum(y @ layer["kernel"].reshape(y.size, -1) + layer["bias"], 0)
        expected[i, j] = y
    assert expected.any()
    np.testing.assert_allclose(maps[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", range(2, 9))
def test_halving_takes_the_maximum_of_every_other_window_cut_at_the_edges(side):
    x = np.random.default_rng(0).normal(-10, 1, (1, side, side, 2)).astype(np.float32)
    y = halving_max_pool(jnp.asarray(x))
    assert y.shape == (1, side // 2, side // 2, 2)
    for i, j in np.ndindex(side // 2, side // 2):
        window = x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        np.testing.assert_array_equal(y[0, i, j], window.max((0, 1)))


def test_logits_are_the_mean_of_the_last_maps_and_never_negative(trace):
    model = NIN(num_classes=4)
    shapes, _ = trace(model, 8, 12)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    x = random.normal(0, 1, (2, 8, 12, 3)).astype(np.float32)
    apply = jax.jit(lambda v, x: model.apply(v, x, False, capture_intermediates=True))
    logits, state = apply(variables, x)
    maps = state["intermediates"]["mlpconv3"]["__call__"][0]
    assert maps.shape == (2, 2, 3, 4)
    assert (logits >= 0).all()
    assert logits.any()
    np.testing.assert_allclose(logits, maps.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "stds"),
    [
        ("cifar", [0.05] * 9),
        ("imagenet", [0.01, 0.05, 0.05, 0.05, 0.05, 0.05, 0.01, 0.05, 0.05, 0.05, 0.05, 0.01]),
    ],
)
def test_initialisation_is_that_of_the_authors(trace, variant, stds):
    _, calls = trace(*NETS[variant])
    layers = [call.module for call in calls if isinstance(call.module, Conv)]
    kernels = [layer.kernel_init(jax.random.key(0), (100, 100), jnp.float32) for layer in layers]
    np.testing.assert_allclose([np.std(kernel) for kernel in kernels], stds, rtol=0.05)
    assert not any(layer.bias_init(jax.random.key(0), (5,), jnp.float32).any() for layer in layers)


@pytest.mark.parametrize(
    ("variant", "dropped"), [("cifar", [(16, 16, 96), (8, 8, 192)]), ("imagenet", [(6, 6, 384)])]
)
@pytest.mark.parametrize(("axis_name", "train"), [("batch", False), (None, True)])
def test_half_of_the_pooled_maps_drops_out_in_training(trace, variant, dropped, axis_name, train):
    net, size = NETS[variant]
    _, calls = trace(net.clone(axis_name=axis_name), size, train=train)
    dropouts = [call for call in calls if isinstance(call.module, Dropout)]
    assert [call.input for call in dropouts] == dropped
    assert {(call.module.rate, call.module.axis_name, *call.flags) for call in dropouts} == {
        (0.5, axis_name, train)
    }


@pytest.mark.parametrize(("variant", "number"), [("cifar", 2), ("imagenet", 3)])
def test_maxima_of_3x3_pixels_lead_from_stage_to_stage(variant, number):
    net, size = NETS[variant]
    layers = costs.count(net, (size, size, 3))
    pools = [(layer.kind, layer.kernel, layer.stride) for layer in layers if "pool" in layer.kind]
    assert pools == [("max pool", (3, 3), (2, 2))] * number


def test_each_stage_takes_what_dropout_has_left():
    found = sources(lambda: output_shapes(NIN(), variable_shapes(NIN(), 32), 32, train=True))
    assert found == {"mlpconv1": "", "mlpconv2": "dropout2", "mlpconv3": "dropout3"}


@pytest.mark.parametrize(("variant", "smallest"), [("cifar", 4), ("imagenet", 39)])
def test_the_smallest_image_leaves_one_pixel_and_one_less_is_an_error(trace, variant, smallest):
    model, _ = NETS[variant]
    _, calls = trace(model, smallest)
    assert calls[-2].output[:2] == (1, 1)
    with pytest.raises(ValueError, match=rf"NIN {variant} needs .* at least {smallest}x{smallest} .* got"):
        trace(model, smallest + 10, smallest - 1)


def test_unknown_variant_lists_the_known(trace):
    with pytest.raises(ValueError, match=r"model\.variant = 'svhn' is unknown; known: cifar, imagenet"):
        trace(NIN(variant="svhn"), 32)


def test_any_channels_classes_and_sides(trace):
    variables, _ = trace(NIN(num_classes=7), 20, 31, channels=1)
    assert variables["params"]["mlpconv1"]["conv"]["kernel"].shape == (5, 5, 1, 192)
    assert variables["params"]["mlpconv3"]["mlp2"]["kernel"].shape == (1, 1, 192, 7)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    model = make_model("nin", num_classes=3, dtype="bfloat16", variant="cifar")
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), image)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
