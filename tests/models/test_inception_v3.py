import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.analysis import costs
from cnn_cases.models import make_model
from cnn_cases.models.inception_v3 import (
    Figure5Module,
    Figure6Module,
    Figure7Module,
    Figure10Module,
    InceptionV3,
    SecondReduction,
    SideBranch,
    avg_pool_same,
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
    variable_shapes,
)

# Side of the map, channels and parameters, as in the file's head.
STEM = {
    "conv1a": (149, 32, 928),
    "conv2a": (147, 32, 9_280),
    "conv2b": (147, 64, 18_560),
    "conv3b": (73, 80, 5_280),
    "conv4a": (71, 192, 138_624),
}
MODULES = {
    "inception_5b": (35, 256, 255_904),
    "inception_5c": (35, 288, 277_472),
    "inception_5d": (35, 288, 285_152),
    "inception_6a": (17, 768, 1_153_280),
    "inception_6b": (17, 768, 1_297_408),
    "inception_6c": (17, 768, 1_691_008),
    "inception_6d": (17, 768, 1_691_008),
    "inception_6e": (17, 768, 2_141_952),
    "inception_7a": (8, 1280, 1_698_304),
    "inception_7b": (8, 2048, 5_044_608),
    "inception_7c": (8, 2048, 6_076_800),
}
ABOVE_THE_SIDE_BRANCH = {"inception_7a", "inception_7b", "inception_7c", "logits"}


def test_padding_counts_as_zeros_in_the_average_pool():
    pooled = avg_pool_same(jnp.ones((1, 3, 3, 1)))[0, :, :, 0]
    np.testing.assert_allclose(pooled * 9, [[4, 6, 4], [6, 9, 6], [4, 6, 4]], rtol=1e-6)


