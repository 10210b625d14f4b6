import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases.models import fast, make_model
from cnn_cases.models.layers import BatchNorm, Conv, Dense
from cnn_cases.models.resnet import (
    IMAGENET_DEPTHS,
    BasicBlock,
    BottleneckBlock,
    CifarResNet,
    PreactBlock,
    PreactCifarResNet,
    ResNet,
    identity_shortcut,
    make_layers,
)
from tests.conftest import drawn
from tests.models.tracing import convolutions, count, inputs_and_outputs

SMALLEST = [
    functools.partial(CifarResNet, 8),
    functools.partial(PreactCifarResNet, 11),
    functools.partial(ResNet, 18),
]

CONV, NORM = make_layers(train=False, dtype=jnp.float32, axis_name=None)


@functools.cache
def shapes(model, *image_shape):
    """A model's variables, and the outputs of its layers by path, as shapes; nothing is computed."""
    outputs = {}

    def record(method, args, kwargs, context):
        y = method(*args, **kwargs)
        if context.method_name == "__call__":  # a scan's body is a method too
            outputs["/".join(context.module.path)] = y.shape
        return y

    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, *image_shape)), False))
    return variables, outputs


def num_parameters(model, *image_shape):
    return count(shapes(model, *image_shape)[0]["params"])


def num_multiply_adds(model, *image_shape):
    """For one image, in convolutions and dense layers."""
    variables, outputs = shapes(model, *image_shape)
    total = 0
    for path, shape in outputs.items():
        params = variables["params"]
        for name in path.split("/") if path else ():
            params = params.get(name, {})
        if "kernel" in params:
            total += params["kernel"].size * int(np.prod(shape[1:-1]))
    return total


def same_values(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(jnp.array_equal, a, b)
    )


def init(model, image):
    """The variables of a network, or of a block, which is not told whether it trains."""
    flags = {} if isinstance(model, BasicBlock | BottleneckBlock | PreactBlock) else dict(train=False)
    return jax.jit(functools.partial(model.init, **flags))(jax.random.key(0), image)


def evaluate(model, variables, image):
    return jax.jit(lambda v, x: model.apply(v, x, False))(variables, image)


def train(model, variables, image):
    """Logits and the new batch statistics."""
    return jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]))(variables, image)


@pytest.fixture(scope="module")
def image():
    return drawn(1, 4, 8, 8, 3)


@pytest.fixture(scope="module")
def cifar8(image):
    """The smallest CIFAR net's variables."""
    return init(CifarResNet(8), image)


# The papers' tables


@pytest.mark.parametrize(
    ("depth", "stages", "dense", "total"),
    [
        (18, [147968, 525568, 2099712, 8393728], 513000, 11689512),
        (34, [221952, 1116416, 6822400, 13114368], 513000, 21797672),
        (50, [215808, 1219584, 7098368, 14964736], 2049000, 25557032),
        (101, [215808, 1219584, 26090496, 14964736], 2049000, 44549160),
        (152, [215808, 2339840, 40613888, 14964736], 2049000, 60192808),
    ],
)
def test_imagenet_parameters_stage_by_stage(depth, stages, dense, total):
    params = shapes(ResNet(depth), 224, 224, 3)[0]["params"]
    assert count(params["conv1"]) + count(params["norm1"]) == 9536
    assert [
        sum(count(params[name]) for name in params if name.startswith(f"stage{stage}_"))
        for stage in (1, 2, 3, 4)
    ] == stages
    assert count(params["logits"]) == dense
    assert count(params) == total


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11515688), (34, 21623848)])
def test_plain_imagenet_nets_have_the_parameters_of_option_a(depth, parameters):
    assert num_parameters(ResNet(depth, plain=True, shortcut="A"), 224, 224, 3) == parameters
    assert num_parameters(ResNet(depth, shortcut="A"), 224, 224, 3) == parameters


def test_plain_bottleneck_nets_lack_the_projections_alone():
    projections = 64 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048 + 2 * (256 + 512 + 1024 + 2048)
    plain = ResNet(50, plain=True, shortcut="A")
    assert num_parameters(plain, 224, 224, 3) == num_parameters(ResNet(50), 224, 224, 3) - projections


