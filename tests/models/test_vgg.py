import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.models import make_model, vgg
from cnn_cases.models.layers import BatchNorm, Conv, Dropout, local_response_norm
from cnn_cases.models.vgg import VARIANTS, VGG, glorot_dense
from tests.models.tracing import count, inputs_and_outputs, trace_initialisation

COUNTS = {  # without and with batch normalisation
    "A": (132_863_336, 132_868_840),
    "A-LRN": (132_863_336, 132_868_840),
    "B": (133_047_848, 133_053_736),
    "C": (133_638_952, 133_647_400),
    "D": (138_357_544, 138_365_992),
    "E": (143_667_240, 143_678_248),
}


@pytest.fixture
def run(monkeypatch, trace):
    """(variables, image, logits, {layer: its output}) of a net for images of 64 pixels, cut to 4 filters."""

    def run(variant, size, brightness=1):
        monkeypatch.setattr(vgg, "FILTERS", (4, 4, 4, 4, 4))
        model = VGG(variant=variant, image_size=64, dense_features=8, num_classes=3)
        shapes, _ = trace(model, 64, channels=1)  # one channel: no other test meets these shapes
        random = np.random.default_rng(0)
        variables = jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
        x = brightness * random.normal(0, 1, (2, size, size, 1)).astype(np.float32)
        apply = jax.jit(lambda v, x: model.apply(v, x, False, capture_intermediates=True))
        logits, state = apply(variables, x)
        outputs = {
            name: values["__call__"][0]
            for name, values in state["intermediates"].items()
            if name != "__call__"
        }
        return variables["params"], x, logits, outputs

    return run


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(trace, variant, batch_norm):
    variables, _ = trace(VGG(variant=variant, batch_norm=batch_norm), 224)
    assert count(variables["params"]) == COUNTS[variant][batch_norm]


@pytest.mark.parametrize(
    ("variant", "weighted_layers"), [("A", 11), ("A-LRN", 11), ("B", 13), ("C", 16), ("D", 16), ("E", 19)]
)
def test_weighted_layers_are_as_many_as_table_1_counts(trace, variant, weighted_layers):
    variables, _ = trace(VGG(variant=variant), 224)
    assert len(variables["params"]) == weighted_layers


def test_shapes_of_vgg_16_are_those_of_the_lecture(trace):
    _, calls = trace(VGG(variant="D"), 224)
    expected, channels = [], 3
    for side, filters, layers in zip(
        (224, 112, 56, 28, 14), (64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True
    ):
        for _ in range(layers):
            expected.append(((side, side, channels), (side, side, filters)))
            channels = filters
    expected += [((7, 7, 512), (1, 1, 4096)), ((1, 1, 4096), (1, 1, 4096)), ((1, 1, 4096), (1, 1, 1000))]
    assert [call.shapes for call in calls if isinstance(call.module, Conv)] == expected


def test_c_ends_its_last_three_stages_with_a_1x1_convolution(trace):
    variables, _ = trace(VGG(variant="C"), 224)
    pointwise = [name for name, layer in variables["params"].items() if layer["kernel"].shape[:2] == (1, 1)]
    assert sorted(pointwise) == ["conv3_3", "conv4_3", "conv5_3", "dense2", "logits"]


@pytest.mark.parametrize("variant", ["A", "A-LRN"])
def test_response_norm_stands_between_the_first_relu_and_pooling_of_a_lrn_alone(run, variant):
    params, _, _, outputs = run(variant, size=64, brightness=100)
    a = nn.relu(outputs["conv1_1"])
    conv2 = nn.Conv(4, (3, 3), padding=1).bind({"params": params["conv2_1"]})
    plain, normed = (conv2(nn.max_pool(y, (2, 2), (2, 2))) for y in (a, local_response_norm(a)))
    assert np.linalg.norm(plain - normed) > 0.1 * np.linalg.norm(plain)
    expected = normed if variant == "A-LRN" else plain
    np.testing.assert_allclose(outputs["conv2_1"], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_a_lrn_normalises_responses_and_only_those_of_its_first_stage(monkeypatch, variant):
    normed = []
    monkeypatch.setattr(vgg, "local_response_norm", lambda x: normed.append(x.shape) or x)
    trace_initialisation(VGG(variant=variant, image_size=32), 32)
    assert normed == ([(2, 32, 32, 64)] if variant == "A-LRN" else [])


def test_at_the_training_size_the_net_is_its_last_maps_flattened_into_dense_layers(run):
    params, _, logits, outputs = run("A", size=64)
    y = nn.max_pool(nn.relu(outputs["conv5_2"]), (2, 2), (2, 2)).reshape(2, 2 * 2 * 4)
    for layer in ("dense1", "dense2", "logits"):
        kernel, bias = params[layer]["kernel"], params[layer]["bias"]
        y = y @ kernel.reshape(-1, kernel.shape[-1]) + bias
        y = y if layer == "logits" else nn.relu(y)
    np.testing.assert_allclose(logits, y, rtol=1e-4, atol=1e-5)


def test_a_larger_image_gives_the_mean_of_a_map_of_scores(run):
    _, _, logits, outputs = run("A", size=96)
    scores = outputs["logits"]
    assert scores.shape == (2, 2, 2, 3)
    assert np.ptp(scores, axis=(1, 2)).any()
    np.testing.assert_allclose(logits, scores.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_parameters_do_not_depend_on_the_image_they_were_initialised_with(trace, train):
    assert trace(VGG(variant="A"), 224, train=train)[0] == trace(VGG(variant="A"), 256, 480, train=train)[0]


def test_a_net_for_small_images_has_a_small_first_dense_layer(trace):
    variables, _ = trace(VGG(variant="A", image_size=32, dense_features=512), 32)
    assert variables["params"]["dense1"]["kernel"].shape == (1, 1, 512, 512)


@pytest.mark.parametrize(("image_size", "smallest"), [(224, 224), (32, 32), (48, 32)])
def test_the_smallest_image_gives_one_score_and_one_less_is_an_error(trace, image_size, smallest):
    model = VGG(variant="A", image_size=image_size)
    _, calls = trace(model, smallest)
    assert calls[-2].output == (1, 1, 1000)
    with pytest.raises(
        ValueError, match=rf"model\.image_size = {image_size} .* {smallest}x{smallest} .* got"
    ):
        trace(model, smallest + 10, smallest - 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="F"), r"model\.variant = 'F' is unknown; known: A, A-LRN, B, C, D, E"),
        (dict(image_size=31), r"model\.image_size = 31 must be at least 32"),
        (dict(dense_features=0), r"model\.dense_features = 0 must be between 1 and 16384"),
    ],
)
def test_bad_fields_are_errors_that_name_them(trace, fields, message):
    with pytest.raises(ValueError, match=message):
        trace(VGG(**fields), 224)


