import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.models import make_model
from cnn_cases.models.inception import (
    TABLE_1,
    GoogLeNet,
    InceptionModule,
    NaiveInceptionModule,
    SideBranch,
    halving_max_pool,
)
from cnn_cases.models.layers import BatchNorm, ConvUnit, Dense, Dropout
from tests.models.tracing import (
    apply,
    count,
    image_shape,
    inputs_and_outputs,
    modules_of_initialisation,
    output_shapes,
    recorded_training,
    sources,
    trace_initialisation,
    variable_shapes,
    visited,
)

# Table 1 of the paper: output channels of each module, and its parameters as added up in the file's head.
MODULES = {
    "3a": (256, 163_696),
    "3b": (480, 388_736),
    "4a": (512, 376_176),
    "4b": (512, 449_160),
    "4c": (512, 510_104),
    "4d": (528, 605_376),
    "4e": (832, 868_352),
    "5a": (832, 1_043_456),
    "5b": (1024, 1_444_080),
}
SIDE_PARAMETERS = {"side1": 3_188_840, "side2": 3_190_888}

# The slide: 28x28x192 -> 28x28x256.
LECTURE_FILTERS = {
    "conv_1x1": 64,
    "reduce_3x3": 96,
    "conv_3x3": 128,
    "reduce_5x5": 16,
    "conv_5x5": 32,
    "project_pool": 32,
}


def module_shapes(module, height, width, channels):
    x = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    found = visited(lambda: jax.eval_shape(module.init, jax.random.key(0), x))
    return {path: shape[1:] for path, (_, shape) in found.items()}


# The modules.


def test_the_reduced_module_has_the_shapes_of_the_lecture():
    assert module_shapes(InceptionModule(64, 96, 128, 16, 32, 32), 28, 28, 192) == {
        **{f"{name}/conv": (28, 28, filters) for name, filters in LECTURE_FILTERS.items()},
        **{name: (28, 28, filters) for name, filters in LECTURE_FILTERS.items()},
        "": (28, 28, 256),
    }


def test_the_naive_module_keeps_all_channels_of_its_input():
    assert module_shapes(NaiveInceptionModule(64, 128, 32), 28, 28, 192)[""] == (28, 28, 64 + 128 + 32 + 192)


def test_the_modules_multiply_as_often_as_the_lecture_says():
    def multiplications(module, names):
        x = jax.ShapeDtypeStruct((1, 28, 28, 192), jnp.float32)
        params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        return [28 * 28 * math.prod(params[name]["conv"]["kernel"].shape) for name in names]

    assert multiplications(NaiveInceptionModule(64, 128, 32), ["conv_5x5"]) == [120_422_400]
    reduced = multiplications(InceptionModule(64, 96, 128, 16, 32, 32), ["reduce_5x5", "conv_5x5"])
    assert reduced == [2_408_448, 10_035_200]