@pytest.mark.parametrize(("depth", "expansion"), [(18, 1), (50, 4)])
def test_option_c_projects_in_every_block(depth, expansion):
    _, stage_sizes = IMAGENET_DEPTHS[depth]
    # Option B projects in the first block of a stage, save where a basic block keeps the stem's 64 channels.
    more = 0
    for stage, num_blocks in enumerate(stage_sizes):
        channels = 64 * 2**stage * expansion
        more += (num_blocks if channels == 64 else num_blocks - 1) * (channels**2 + 2 * channels)
    b, c = ResNet(depth, shortcut="B"), ResNet(depth, shortcut="C")
    assert num_parameters(c, 224, 224, 3) == num_parameters(b, 224, 224, 3) + more


@pytest.mark.parametrize(
    ("depth", "v1", "v15"),
    [
        (18, 1.814, 1.814),
        (34, 3.664, 3.664),
        (50, 3.858, 4.089),
        (101, 7.570, 7.801),
        (152, 11.282, 11.514),
    ],
)
def test_imagenet_multiply_adds_by_stride_placement(depth, v1, v15):
    net = functools.partial(ResNet, depth)
    assert round(num_multiply_adds(net(stride_placement="v1"), 224, 224, 3) / 1e9, 3) == v1
    assert round(num_multiply_adds(net(stride_placement="v1.5"), 224, 224, 3) / 1e9, 3) == v15
    assert num_parameters(net(stride_placement="v1.5"), 224, 224, 3) == num_parameters(net(), 224, 224, 3)


@pytest.mark.parametrize("depth", [34, 50])
def test_imagenet_layers_have_the_shapes_of_table_1(depth):
    _, outputs = shapes(ResNet(depth), 224, 224, 3)
    block_type, stage_sizes = IMAGENET_DEPTHS[depth]
    expansion = 4 if block_type is BottleneckBlock else 1
    assert outputs["conv1"] == (2, 112, 112, 64)
    for stage, num_blocks in enumerate(stage_sizes):
        pixels, filters = 56 // 2**stage, 64 * 2**stage
        for block in range(1, num_blocks + 1):
            name = f"stage{stage + 1}_block{block}"
            assert outputs[name] == (2, pixels, pixels, filters * expansion)
            assert outputs[f"{name}/conv1"] == (2, pixels, pixels, filters)
        assert f"stage{stage + 1}_block{num_blocks + 1}" not in outputs
    assert outputs["logits"] == (2, 1000)


@pytest.mark.parametrize(("placement", "pixels"), [("v1", 28), ("v1.5", 56)])
def test_stride_placement_says_which_convolution_of_a_bottleneck_subsamples(placement, pixels):
    _, outputs = shapes(ResNet(50, stride_placement=placement), 224, 224, 3)
    assert outputs["stage2_block1/conv1"] == (2, pixels, pixels, 128)
    assert outputs["stage2_block1/conv2"] == (2, 28, 28, 128)
    assert outputs["stage2_block1/projection"] == (2, 28, 28, 512)


@pytest.mark.parametrize(
    ("depth", "parameters", "mega_multiply_adds"),
    [
        (20, 269722, 40.6),
        (32, 464154, 68.9),
        (44, 658586, 97.2),
        (56, 853018, 125.5),
        (110, 1727962, 252.9),
    ],
)
def test_cifar_parameters_and_multiply_adds(depth, parameters, mega_multiply_adds):
    assert num_parameters(CifarResNet(depth), 32, 32, 3) == parameters
    assert round(num_multiply_adds(CifarResNet(depth), 32, 32, 3) / 1e6, 1) == mega_multiply_adds


@pytest.mark.parametrize("depth", [20, 44])
def test_plain_cifar_nets_have_the_parameters_of_option_a_and_option_b_has_more(depth):
    parameters = num_parameters(CifarResNet(depth), 32, 32, 3)
    assert num_parameters(CifarResNet(depth, plain=True), 32, 32, 3) == parameters
    assert num_parameters(CifarResNet(depth, shortcut="B"), 32, 32, 3) == parameters + 2752