def last_channel(module, x):
    """The module's last channel with kernels of ones and biases of zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key == "kernel"), np.float32), shapes
    )
    return jax.jit(module.apply)({"params": params}, x)[..., -1:]


@pytest.mark.parametrize(
    ("module", "pool"),
    [
        (Figure5Module(1, ConvUnit), avg_pool_same),
        (Figure6Module(1, ConvUnit), avg_pool_same),
        (Figure7Module(ConvUnit), avg_pool_same),
        (Figure10Module(ConvUnit), lambda x: x[:, :3, :3].max(axis=(1, 2), keepdims=True)),
        (SecondReduction(ConvUnit), lambda x: x[:, :3, :3].max(axis=(1, 2), keepdims=True)),
    ],
)
def test_the_last_branch_averages_in_the_modules_and_takes_the_maximum_in_the_reductions(module, pool):
    x = np.random.default_rng(0).uniform(1, 2, (1, 4, 4, 1)).astype(np.float32)
    np.testing.assert_allclose(last_channel(module, x), pool(x), rtol=1e-6)


@pytest.mark.parametrize(("side_branches", "parameters"), [(False, 23_834_568), (True, 27_161_264)])
def test_inception_v3_has_the_published_number_of_parameters(side_branches, parameters):
    assert count(variable_shapes(InceptionV3(side_branches), 299)["params"]) == parameters


def test_every_part_has_the_parameters_of_the_table():
    params = variable_shapes(InceptionV3(), 299)["params"]
    assert {name: count(layer) for name, layer in params.items()} == {
        **{name: parameters for name, (_, _, parameters) in (STEM | MODULES).items()},
        "side": 3_326_696,
        "logits": 2_049_000,
    }


def test_every_part_has_the_shape_of_the_table():
    found = modules_of_initialisation(InceptionV3(), 299)
    expected = {name: (side, side, channels) for name, (side, channels, _) in (STEM | MODULES).items()}
    expected |= {
        "side/conv1": (5, 5, 128),
        "side/conv2": (1, 1, 768),
        "side/logits": (1000,),
        "logits": (1000,),
    }
    assert {path: found[path][1][1:] for path in expected} == expected


@pytest.mark.parametrize(
    ("module", "kernels"),
    [
        (
            "inception_5b",
            {
                "conv_1x1": (1, 1, 192, 64),
                "reduce_5x5": (1, 1, 192, 48),
                "conv_5x5": (5, 5, 48, 64),
                "reduce_double": (1, 1, 192, 64),
                "double1_3x3": (3, 3, 64, 96),
                "double2_3x3": (3, 3, 96, 96),
                "project_pool": (1, 1, 192, 32),
            },
        ),
        (
            "inception_6b",
            {
                "conv_1x1": (1, 1, 768, 192),
                "reduce_7x7": (1, 1, 768, 128),
                "conv_1x7": (1, 7, 128, 128),
                "conv_7x1": (7, 1, 128, 192),
                "reduce_double": (1, 1, 768, 128),
                "double1_7x1": (7, 1, 128, 128),
                "double1_1x7": (1, 7, 128, 128),
                "double2_7x1": (7, 1, 128, 128),
                "double2_1x7": (1, 7, 128, 192),
                "project_pool": (1, 1, 768, 192),
            },
        ),
        (
            "inception_7b",
            {
                "conv_1x1": (1, 1, 1280, 320),
                "reduce_3x3": (1, 1, 1280, 384),
                "conv_1x3": (1, 3, 384, 384),
                "conv_3x1": (3, 1, 384, 384),
                "reduce_double": (1, 1, 1280, 448),
                "double1_3x3": (3, 3, 448, 384),
                "double2_1x3": (1, 3, 384, 384),
                "double2_3x1": (3, 1, 384, 384),
                "project_pool": (1, 1, 1280, 192),
            },
        ),
    ],
)
def test_the_windows_of_a_module_are_those_of_its_figure(module, kernels):
    params = variable_shapes(InceptionV3(False), 75)["params"][module]
    assert {name: layer["conv"]["kernel"].shape for name, layer in params.items()} == kernels


def test_dropout_and_batch_statistics_know_the_axis():
    found = [module for module, _ in modules_of_initialisation(InceptionV3(axis_name="batch"), 299).values()]
    assert [(module.rate, module.axis_name) for module in found if isinstance(module, Dropout)] == [
        (0.2, "batch")
    ]
    assert {module.axis_name for module in found if isinstance(module, BatchNorm)} == {"batch"}


def test_the_side_branch_answers_in_training_only():
    model = InceptionV3()
    variables = variable_shapes(model, 299)
    assert [y.shape for y in output_shapes(model, variables, 299, train=True)] == [(2, 1000)] * 2
    assert output_shapes(model, variables, 299, train=False).shape == (2, 1000)


def test_without_the_side_branch_training_gives_plain_logits():
    model = InceptionV3(False)
    assert output_shapes(model, variable_shapes(model, 75), 75, train=True).shape == (2, 1000)


def test_the_side_branch_leaves_the_trunk_and_its_evaluation_as_they_are():
    trunk = variable_shapes(InceptionV3(False), 299)
    whole = variable_shapes(InceptionV3(), 299)
    for collection in ("params", "batch_stats"):
        assert trunk[collection] == {name: v for name, v in whole[collection].items() if name != "side"}
    programs = [
        jax.make_jaxpr(lambda v, x, model=model: model.apply(v, x, False))(trunk, image_shape(299))
        for model in (InceptionV3(False), InceptionV3())
    ]
    assert str(programs[0]) == str(programs[1])


def test_the_gradient_of_the_side_branch_leads_into_the_trunk_below_it_only():
    model = InceptionV3()
    variables = variable_shapes(model, 299)

    def loss(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        _, side_logits = apply(model, variables, x, train=True)
        return side_logits.sum()

    program, shapes = jax.make_jaxpr(jax.grad(loss), return_shape=True)(
        variables["params"], variables["batch_stats"], image_shape(299)
    )
    # Where a gradient does not lead, JAX fills it with a literal zero, which the traced program shows.
    zeros = {
        variable
        for equation in program.eqns
        if equation.primitive.name == "broadcast_in_dim" and getattr(equation.invars[0], "val", None) == 0
        for variable in equation.outvars
    }
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    reached = zip(paths, program.jaxpr.outvars, strict=True)
    parts = {path[0].key for path, variable in reached if variable not in zeros}
    assert parts == (STEM | MODULES).keys() - ABOVE_THE_SIDE_BRANCH | {"side"}


@pytest.mark.parametrize(("side_branches", "smallest"), [(False, 75), (True, 299)])
def test_the_smallest_image_leaves_no_map_empty(side_branches, smallest):
    found = modules_of_initialisation(InceptionV3(side_branches), smallest)
    assert all(0 not in shape for _, shape in found.values())
    # The map that decides has nothing to spare.
    assert found["side/conv2" if side_branches else "inception_7c"][1][1:3] == (1, 1)


@pytest.mark.parametrize(("side_branches", "size"), [(False, 74), (True, 298)])
def test_one_pixel_less_is_an_error_that_names_the_smallest_size(side_branches, size):
    with pytest.raises(ValueError, match=f"at least {size + 1}x{size + 1} pixels, got {size}x{size}"):
        variable_shapes(InceptionV3(side_branches), size)


def test_the_trunk_evaluates_images_too_small_for_the_side_branch():
    model = InceptionV3()
    assert output_shapes(model, variable_shapes(model, 299), 75, train=False).shape == (2, 1000)


def test_any_number_of_channels_and_classes():
    params = variable_shapes(InceptionV3(False, num_classes=10), 75, channels=1)["params"]
    assert count(params) == 23_834_568 - 3 * 3 * 2 * 32 - 2049 * 990


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    model = InceptionV3(dtype=jnp.bfloat16)
    variables = variable_shapes(model, 299)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {y.dtype for y in output_shapes(model, variables, 299, train=True)} == {jnp.dtype("bfloat16")}


def test_the_registry_builds_inception_v3():
    model = make_model(
        "inception_v3", num_classes=10, dtype="float32", axis_name="batch", side_branches=False
    )
    assert model == InceptionV3(False, num_classes=10, axis_name="batch")


def test_batch_normalisation_has_the_public_epsilon():
    found = [module for module, _ in modules_of_initialisation(InceptionV3(), 299).values()]
    norms = {(module.epsilon, module.momentum) for module in found if isinstance(module, BatchNorm)}
    assert norms == {(1e-3, 0.9)}


def test_norms_take_the_statistics_of_the_batch_in_training():
    calls = recorded_training(InceptionV3(False), 75).values()
    assert {m.use_running_average for m, *_ in calls if isinstance(m, BatchNorm)} == {False}


def test_dropout_drops_in_training():
    calls = recorded_training(InceptionV3(False), 75).values()
    flags = [given[1:] for module, given, _ in calls if isinstance(module, Dropout)]
    assert flags == [(True,)]


def test_the_windows_of_the_second_reduction_are_a_row_and_a_column():
    params = variable_shapes(InceptionV3(False), 75)["params"]["inception_7a"]
    assert {name: layer["conv"]["kernel"].shape for name, layer in params.items()} == {
        "reduce_3x3": (1, 1, 768, 192),
        "conv_3x3": (3, 3, 192, 320),
        "reduce_7x7": (1, 1, 768, 192),
        "conv_1x7": (1, 7, 192, 192),
        "conv_7x1": (7, 1, 192, 192),
        "conv_3x3_after_7x7": (3, 3, 192, 192),
    }


# What each part reads: "" is the module's input; project_pool reads what is pooled.
SOURCES = {
    Figure5Module: {
        "conv_1x1": "",
        "reduce_5x5": "",
        "conv_5x5": "reduce_5x5",
        "reduce_double": "",
        "double1_3x3": "reduce_double",
        "double2_3x3": "double1_3x3",
    },
    Figure10Module: {
        "conv_3x3": "",
        "reduce_double": "",
        "double1_3x3": "reduce_double",
        "double2_3x3": "double1_3x3",
    },
    Figure6Module: {
        "conv_1x1": "",
        "reduce_7x7": "",
        "conv_1x7": "reduce_7x7",
        "conv_7x1": "conv_1x7",
        "reduce_double": "",
        "double1_7x1": "reduce_double",
        "double1_1x7": "double1_7x1",
        "double2_7x1": "double1_1x7",
        "double2_1x7": "double2_7x1",
    },
    SecondReduction: {
        "reduce_3x3": "",
        "conv_3x3": "reduce_3x3",
        "reduce_7x7": "",
        "conv_1x7": "reduce_7x7",
        "conv_7x1": "conv_1x7",
        "conv_3x3_after_7x7": "conv_7x1",
    },
    Figure7Module: {
        "conv_1x1": "",
        "reduce_3x3": "",
        "conv_1x3": "reduce_3x3",
        "conv_3x1": "reduce_3x3",
        "reduce_double": "",
        "double1_3x3": "reduce_double",
        "double2_1x3": "double1_3x3",
        "double2_3x1": "double1_3x3",
    },
}


# The parts whose maps a module joins; None is what is pooled in a reduction.
JOINED = {
    Figure5Module: ["conv_1x1", "conv_5x5", "double2_3x3", "project_pool"],
    Figure10Module: ["conv_3x3", "double2_3x3", None],
    Figure6Module: ["conv_1x1", "conv_7x1", "double2_1x7", "project_pool"],
    SecondReduction: ["conv_3x3", "conv_3x3_after_7x7", None],
    Figure7Module: ["conv_1x1", "conv_1x3", "conv_3x1", "double2_1x3", "double2_3x1", "project_pool"],
}


def trace_module(kind):
    arguments = {"filters_pool": 1} if kind is Figure5Module else {}
    arguments |= {"filters": 1} if kind is Figure6Module else {}
    module, x = kind(**arguments, unit=ConvUnit), jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_parts_of_a_module_stand_as_in_its_figure(kind):
    assert sources(lambda: trace_module(kind)) == SOURCES[kind]


@pytest.mark.parametrize("kind", JOINED)
def test_a_module_joins_the_maps_of_all_its_branches(kind, monkeypatch):
    joined, concatenate = [], jnp.concatenate
    monkeypatch.setattr(
        jnp, "concatenate", lambda maps, axis: joined.append(maps) or concatenate(maps, axis=axis)
    )
    givers = {id(y): path for path, (_, y) in inputs_and_outputs(lambda: trace_module(kind)).items()}
    assert [givers.get(id(maps)) for maps in joined[-1]] == JOINED[kind]


def test_the_parts_of_the_network_stand_as_in_the_table():
    order = [*STEM, *MODULES]
    expected = dict(zip(order, ["", *order[:-1]], strict=True))
    del expected["conv3b"], expected["inception_5b"]  # which read what is pooled
    expected |= {"side": "inception_6e", "logits": "dropout"}
    model = InceptionV3()
    variables = variable_shapes(model, 299)
    # In training, where dropout gives something else than it reads.
    assert sources(lambda: output_shapes(model, variables, 299, train=True)) == expected


def test_the_last_map_is_averaged():
    variables = variable_shapes(InceptionV3(False), 75)
    program = jax.make_jaxpr(lambda v, x: InceptionV3(False).apply(v, x, False))(variables, image_shape(75))
    names = [equation.primitive.name for equation in program.eqns]
    last = max(place for place, name in enumerate(names) if name == "concatenate")
    assert names[last + 1 : last + 3] == ["reduce_sum", "div"]


def test_the_side_branch_averages_before_and_after_its_convolutions():
    side, random = SideBranch(ConvUnit, Dense, 3), np.random.default_rng(0)
    x = random.integers(-9, 10, (2, 20, 20, 4)).astype(np.float32)  # whose sums are exact in any order
    shapes = jax.eval_shape(lambda x: side.init(jax.random.key(0), x), x)
    variables = jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float32), shapes)
    seen = inputs_and_outputs(lambda: side.apply(variables, x))
    np.testing.assert_allclose(seen["conv1"][0], nn.avg_pool(x, (5, 5), (3, 3)), rtol=1e-5)
    assert seen["conv2"][0] is seen["conv1"][1]
    np.testing.assert_allclose(seen["logits"][0], seen["conv2"][1].mean(axis=(1, 2)), rtol=1e-5)


def test_dense_layers_start_from_he_et_als_distribution():
    layers = [m for m, *_ in recorded_training(InceptionV3(), 299).values() if isinstance(m, Dense)]
    assert len(layers) == 2
    for layer in layers:
        kernel = layer.kernel_init(jax.random.key(0), (100, 100), jnp.float32)
        np.testing.assert_allclose(np.std(kernel), math.sqrt(2 / 100), rtol=0.03)
        assert not layer.bias_init(jax.random.key(0), (5,), jnp.float32).any()


def test_the_stem_takes_maxima_and_the_side_branch_an_average():
    layers = costs.count(InceptionV3(), (299, 299, 3))
    pools = [(layer.name, layer.kernel, layer.stride) for layer in layers if "pool" in layer.kind]
    stem_and_side = [pool for pool in pools if not pool[0].startswith("inception")]
    assert stem_and_side == [
        ("max_pool1", (3, 3), (2, 2)),
        ("max_pool2", (3, 3), (2, 2)),
        ("side/average_pool1", (5, 5), (3, 3)),
    ]