@pytest.mark.parametrize(
    ("module", "wide_kernel_size"),
    [
        (NaiveInceptionModule(1, 1, 1), 5),
        (InceptionModule(1, 1, 1, 1, 1, 1), 5),
        (InceptionModule(1, 1, 1, 1, 1, 1, wide_kernel_size=3), 3),
    ],
)
def test_with_kernels_of_ones_the_branches_are_sums_and_a_maximum_over_their_windows(
    module, wide_kernel_size
):
    x = np.random.default_rng(0).uniform(1, 2, (1, 5, 6, 1)).astype(np.float32)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key == "kernel"), np.float32),
        jax.eval_shape(module.init, jax.random.key(0), x)["params"],
    )
    y = np.asarray(jax.jit(module.apply)({"params": params}, x))
    assert y.shape == (1, 5, 6, 4)

    def around(row, column, reach):
        return x[0, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]

    for row in range(5):
        for column in range(6):
            near, far = around(row, column, 1), around(row, column, wide_kernel_size // 2)
            expected = [x[0, row, column, 0], near.sum(), far.sum(), near.max()]
            np.testing.assert_allclose(y[0, row, column], expected, rtol=1e-6)


@pytest.mark.parametrize("size", [112, 56, 28, 14])
def test_pooling_halves_the_papers_maps_without_looking_at_the_padding(size):
    x = -jnp.arange(1.0, size + 1)[None, :, None, None] * jnp.ones((1, 1, size, 1))
    pooled = np.asarray(halving_max_pool(x))
    assert pooled.shape == (1, size // 2, size // 2, 1)
    # Values fall from -1: the first row of each window is its maximum, and padding of zeros would show.
    np.testing.assert_array_equal(pooled[0, :, 0, 0], -np.arange(1, size + 1, 2))


# GoogLeNet.


@pytest.mark.parametrize(
    ("batch_norm", "side_branches", "parameters"),
    [
        (False, False, 6_998_552),
        (False, True, 13_378_280),
        (True, False, 6_624_904),
        (True, True, 13_004_888),
    ],
)
def test_googlenet_has_the_published_number_of_parameters(batch_norm, side_branches, parameters):
    model = GoogLeNet(batch_norm, side_branches)
    assert count(variable_shapes(model, 224)["params"]) == parameters


def test_every_layer_of_googlenet_has_the_parameters_of_the_table():
    params = variable_shapes(GoogLeNet(), 224)["params"]
    assert {name: count(layer) for name, layer in params.items()} == {
        "conv1": 9_472,
        "conv2_reduce": 4_160,
        "conv2": 110_784,
        **{f"inception_{module}": parameters for module, (_, parameters) in MODULES.items()},
        "logits": 1_025_000,
        **SIDE_PARAMETERS,
    }


@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_layer_of_googlenet_has_the_shape_of_the_table(batch_norm):
    found = modules_of_initialisation(GoogLeNet(batch_norm), 224)
    sizes = {"3": 28, "4": 14, "5": 7}
    expected = {
        "conv1": (112, 112, 64),
        "conv2_reduce": (56, 56, 64),
        "conv2": (56, 56, 192),
        **{
            f"inception_{name}": (sizes[name[0]], sizes[name[0]], channels)
            for name, (channels, _) in MODULES.items()
        },
        "logits": (1000,),
        **{f"{side}/conv": (4, 4, 128) for side in SIDE_PARAMETERS},
        **{f"{side}/dense": (1024,) for side in SIDE_PARAMETERS},
        **{f"{side}/logits": (1000,) for side in SIDE_PARAMETERS},
    }
    assert {path: found[path][1][1:] for path in expected} == expected


@pytest.mark.parametrize("name", TABLE_1)
def test_the_filters_of_a_module_add_up_to_the_channels_of_the_table(name):
    one, _, three, _, five, pool = TABLE_1[name]
    assert one + three + five + pool == MODULES[name][0]


@pytest.mark.parametrize(("batch_norm", "window"), [(False, 5), (True, 3)])
def test_the_form_decides_on_biases_normalisation_and_the_wide_window(batch_norm, window):
    variables = variable_shapes(GoogLeNet(batch_norm), 224)
    module = variables["params"]["inception_3a"]["conv_5x5"]
    assert module["conv"]["kernel"].shape == (window, window, 16, 32)
    assert ("bias" in module["conv"], "norm" in module) == (not batch_norm, batch_norm)
    assert ("batch_stats" in variables) == batch_norm


@pytest.mark.parametrize(("batch_norm", "times"), [(False, 2), (True, 0)])
def test_local_response_normalisation_belongs_to_the_papers_form(batch_norm, times, monkeypatch):
    seen = []
    monkeypatch.setattr("cnn_cases.models.inception.local_response_norm", lambda x: seen.append(x.shape) or x)
    trace_initialisation(GoogLeNet(batch_norm), 224)
    assert seen == [(2, 56, 56, 64), (2, 56, 56, 192)][:times]


def test_local_responses_are_normalised_on_both_sides_of_the_second_layer(monkeypatch):
    """Figure 3: max pool, LRN, conv 1x1, conv 3x3, LRN, max pool."""
    normalised, pooled = [], []

    def norm(x):
        normalised.append((x, x * 1))
        return normalised[-1][1]

    def pool(x, *rest, **settings):
        pooled.append((x, halving_max_pool(x, *rest, **settings)))
        return pooled[-1][1]

    monkeypatch.setattr("cnn_cases.models.inception.local_response_norm", norm)
    monkeypatch.setattr("cnn_cases.models.inception.halving_max_pool", pool)
    seen = inputs_and_outputs(lambda: trace_initialisation(GoogLeNet(side_branches=False), 32))
    chain = (pooled[0], normalised[0], seen["conv2_reduce"], seen["conv2"], normalised[1], pooled[1])
    for (_, given), (taken, _) in itertools.pairwise(chain):
        assert taken is given


@pytest.mark.parametrize(("batch_norm", "window"), [(False, 3), (True, 2)])
def test_only_the_last_max_pool_is_narrower_in_the_public_form(batch_norm, window, monkeypatch):
    windows = []

    def spy(x, window=3):
        windows.append(window)
        return halving_max_pool(x, window)

    monkeypatch.setattr("cnn_cases.models.inception.halving_max_pool", spy)
    trace_initialisation(GoogLeNet(batch_norm), 224)
    assert windows == [3, 3, 3, window]


def test_dropout_is_the_papers():
    found = modules_of_initialisation(GoogLeNet(axis_name="batch"), 79)
    dropouts = {path: module for path, (module, _) in found.items() if isinstance(module, Dropout)}
    assert {path: module.rate for path, module in dropouts.items()} == {
        "dropout": 0.4,
        "side1/dropout": 0.7,
        "side2/dropout": 0.7,
    }
    assert {module.axis_name for module in dropouts.values()} == {"batch"}


def test_batch_statistics_are_taken_over_the_axis():
    found = modules_of_initialisation(GoogLeNet(batch_norm=True, axis_name="batch"), 79)
    norms = [module for module, _ in found.values() if isinstance(module, BatchNorm)]
    assert len(norms) == 3 + 9 * 6 + 2
    assert {norm.axis_name for norm in norms} == {"batch"}


# The side branches.


@pytest.mark.parametrize("batch_norm", [False, True])
def test_side_branches_answer_in_training_only(batch_norm):
    model = GoogLeNet(batch_norm)
    variables = variable_shapes(model, 224)
    assert [y.shape for y in output_shapes(model, variables, 224, train=True)] == [(2, 1000)] * 3
    assert output_shapes(model, variables, 224, train=False).shape == (2, 1000)


def test_without_side_branches_training_gives_plain_logits():
    model = GoogLeNet(side_branches=False)
    variables = variable_shapes(model, 32)
    assert output_shapes(model, variables, 32, train=True).shape == (2, 1000)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_side_branches_leave_the_trunk_as_it_is(batch_norm):
    trunk = variable_shapes(GoogLeNet(batch_norm, side_branches=False), 79)["params"]
    whole = variable_shapes(GoogLeNet(batch_norm), 79)["params"]
    assert {name: layer for name, layer in whole.items() if name not in SIDE_PARAMETERS} == trunk


def test_with_one_seed_the_trunk_starts_alike_with_and_without_side_branches():
    def first_values(side_branches):
        model = GoogLeNet(side_branches=side_branches, num_classes=10)
        params = model.init(jax.random.key(0), jnp.zeros((1, 79, 79, 1)), False)["params"]
        return [params["conv1"], params["inception_4b"]["conv_1x1"], params["logits"]]  # the rest costs time

    without, beside = (jax.jit(first_values, static_argnums=0)(sides) for sides in (False, True))
    jax.tree.map(np.testing.assert_array_equal, without, beside)


def test_in_training_the_trunk_drops_and_answers_the_same_with_and_without_side_branches():
    numbers = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (0.05 * numbers.standard_normal(leaf.shape)).astype(np.float32),
        variable_shapes(GoogLeNet(), 79),
    )
    x = numbers.standard_normal((2, 79, 79, 3)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def answer(side_branches, variables, key):
        model = GoogLeNet(side_branches=side_branches)
        return model.apply(variables, x, True, rngs={"dropout": key})

    logits, *_ = answer(True, variables, jax.random.key(0))
    np.testing.assert_array_equal(logits, answer(False, variables, jax.random.key(0)))
    assert (logits != answer(False, variables, jax.random.key(1))).any()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_evaluation_is_the_same_program_with_and_without_side_branches(batch_norm):
    variables = variable_shapes(GoogLeNet(batch_norm, side_branches=False), 79)
    programs = [
        jax.make_jaxpr(lambda v, x, model=model: model.apply(v, x, False))(variables, image_shape(79))
        for model in (GoogLeNet(batch_norm, side_branches=False), GoogLeNet(batch_norm))
    ]
    assert str(programs[0]) == str(programs[1])


STEM = {"conv1", "conv2_reduce", "conv2", "inception_3a", "inception_3b", "inception_4a"}


def parts_with_gradient(model, size, output):
    """The top-level parts to whose parameters the gradient of one of the outputs leads.

    Where it does not lead, JAX fills the gradient with a literal zero, which the traced program shows.
    """
    variables = variable_shapes(model, size)
    others = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, others, x):
        return apply(model, {"params": params, **others}, x, train=True)[output].sum()

    program, shapes = jax.make_jaxpr(jax.grad(loss), return_shape=True)(
        variables["params"], others, image_shape(size)
    )
    zeros = {
        variable
        for equation in program.eqns
        if equation.primitive.name == "broadcast_in_dim" and getattr(equation.invars[0], "val", None) == 0
        for variable in equation.outvars
    }
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    reached = zip(paths, program.jaxpr.outvars, strict=True)
    return {path[0].key for path, variable in reached if variable not in zeros}


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        (0, STEM | {f"inception_{module}" for module in TABLE_1} | {"logits"}),
        (1, STEM | {"side1"}),
        (2, STEM | {"inception_4b", "inception_4c", "inception_4d", "side2"}),
    ],
)
def test_the_gradient_of_a_branch_leads_into_the_trunk_below_it_only(output, parts):
    assert parts_with_gradient(GoogLeNet(), 79, output) == parts