def test_cifar_layers_have_the_shapes_of_section_4_2():
    _, outputs = shapes(CifarResNet(20), 32, 32, 3)
    blocks = {name: shape for name, shape in outputs.items() if "block" in name and "/" not in name}
    assert list(blocks.values()) == [(2, 32, 32, 16)] * 3 + [(2, 16, 16, 32)] * 3 + [(2, 8, 8, 64)] * 3
    assert outputs["conv1"] == (2, 32, 32, 16)
    assert outputs["logits"] == (2, 10)


def test_preactivation_parameters_stage_by_stage():
    params = shapes(PreactCifarResNet(164), 32, 32, 3)[0]["params"]
    parts = ("conv1", "stage1_", "stage2_", "stage3_", "final_norm", "logits")
    assert [sum(count(params[name]) for name in params if name.startswith(part)) for part in parts] == [
        432,
        81952,
        326272,
        1291520,
        512,
        2570,
    ]
    assert count(params) == 1703258


def test_preactivation_layers_have_the_channels_of_the_authors_code():
    _, outputs = shapes(PreactCifarResNet(20), 32, 32, 3)
    blocks = [shape for name, shape in outputs.items() if "block" in name and "/" not in name]
    assert blocks == [(2, 32, 32, 64)] * 2 + [(2, 16, 16, 128)] * 2 + [(2, 8, 8, 256)] * 2
    assert outputs["stage2_block1/conv1"] == (2, 16, 16, 32)
    projections = [name for name in outputs if name.endswith("projection")]
    assert projections == [f"stage{stage}_block1/projection" for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    ("model", "strided"),
    [
        (CifarResNet(8, shortcut="B"), {1, 3}),
        (PreactCifarResNet(11), {1}),
        (ResNet(18), {1, 3, 7}),
        (BottleneckBlock(4, 2, "B", False, CONV, NORM, stride_placement="v1.5"), {1, 3}),
    ],
)
def test_every_convolution_pads_all_edges_by_half_its_kernel_even_where_it_subsamples(model, strided):
    flags = {} if isinstance(model, BottleneckBlock) else dict(train=False)
    with fast.written_for("tpu"):  # all in `lax`'s convolutions
        init = functools.partial(model.init_with_output, **flags)
        found = convolutions(init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    sides = set()
    for equation in found:
        side, *_ = equation.invars[1].aval.shape
        assert equation.params["padding"] == ((side // 2, side // 2),) * 2
        if equation.params["window_strides"] == (2, 2):
            sides.add(side)
    assert sides == strided


# The ablation


def test_plain_and_residual_twins_start_bit_identical(cifar8, image):
    assert same_values(init(CifarResNet(8, plain=True), image), cifar8)


@pytest.mark.parametrize(
    "net", [functools.partial(CifarResNet, 14), functools.partial(ResNet, 50, shortcut="A")]
)
def test_plain_and_residual_twins_have_the_same_layers(net):
    plain, residual = shapes(net(plain=True), 32, 32, 3), shapes(net(plain=False), 32, 32, 3)
    assert plain == residual


@pytest.mark.parametrize(
    ("block_type", "filters", "last"), [(BasicBlock, 8, "norm2"), (BottleneckBlock, 2, "norm3")]
)
def test_plain_removes_the_addition_and_nothing_else(block_type, filters, last):
    x = drawn(0, 2, 5, 5, 8)
    residual, plain = (block_type(filters, 1, "A", plain, CONV, NORM) for plain in (False, True))
    variables, plain_variables = jax.jit(lambda *args: (residual.init(*args), plain.init(*args)))(
        jax.random.key(1), x
    )
    assert same_values(variables, plain_variables)

    @jax.jit
    def apply(variables, x):
        y, state = residual.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        return y, plain.apply(variables, x), state["intermediates"][last]["__call__"][0]

    with_addition, without, branch = apply(variables, x)
    np.testing.assert_array_equal(with_addition, nn.relu(branch + x))
    np.testing.assert_array_equal(without, nn.relu(branch))


def test_option_a_takes_every_second_pixel_and_pads_with_zero_channels():
    x = jnp.arange(2 * 5 * 5 * 2.0).reshape(2, 5, 5, 2)
    y = identity_shortcut(x, filters=3, stride=2)
    assert y.shape == (2, 3, 3, 3)
    np.testing.assert_array_equal(y[..., :2], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 2], 0)


@pytest.mark.parametrize(
    ("shortcut", "changes", "stays"), [("A", False, False), ("B", True, False), ("C", True, True)]
)
def test_shortcut_options_project_where_the_paper_says(shortcut, changes, stays):
    for block, projects in (("stage2_block1", changes), ("stage2_block2", stays)):
        params = shapes(CifarResNet(14, shortcut=shortcut), 32, 32, 3)[0]["params"][block]
        assert ("projection" in params) == projects
        assert ("projection_norm" in params) == projects


# Pre-activation


def test_preactivation_block_adds_to_an_untouched_input():
    x = drawn(0, 2, 5, 5, 8)
    block = PreactBlock(2, 1, CONV, NORM)
    variables = init(block, x)
    variables["params"]["conv3"]["kernel"] *= 0
    np.testing.assert_array_equal(jax.jit(block.apply)(variables, x), x)


def test_preactivation_projection_sees_the_activated_input():
    x = drawn(0, 2, 5, 5, 3)
    block = PreactBlock(2, 2, CONV, NORM)
    variables = init(block, x)
    variables["params"]["conv3"]["kernel"] *= 0
    variables["batch_stats"]["norm1"]["mean"] += 0.3
    kernel = variables["params"]["projection"]["kernel"][0, 0]
    expected = nn.relu((x - 0.3) / np.sqrt(1 + 1e-5))[:, ::2, ::2] @ kernel
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_preactivation_order_is_norm_then_convolution():
    _, outputs = shapes(PreactCifarResNet(20), 32, 32, 3)
    layers = [name.partition("/")[2] for name in outputs if name.startswith("stage1_block2/")]
    assert layers == ["norm1", "conv1", "norm2", "conv2", "norm3", "conv3"]
    assert list(outputs)[-3:] == ["final_norm", "logits", ""]


# Very deep nets


def random_variables(model, image):
    """Values with which every block differs from every other."""
    leaves, structure = jax.tree.flatten(shapes(model, *image.shape[1:])[0])
    rng = np.random.default_rng(0)
    return structure.unflatten(rng.uniform(0.05, 0.15, leaf.shape).astype(np.float32) for leaf in leaves)


def stack_blocks(variables, blocks_per_stage):
    """The variables of an unrolled net, as its twin with `scan_blocks` names them."""
    stacked = {}
    for collection, layers in variables.items():
        layers = dict(layers)
        for stage in (1, 2, 3):
            blocks = [layers.pop(f"stage{stage}_block{i}") for i in range(2, blocks_per_stage + 1)]
            layers[f"stage{stage}_blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
        stacked[collection] = layers
    return stacked


@pytest.mark.parametrize(
    "net",
    [
        functools.partial(CifarResNet, 20, shortcut="C"),
        functools.partial(PreactCifarResNet, 29),
    ],
)
def test_scanned_blocks_compute_what_unrolled_ones_do(net, image):
    variables = random_variables(net(), image)
    logits, updates = train(net(), variables, image)
    scanned = net(scan_blocks=True)
    scanned_logits, scanned_updates = train(scanned, stack_blocks(variables, 3), image)
    np.testing.assert_allclose(scanned_logits, logits, rtol=1e-4, atol=1e-4)
    expected = stack_blocks(updates, 3)
    assert jax.tree.structure(scanned_updates) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), scanned_updates, expected
    )


def test_what_scanned_blocks_return_can_be_captured(image):
    model = CifarResNet(20, scan_blocks=True)
    captured = jax.eval_shape(
        lambda key: model.init_with_output(
            key, image, False, capture_intermediates=True, mutable=["params", "batch_stats", "intermediates"]
        )[1]["intermediates"],
        jax.random.key(0),
    )
    (activation,) = captured["stage1_blocks"]["conv2"]["__call__"]
    assert activation.shape == (2, *image.shape[:3], 16)


def test_scanned_blocks_are_stacked_and_start_from_different_values(image):
    model = CifarResNet(20, scan_blocks=True)
    block = jax.jit(lambda key: model.init(key, image, False)["params"]["stage1_blocks"])(jax.random.key(0))
    kernel = block["conv1"]["kernel"]
    assert kernel.shape == (2, 3, 3, 16, 16)
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.1
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 16)), rtol=0.05)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (CifarResNet(20, scan_blocks=True), 269722),
        (CifarResNet(1202, scan_blocks=True), 19421274),
        (CifarResNet(1202, plain=True, scan_blocks=True), 19421274),
        (CifarResNet(1202, shortcut="B", scan_blocks=True), 19421274 + 2752),
        (PreactCifarResNet(164, scan_blocks=True), 1703258),
        (PreactCifarResNet(1001, scan_blocks=True), 10327706),
    ],
)
def test_scanned_nets_have_the_parameters_of_the_paper(model, parameters):
    assert num_parameters(model, 32, 32, 3) == parameters


