import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.models import make_model
from cnn_cases.models.alexnet import VARIANTS, AlexNet
from cnn_cases.models.layers import Dropout, local_response_norm
from tests.models.tracing import count, inputs_and_outputs, output_shapes, sources, variable_shapes

LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "dense1", "dense2", "logits"]


@pytest.mark.parametrize(
    ("variant", "size", "by_layer", "total"),
    [
        (
            "two_groups",
            227,
            [34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000],
            60_965_224,
        ),
        (
            "lecture",
            227,
            [34_944, 614_656, 885_120, 1_327_488, 884_992, 37_752_832, 16_781_312, 4_097_000],
            62_378_344,
        ),
        (
            "one_tower",
            224,
            [23_296, 307_392, 663_936, 884_992, 590_080, 37_752_832, 16_781_312, 4_097_000],
            61_100_840,
        ),
    ],
)
def test_parameters_layer_by_layer(trace, variant, size, by_layer, total):
    variables, _ = trace(AlexNet(variant=variant), size)
    assert [count(variables["params"][layer]) for layer in LAYERS] == by_layer
    assert count(variables) == total


def test_the_dense_layers_take_what_dropout_has_left():
    variables = variable_shapes(AlexNet(), 67)
    found = sources(lambda: output_shapes(AlexNet(), variables, 67, train=True))
    assert (found["dense2"], found["logits"]) == ("dropout1", "dropout2")


@pytest.mark.parametrize("variant", ["two_groups", "lecture"])
def test_shapes_are_those_of_the_lecture(trace, variant):
    _, calls = trace(AlexNet(variant=variant), 227)
    # The input of a layer is what the pooling before it leaves.
    assert [call.shapes for call in calls if call.module.name in LAYERS] == [
        ((227, 227, 3), (55, 55, 96)),
        ((27, 27, 96), (27, 27, 256)),
        ((13, 13, 256), (13, 13, 384)),
        ((13, 13, 384), (13, 13, 384)),
        ((13, 13, 384), (13, 13, 256)),
        ((6 * 6 * 256,), (4096,)),
        ((4096,), (4096,)),
        ((4096,), (1000,)),
    ]


def test_shapes_of_one_tower(trace):
    _, calls = trace(AlexNet(variant="one_tower"), 224)
    assert [call.shapes for call in calls if call.module.name in LAYERS[:6]] == [
        ((224, 224, 3), (55, 55, 64)),
        ((27, 27, 64), (27, 27, 192)),
        ((13, 13, 192), (13, 13, 384)),
        ((13, 13, 384), (13, 13, 256)),
        ((13, 13, 256), (13, 13, 256)),
        ((6 * 6 * 256,), (4096,)),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_response_norm_stands_between_relu_and_pooling_in_two_groups_alone(trace, variant):
    model = AlexNet(variant=variant, dense_features=8, num_classes=3)
    shapes, _ = trace(model, 67)
    random = np.random.default_rng(0)
    # Bright enough for the normalisation to bite.
    variables = jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float32), shapes)
    x = random.normal(0, 1, (2, 67, 67, 3)).astype(np.float32)
    inputs, outputs = {}, {}

    def record(method, args, kwargs, context):
        name = context.module.name
        if name == "conv3":
            inputs[name] = args[0]
            raise StopIteration  # the rest of the net does not matter
        inputs[name], outputs[name] = args[0], method(*args, **kwargs)
        return outputs[name]

    with nn.intercept_methods(record), pytest.raises(StopIteration):
        model.apply(variables, x, train=False)
    for before, after in (("conv1", "conv2"), ("conv2", "conv3")):
        a = nn.relu(outputs[before])
        plain, normed = (nn.max_pool(y, (3, 3), (2, 2)) for y in (a, local_response_norm(a)))
        assert np.linalg.norm(plain - normed) > 0.1 * np.linalg.norm(plain)
        np.testing.assert_allclose(inputs[after], normed if variant == "two_groups" else plain, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation_is_that_of_the_paper(trace, variant):
    _, calls = trace(AlexNet(variant=variant), 227)
    layers = {call.module.name: call.module for call in calls if call.module.name in LAYERS}
    assert list(layers) == LAYERS
    for name, layer in layers.items():
        kernel = layer.kernel_init(jax.random.key(0), (100, 100), jnp.float32)
        assert np.std(kernel) == pytest.approx(0.01, rel=0.03)
        assert np.abs(kernel).max() > 0.03  # not truncated
        bias = layer.bias_init(jax.random.key(0), (5,), jnp.float32)
        np.testing.assert_array_equal(bias, name in {"conv2", "conv4", "conv5", "dense1", "dense2"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("axis_name", "train"), [("batch", False), (None, True)])
def test_half_of_each_hidden_dense_layer_drops_out_in_training(trace, variant, axis_name, train):
    _, calls = trace(AlexNet(variant=variant, dense_features=8, axis_name=axis_name), 67, train=train)
    names = [call.module.name for call in calls]
    assert names[5:] == ["dense1", "dropout1", "dense2", "dropout2", "logits", None]
    dropouts = [call for call in calls if isinstance(call.module, Dropout)]
    assert {(call.module.rate, call.module.axis_name, *call.flags) for call in dropouts} == {
        (0.5, axis_name, train)
    }


@pytest.mark.parametrize(("variant", "smallest"), [("two_groups", 67), ("lecture", 67), ("one_tower", 63)])
def test_the_smallest_image_leaves_one_pixel_and_one_less_is_an_error(trace, variant, smallest):
    model = AlexNet(variant=variant)
    _, calls = trace(model, smallest)
    assert next(call.input for call in calls if call.module.name == "dense1") == (256,)
    with pytest.raises(ValueError, match=rf"AlexNet {variant} needs .* {smallest}x{smallest} .* got"):
        trace(model, smallest + 10, smallest - 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="three"), r"model\.variant = 'three' .* known: two_groups, lecture, one_tower"),
        (dict(dense_features=0), r"model\.dense_features = 0 must be between 1 and 16384"),
    ],
)
def test_bad_fields_are_errors_that_name_them(trace, fields, message):
    with pytest.raises(ValueError, match=message):
        trace(AlexNet(**fields), 227)


def test_any_channels_classes_and_sides(trace):
    variables, _ = trace(AlexNet(num_classes=7), 67, 90, channels=1)
    assert variables["params"]["conv1"]["kernel"].shape == (11, 11, 1, 96)
    assert variables["params"]["logits"]["kernel"].shape == (4096, 7)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    model = make_model("alexnet", num_classes=3, dtype="bfloat16", variant="two_groups", dense_features=8)
    image = jax.ShapeDtypeStruct((2, 67, 67, 3), jnp.float32)
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), image)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_relu_follows_every_layer_but_the_last_and_the_last_pooling_is_not_normed(trace):
    model = AlexNet(variant="two_groups", dense_features=8, num_classes=3)
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float32), trace(model, 67)[0]
    )
    x = random.normal(0, 1, (2, 67, 67, 3)).astype(np.float32)
    seen = inputs_and_outputs(lambda: model.apply(variables, x, train=False))
    for before, after in itertools.pairwise(LAYERS[2:]):
        expected = nn.relu(seen[before][1])
        if after == "dense1":
            expected = nn.max_pool(expected, (3, 3), (2, 2)).reshape(2, -1)
        np.testing.assert_allclose(seen[after][0], expected, rtol=1e-6, err_msg=after)