# Sizes, types, names.


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("side_branches", "smallest"), [(False, 31), (True, 79)])
def test_the_smallest_image_leaves_no_map_empty(batch_norm, side_branches, smallest):
    found = modules_of_initialisation(GoogLeNet(batch_norm, side_branches), smallest)
    assert all(0 not in shape for _, shape in found.values())
    # The map that decides has nothing to spare.
    path, shape = ("side1/conv", (1, 1)) if side_branches else ("inception_5b", (1, 1))
    assert found[path][1][1:3] == shape


@pytest.mark.parametrize(("side_branches", "size"), [(False, 30), (True, 78)])
def test_one_pixel_less_is_an_error_that_names_the_smallest_size(side_branches, size):
    with pytest.raises(ValueError, match=f"at least {size + 1}x{size + 1} pixels, got {size}x{size}"):
        variable_shapes(GoogLeNet(side_branches=side_branches), size)


def test_the_trunk_evaluates_images_of_other_sizes_than_the_side_branches_were_made_for():
    model = GoogLeNet()
    assert output_shapes(model, variable_shapes(model, 224), 31, train=False).shape == (2, 1000)


def test_any_number_of_channels_and_classes():
    params = variable_shapes(GoogLeNet(side_branches=False, num_classes=10), 32, channels=1)["params"]
    assert count(params) == 6_998_552 - 7 * 7 * 2 * 64 - 1025 * 990