@pytest.mark.parametrize(("net", "depths"), [(CifarResNet, (20, 1202)), (PreactCifarResNet, (29, 1001))])
def test_a_scanned_program_does_not_grow_with_depth(net, depths, image):
    def num_equations(depth):
        model = net(depth, scan_blocks=True)
        variables, _ = shapes(model, 8, 8, 3)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        return len(jax.make_jaxpr(apply)(variables, image).eqns)

    shallow, deep = map(num_equations, depths)
    assert shallow == deep


def test_one_block_a_stage_leaves_nothing_to_scan():
    assert shapes(CifarResNet(8, scan_blocks=True), 8, 8, 3) == shapes(CifarResNet(8), 8, 8, 3)


# What a block starts as


@pytest.mark.parametrize(("block_type", "filters"), [(BasicBlock, 8), (BottleneckBlock, 2)])
def test_zero_last_gamma_makes_a_block_the_identity(block_type, filters):
    x = np.abs(drawn(0, 2, 5, 5, 8))  # not negative, so that ReLU keeps it
    block = block_type(filters, 1, "B", False, CONV, NORM, zero_init_last_gamma=True)
    y, _ = jax.jit(block.init_with_output)(jax.random.key(1), x)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(("depth", "last"), [(18, "norm2"), (50, "norm3")])