def test_any_channels_and_classes(trace):
    variables, _ = trace(VGG(num_classes=7), 224, channels=1)
    assert variables["params"]["conv1_1"]["kernel"].shape == (3, 3, 1, 64)
    assert variables["params"]["logits"]["kernel"].shape == (1, 1, 4096, 7)


def test_the_first_dense_layer_starts_as_a_dense_layer_does(trace):
    key, shape = jax.random.key(0), (7, 7, 4, 30)
    as_dense = nn.initializers.glorot_uniform()(key, (7 * 7 * 4, 30), jnp.float32)
    np.testing.assert_array_equal(glorot_dense(key, shape, jnp.float32), as_dense.reshape(shape))
    _, calls = trace(VGG(variant="A"), 224)
    dense1 = next(call.module for call in calls if call.module.name == "dense1")
    assert dense1.kernel_init is glorot_dense


def test_convolutions_start_as_glorot_draws_them_with_zero_biases(trace):
    _, calls = trace(VGG(variant="A"), 224)
    bound = np.sqrt(6 / (9 * (20 + 30)))
    for conv in (call.module for call in calls if isinstance(call.module, Conv)):
        assert not conv.bias_init(jax.random.key(0), (5,), jnp.float32).any()
        if conv.name != "dense1":
            kernel = conv.kernel_init(jax.random.key(0), (3, 3, 20, 30), jnp.float32)
            assert 0.99 * bound < np.abs(kernel).max() <= bound


@pytest.mark.parametrize(("axis_name", "train"), [("batch", False), (None, True)])
def test_batch_norm_follows_every_convolution_and_dropout_every_hidden_dense_layer(trace, axis_name, train):
    _, calls = trace(VGG(variant="B", batch_norm=True, axis_name=axis_name), 224, train=train)
    names = [call.module.name for call in calls]
    convolutions = [name for name in names if name and name.startswith("conv")]
    assert names == [
        *(layer for name in convolutions for layer in (name, name.replace("conv", "norm"))),
        *("dense1", "dropout1", "dense2", "dropout2", "logits", None),
    ]
    norms = [call.module for call in calls if isinstance(call.module, BatchNorm)]
    assert {(norm.use_running_average, norm.axis_name) for norm in norms} == {(not train, axis_name)}
    dropouts = [call for call in calls if isinstance(call.module, Dropout)]
    assert {(call.module.rate, call.module.axis_name, *call.flags) for call in dropouts} == {
        (0.5, axis_name, train)
    }


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    model = make_model("vgg", num_classes=3, dtype="bfloat16", variant="A-LRN", batch_norm=True)
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), image)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_relu_follows_the_normalisation_whose_epsilon_is_the_public_weights(trace, monkeypatch):
    monkeypatch.setattr(vgg, "FILTERS", (4, 4, 4, 4, 4))
    model = VGG(variant="A", batch_norm=True, image_size=32, dense_features=8, num_classes=3)
    shapes, calls = trace(model, 32, channels=2)
    norms = [call.module for call in calls if isinstance(call.module, BatchNorm)]
    assert {(norm.epsilon, norm.momentum) for norm in norms} == {(1e-5, 0.9)}
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)
    x = random.normal(0, 1, (2, 32, 32, 2)).astype(np.float32)
    seen = inputs_and_outputs(lambda: model.apply(variables, x, train=False))
    np.testing.assert_array_equal(seen["norm1_1"][0], seen["conv1_1"][1])
    expected = nn.max_pool(nn.relu(seen["norm1_1"][1]), (2, 2), (2, 2))
    assert (seen["norm1_1"][1] < 0).any()
    np.testing.assert_array_equal(seen["conv2_1"][0], expected)