@pytest.mark.parametrize("batch_norm", [False, True])
def test_bfloat16_computes_in_bfloat16_on_float32_parameters(batch_norm):
    model = GoogLeNet(batch_norm, dtype=jnp.bfloat16)
    variables = variable_shapes(model, 79)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {y.dtype for y in output_shapes(model, variables, 79, train=True)} == {jnp.dtype("bfloat16")}


def test_the_registry_builds_googlenet():
    model = make_model("googlenet", num_classes=10, dtype="float32", axis_name="batch", batch_norm=True)
    assert model == GoogLeNet(batch_norm=True, num_classes=10, axis_name="batch")


def test_the_registry_refuses_a_number_for_a_switch():
    with pytest.raises(ValueError, match=r"model\.side_branches = 1 must be of type bool"):
        make_model("googlenet", num_classes=10, dtype="float32", side_branches=1)


def test_googlenet_tells_images_apart():
    model = GoogLeNet(side_branches=False, num_classes=5)
    numbers = np.random.default_rng(0)

    def he_normal(shape):
        fan_in = math.prod(shape[:-1])
        return (numbers.standard_normal(shape) * math.sqrt(2 / fan_in) * (len(shape) > 1)).astype(np.float32)

    # Drawn here, since compiling the initialisation of 59 layers takes longer than all the other tests.
    variables = jax.tree.map(lambda leaf: he_normal(leaf.shape), variable_shapes(model, 31))
    x = numbers.standard_normal((2, 63, 63, 3)).astype(np.float32)
    apply = jax.jit(lambda v, x: model.apply(v, x, False, capture_intermediates=True))
    logits, state = apply(variables, x)
    (maps,) = state["intermediates"]["inception_5b"]["__call__"]
    assert maps.shape == (2, 2, 2, 1024)
    dense = variables["params"]["logits"]
    expected = maps.mean(axis=(1, 2)) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(logits).all()
    assert (logits[0] != logits[1]).all()