@pytest.mark.parametrize("zero", [False, True])
def test_zero_last_gamma_is_for_the_last_norm_of_each_block_alone(depth, last, zero):
    starts = {}

    def record(method, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            starts["/".join(context.module.path)] = context.module.scale_init
        return method(*args, **kwargs)

    model = ResNet(depth, zero_init_last_gamma=zero)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
    at_zero = {path for path, start in starts.items() if start is nn.initializers.zeros}
    last_norms = {path for path in starts if path.endswith(f"/{last}")}
    assert len(last_norms) == sum(IMAGENET_DEPTHS[depth][1])
    assert at_zero == (last_norms if zero else set())


def test_convolutions_start_with_he_initialisation(cifar8):
    kernel = cifar8["params"]["stage3_block1"]["conv2"]["kernel"]
    assert kernel.shape == (3, 3, 64, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 64)), rtol=0.02)
    assert kernel.max() > 3.5 * kernel.std()  # not truncated


@pytest.mark.parametrize("net", SMALLEST)
def test_every_convolution_and_dense_layer_starts_with_he_initialisation(trace, net):
    _, calls = trace(net(), 32)
    modules = [call.module for call in calls if isinstance(call.module, Conv | Dense)]
    assert modules[-1].name == "logits"
    for start in {module.kernel_init for module in modules}:
        kernel = start(jax.random.key(0), (50, 400), jnp.float32)
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 50), rtol=0.03)
        assert kernel.max() > 3 * kernel.std()  # not truncated


# Training and evaluation