def test_batch_normalisation_has_the_public_epsilon():
    found = modules_of_initialisation(GoogLeNet(batch_norm=True, axis_name="batch"), 79)
    norms = [module for module, _ in found.values() if isinstance(module, BatchNorm)]
    assert {(norm.epsilon, norm.momentum) for norm in norms} == {(1e-3, 0.9)}


def test_norms_take_the_statistics_of_the_batch_in_training():
    calls = recorded_training(GoogLeNet(batch_norm=True), 79).values()
    assert {m.use_running_average for m, *_ in calls if isinstance(m, BatchNorm)} == {False}


def test_dropout_drops_in_training():
    calls = recorded_training(GoogLeNet(), 79)
    dropped = {path: given[1:] for path, (module, given, _) in calls.items() if isinstance(module, Dropout)}
    assert dropped == dict.fromkeys(("dropout", "side1/dropout", "side2/dropout"), (True,))


def test_dense_layers_start_from_he_et_als_distribution():
    calls = recorded_training(GoogLeNet(), 79)
    layers = [module for module, *_ in calls.values() if isinstance(module, Dense)]
    assert len(layers) == 1 + 2 * 2
    for layer in layers:
        kernel = layer.kernel_init(jax.random.key(0), (100, 100), jnp.float32)
        np.testing.assert_allclose(np.std(kernel), math.sqrt(2 / 100), rtol=0.03)
        assert not layer.bias_init(jax.random.key(0), (5,), jnp.float32).any()


def test_the_parts_of_a_module_stand_as_in_its_figure():
    x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)

    def found(module):
        return sources(lambda: jax.eval_shape(module.init, jax.random.key(0), x))

    assert found(NaiveInceptionModule(1, 1, 1)) == dict.fromkeys(("conv_1x1", "conv_3x3", "conv_5x5"), "")
    assert found(InceptionModule(1, 1, 1, 1, 1, 1)) == {
        "conv_1x1": "",
        "reduce_3x3": "",
        "conv_3x3": "reduce_3x3",
        "reduce_5x5": "",
        "conv_5x5": "reduce_5x5",  # the pool projection reads what is pooled
    }


def test_the_parts_of_googlenet_stand_as_in_the_table():
    model = GoogLeNet(batch_norm=True)
    variables = variable_shapes(model, 224)
    # In training, where dropout gives something else than it reads.
    found = sources(lambda: output_shapes(model, variables, 224, train=True))
    order = [f"inception_{name}" for name in TABLE_1]
    expected = {"conv1": "", "conv2": "conv2_reduce", **dict(zip(order[1:], order, strict=False))}
    for name in ("4a", "5a"):  # which read what is pooled
        del expected[f"inception_{name}"]
    expected |= {"side1": "inception_4a", "side2": "inception_4d", "logits": "dropout"}
    assert found == expected


def test_a_side_branch_averages_and_has_relu_before_its_logits():
    side = SideBranch(ConvUnit, Dense, 3, None)
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (2, 8, 8, 4)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: side.init(jax.random.key(0), x, False), x)
    variables = jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float32), shapes)
    seen = inputs_and_outputs(lambda: side.apply(variables, x, False))
    np.testing.assert_allclose(seen["conv"][0], nn.avg_pool(x, (5, 5), (3, 3)), rtol=1e-5)
    np.testing.assert_array_equal(seen["dense"][0], seen["conv"][1].reshape(2, -1))
    np.testing.assert_allclose(seen["logits"][0], nn.relu(seen["dense"][1]), rtol=1e-5)
    assert seen["logits"][0] is seen["dropout"][1]
    assert (seen["dense"][1] < 0).any()