def test_batch_statistics_move_in_training_and_are_used_in_evaluation(cifar8, image):
    model = CifarResNet(8)
    logits, updates = train(model, cifar8, image)
    # The first norm sees the first convolution's output, whose mean it blends in with weight 0.1.
    stem = nn.Conv(16, (3, 3), padding=1, use_bias=False).apply({"params": cifar8["params"]["conv1"]}, image)
    mean = updates["batch_stats"]["norm1"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    before, after = (evaluate(model, variables, image) for variables in (cifar8, cifar8 | updates))
    assert jnp.abs(before - logits).max() > 1e-2
    assert jnp.abs(before - after).max() > 1e-2


def test_batch_statistics_over_an_axis_are_those_of_the_whole_batch(cifar8, image):
    logits, updates = train(CifarResNet(8), cifar8, image)
    model = CifarResNet(8, axis_name="batch")

    def train_part(x):
        return model.apply(cifar8, x, True, mutable=["batch_stats"])

    halves = jax.jit(jax.vmap(train_part, axis_name="batch"))(image.reshape(2, 2, 8, 8, 3))
    np.testing.assert_allclose(halves[0].reshape(4, 10), logits, atol=1e-4)
    for half, both in zip(jax.tree.leaves(halves[1]), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(half[1], both, atol=1e-5)


@pytest.mark.parametrize(("axis_name", "train"), [("batch", False), (None, True)])
@pytest.mark.parametrize("net", SMALLEST)
def test_every_norm_knows_the_axis_of_its_net_and_whether_it_trains(trace, net, axis_name, train):
    _, calls = trace(net(axis_name=axis_name), 32, train=train)
    norms = [call.module for call in calls if isinstance(call.module, BatchNorm)]
    assert {(norm.axis_name, norm.use_running_average) for norm in norms} == {(axis_name, not train)}


@pytest.mark.parametrize("net", SMALLEST)
def test_bfloat16_computes_with_float32_parameters(net):
    model = net(dtype=jnp.bfloat16)
    variables, _ = shapes(model, 32, 32, 3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    logits = jax.eval_shape(lambda v: model.apply(v, jnp.zeros((2, 32, 32, 3)), False), variables)
    assert logits.dtype == jnp.bfloat16


@pytest.mark.parametrize("net", [*SMALLEST, functools.partial(ResNet, 50)])
@pytest.mark.parametrize("size", [(1, 1), (33, 20)])
def test_any_image_size_channels_and_classes_will_do(net, size):
    assert shapes(net(num_classes=7), *size, 5)[1][""] == (2, 7)


# Bad input


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (CifarResNet(21), "model.depth = 21 is not 6n [+] 2 with n >= 1; nearest: 20 and 26"),
        (CifarResNet(2), "model.depth = 2 is not 6n [+] 2 with n >= 1; nearest: 8 and 14"),
        (CifarResNet(8, shortcut="D"), "model.shortcut = 'D' is unknown; known: A, B, C"),
        (CifarResNet(8, plain=True, shortcut="B"), "model.shortcut = 'B' has no effect in a plain net"),
        (PreactCifarResNet(165), "model.depth = 165 is not 9n [+] 2 with n >= 1; nearest: 164 and 173"),
        (PreactCifarResNet(3), "model.depth = 3 is not 9n [+] 2 with n >= 1; nearest: 11 and 20"),
        (ResNet(56), "model.depth = 56 is unknown; known: 18, 34, 50, 101, 152"),
        (ResNet(18, shortcut="a"), "model.shortcut = 'a' is unknown; known: A, B, C"),
        (ResNet(18, plain=True), "model.shortcut = 'B' has no effect in a plain net; set it to 'A'"),
        (ResNet(50, stride_placement="v2"), "model.stride_placement = 'v2' is unknown; known: v1, v1.5"),
        (
            ResNet(18, plain=True, shortcut="A", zero_init_last_gamma=True),
            "model.zero_init_last_gamma = True would make every block of a plain net output zeros",
        ),
    ],
)
def test_bad_fields_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        shapes(model, 32, 32, 3)


@pytest.mark.parametrize(
    ("name", "knobs", "module"),
    [
        ("resnet_cifar", dict(depth=56, plain=True), CifarResNet(56, plain=True, axis_name="batch")),
        ("resnet_preact_cifar", dict(depth=1001), PreactCifarResNet(1001, axis_name="batch")),
        (
            "resnet",
            dict(depth=34, stride_placement="v1.5", shortcut="C", zero_init_last_gamma=True),
            ResNet(34, False, "C", "v1.5", True, num_classes=10, axis_name="batch"),
        ),
    ],
)
def test_registered(name, knobs, module):
    assert make_model(name, num_classes=10, dtype="float32", axis_name="batch", **knobs) == module


def test_a_depth_that_would_be_traced_for_hours_is_refused():
    with pytest.raises(ValueError, match=r"model\.depth = 1800002 must be at most 5000"):
        shapes(CifarResNet(depth=1_800_002), 8, 8, 1)


# From layer to layer


def layers_of(model, image):
    """{path: (input, output)} of the modules of a net, or of a block, with values of both signs."""

    def spread(path, leaf):
        values = rng.normal(0, 1, leaf.shape).astype(np.float32)
        return np.abs(values) + 0.1 if path[-1].key == "var" else values

    rng = np.random.default_rng(0)
    flags = {} if isinstance(model, BasicBlock | BottleneckBlock | PreactBlock) else dict(train=False)
    variables = jax.eval_shape(functools.partial(model.init, **flags), jax.random.key(0), image)
    variables = jax.tree_util.tree_map_with_path(spread, variables)

    run = jax.jit(lambda *given: inputs_and_outputs(lambda: model.apply(*given, **flags)))
    return run(variables, image)


def follows(seen, after, before, between=nn.relu):
    """Whether the input of one layer is what `between` makes of the output of another."""
    expected = np.asarray(between(seen[before][1]))
    return np.allclose(seen[after][0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def normalises(seen, block, *layers):
    """Whether the norms of a block have the outputs of its convolutions, and nothing has come between."""
    names = {f"conv{number}": f"norm{number}" for number in (1, 2, 3)} | {"projection": "projection_norm"}
    return all(follows(seen, f"{block}{names[conv]}", f"{block}{conv}", lambda maps: maps) for conv in layers)


def average(maps):
    return maps.mean(axis=(1, 2))


def test_a_basic_net_has_relu_between_its_layers_and_averages_its_last_maps(image):
    seen = layers_of(CifarResNet(8, shortcut="B"), image)
    assert normalises(seen, "", "conv1")
    assert follows(seen, "stage1_block1", "norm1")
    for stage in (1, 2, 3):
        assert normalises(seen, f"stage{stage}_block1/", "conv1", "conv2")
        assert follows(seen, f"stage{stage}_block1/conv2", f"stage{stage}_block1/norm1")
    block = "stage2_block1"
    assert normalises(seen, f"{block}/", "projection")
    total = seen[f"{block}/norm2"][1] + seen[f"{block}/projection_norm"][1]
    np.testing.assert_allclose(seen[block][1], nn.relu(total), rtol=1e-5, atol=1e-6)
    assert follows(seen, "logits", "stage3_block1", average)


def test_a_bottleneck_has_relu_between_its_layers(image):
    seen = layers_of(BottleneckBlock(4, 2, "B", False, CONV, NORM), image)
    assert normalises(seen, "", "conv1", "conv2", "conv3", "projection")
    assert follows(seen, "conv2", "norm1")
    assert follows(seen, "conv3", "norm2")
    total = seen["norm3"][1] + seen["projection_norm"][1]
    np.testing.assert_allclose(seen[""][1], nn.relu(total), rtol=1e-5, atol=1e-6)


def test_an_imagenet_net_begins_with_relu_and_the_largest_and_ends_with_an_average():
    seen = layers_of(ResNet(18), drawn(1, 2, 40, 40, 3))

    def pooled(maps):
        return nn.max_pool(nn.relu(maps), (3, 3), (2, 2), padding=((1, 1), (1, 1)))

    assert normalises(seen, "", "conv1")
    assert follows(seen, "stage1_block1", "norm1", pooled)
    assert follows(seen, "logits", "stage4_block2", average)


def test_a_preactivation_net_has_relu_after_every_norm(image):
    seen = layers_of(PreactCifarResNet(11), image)
    for stage in (1, 2, 3):
        for layer in (1, 2, 3):
            block = f"stage{stage}_block1"
            assert follows(seen, f"{block}/conv{layer}", f"{block}/norm{layer}")
        np.testing.assert_array_equal(seen[f"{block}/norm1"][0], seen[block][0])
        for layer in (1, 2):
            assert follows(seen, f"{block}/norm{layer + 1}", f"{block}/conv{layer}", lambda maps: maps)
    assert follows(seen, "final_norm", "stage3_block1", lambda maps: maps)
    assert follows(seen, "logits", "final_norm", lambda maps: average(nn.relu(maps)))


def test_he_initialisation_goes_by_the_fan_in_of_convolutions_and_of_the_dense_layer(cifar8):
    kernel = cifar8["params"]["stage3_block1"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 32)), rtol=0.02)
    np.testing.assert_allclose(cifar8["params"]["logits"]["kernel"].std(), np.sqrt(2 / 64), rtol=0.1)
