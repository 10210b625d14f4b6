import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_cases.models import fast
from cnn_cases.models.fast import (
    avg_pool,
    conv_general_dilated,
    conv_in_order,
    matrix_product,
    max_pool,
    relu,
)
from cnn_cases.models.resnet import CifarResNet
from tests.conftest import drawn

PLAIN = dict(
    lhs_dilation=(1, 1),
    rhs_dilation=(1, 1),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=1,
)


def values_and_gradients(functions, make_cotangent, *arguments):
    """Of each function, in one program: operations that are compiled one by one take far longer."""

    def of_each(*arguments):
        for function in functions:
            value, pull = jax.vjp(function, *arguments)
            yield value, pull(make_cotangent(value.shape))

    return jax.jit(lambda *arguments: tuple(of_each(*arguments)))(*arguments)


def assert_same_convolution(x, kernel, strides, padding, options):
    """Ours against XLA's, in value and in both gradients."""
    (ours, our_gradients), (xla, xla_gradients) = values_and_gradients(
        [
            functools.partial(conv, window_strides=strides, padding=padding, **PLAIN | options)
            for conv in (conv_general_dilated, lax.conv_general_dilated)
        ],
        lambda shape: drawn(2, *shape),
        x,
        kernel,
    )
    np.testing.assert_allclose(ours, xla, atol=1e-5)
    for one, other in zip(our_gradients, xla_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.fixture
def on_a_gpu():
    """Layers as they are written for a GPU, computed by what is here."""
    with fast.written_for("gpu"):
        yield


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("image_shape", "window", "filters", "padding", "size"),
    [
        ((32, 32, 16), 3, 16, ((1, 1), (1, 1)), 4),  # a ResNet for CIFAR-10, and its first layer
        ((32, 32, 3), 3, 16, "SAME", 4),
        ((9, 16, 8), 5, 16, "VALID", 4),
        ((6, 16, 4), 4, 16, ((1, 2), (1, 2)), 4),
        ((6, 24, 8), 3, 8, ((0, 0), (0, 2)), 8),
        ((32, 32, 1), 5, 6, "VALID", 1),  # LeNet-5: ten pixels do not go into 32
        ((14, 14, 6), 5, 16, "VALID", 1),
        ((6, 8, 4), 2, 16, "VALID", 1),  # eight in, seven out
        ((8, 8, 16), 1, 16, "VALID", 1),
        ((8, 8, 32), 3, 16, "SAME", 1),
        ((8, 8, 16), 3, 32, "SAME", 1),
    ],
    ids=str,
)
def test_wide_pixels_have_the_same_convolution(image_shape, window, filters, padding, size, monkeypatch):
    asked = []
    wide = fast.conv_of_wide_pixels
    monkeypatch.setattr(
        fast,
        "conv_of_wide_pixels",
        lambda *args, **options: asked.append(args[3]) or wide(*args, **options),
    )
    x = drawn(0, 2, *image_shape)
    kernel = 0.1 * drawn(1, window, window, image_shape[-1], filters)
    assert_same_convolution(x, kernel, (1, 1), padding, {})
    assert asked == [size] * (size > 1)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("strides", "options"),
    [((2, 2), {}), ((1, 1), {"rhs_dilation": (2, 2)}), ((1, 1), {"feature_group_count": 2})],
    ids=str,
)
def test_wide_pixels_are_for_plain_convolutions(strides, options, monkeypatch):
    monkeypatch.setattr(fast, "conv_of_wide_pixels", pytest.fail)
    x = drawn(0, 2, 16, 16, 8)
    channels = 8 // options.get("feature_group_count", 1)
    kernel = 0.1 * drawn(1, 3, 3, channels, 16)
    assert_same_convolution(x, kernel, strides, "SAME", options)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("image_shape", "groups", "strides", "padding", "is_dense"),
    [
        ((7, 7, 6), 1, (1, 1), "VALID", True),  # as in VGG
        ((7, 7, 6), 1, (4, 4), ((0, 0), (0, 0)), True),
        ((7, 7, 6), 2, (1, 1), "VALID", False),
        ((7, 7, 6), 1, (1, 1), ((0, 1), (0, 0)), False),
        ((7, 8, 6), 1, (1, 1), "VALID", False),
    ],
    ids=str,
)
def test_a_kernel_as_large_as_the_map_is_a_matrix_on_a_gpu(image_shape, groups, strides, padding, is_dense):
    x, kernel = drawn(0, 3, *image_shape), 0.1 * drawn(1, 7, 7, 6 // groups, 4)
    options = {"feature_group_count": groups}
    assert_same_convolution(x, kernel, strides, padding, options)
    ours = functools.partial(conv_general_dilated, **PLAIN | options)
    program = str(jax.make_jaxpr(lambda x, kernel: ours(x, kernel, strides, padding))(x, kernel))
    assert ("conv_general_dilated" not in program) == is_dense


@pytest.mark.usefixtures("on_a_gpu")
def test_a_matrix_product_is_as_precise_as_its_convolution_was_to_be():
    dense = functools.partial(conv_general_dilated, **PLAIN, precision=lax.Precision.HIGHEST)
    program = jax.make_jaxpr(lambda x: dense(x, jnp.ones((3, 3, 2, 4)), (1, 1), "VALID"))(
        jnp.ones((1, 3, 3, 2))
    )
    (product,) = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert product.params["precision"] == (lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 0)), "SAME"])
def test_the_matrix_product_is_the_convolution(size, window, stride, padding):
    x = drawn(0, 3, size, size, 5)
    kernel = drawn(1, window, window, 5, 4)
    assert_same_convolution(x, kernel, (stride, stride), padding, {})


@pytest.mark.parametrize(
    ("size", "channels", "window", "stride", "padding"),
    [
        (32, 1, 5, 1, "VALID"),  # LeNet-5's first
        (14, 6, 5, 1, "VALID"),  # and its second
        (32, 3, 3, 1, "SAME"),  # a ResNet's first, for CIFAR-10
        (13, 2, 3, 2, ((0, 2), (2, 3))),
    ],
)
def test_the_banded_product_is_the_convolution(size, channels, window, stride, padding, monkeypatch):
    x = drawn(0, 2, size, size, channels)
    kernel = drawn(1, window, window, channels, 4)

    def text():
        program = jax.jit(lambda x: conv_general_dilated(x, kernel, (stride, stride), padding, **PLAIN))
        return program.lower(x).as_text()

    assert "stablehlo.convolution" in text()  # of two images it is not worth to compile more
    monkeypatch.setattr(fast, "_WORTH_A_BAND", 0)
    assert "stablehlo.convolution" not in text()
    assert_same_convolution(x, kernel, (stride, stride), padding, {})


@pytest.mark.parametrize(
    ("image_shape", "window", "strides", "padding"),
    [
        ((8, 9, 5), (3, 3), (1, 1), "SAME"),
        ((8, 8, 5), (3, 3), (1, 1), "SAME"),  # of pairs of neighbours; of the next two, one of the gradients
        ((9, 8, 5), (2, 5), (1, 1), ((0, 2), (3, 0))),
        ((8, 8, 5), (3, 3), (1, 1), ((1, 1), (3, 1))),
        ((6, 7, 4), (3, 4), (1, 1), ((4, 3), (0, 2))),  # and here the map alone
        ((8, 9, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),  # of the width, no window is left over
        ((9, 8, 5), (2, 5), (1, 2), ((0, 2), (3, 0))),
        ((23, 23, 3), (7, 7), (2, 2), ((3, 3), (3, 3))),  # a ResNet's first, for ImageNet
        ((27, 29, 3), (11, 11), (4, 4), "VALID"),  # AlexNet's, with windows that two columns are left over by
        ((6, 6, 4), (3, 3), (1, 3), ((4, 3), (0, 5))),  # more pixels of padding than a window reaches over
    ],
    ids=str,
)
def test_a_convolution_and_its_gradients_have_their_axes_in_order(image_shape, window, strides, padding):
    x, kernel = drawn(0, 2, *image_shape), drawn(1, *window, image_shape[-1], 4)
    assert_same_convolution(x, kernel, strides, padding, {})

    def loss(x, kernel):
        return conv_general_dilated(x, kernel, strides, padding, **PLAIN).sum()

    orders = re.findall(
        r"dimension_numbers=ConvDimensionNumbers\((.*?)\)\n",
        str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel)),
    )
    assert len(orders) == 3
    assert set(orders) == {"lhs_spec=(0, 3, 1, 2), rhs_spec=(3, 2, 0, 1), out_spec=(0, 3, 1, 2)"}


@pytest.mark.parametrize(
    ("channels", "filters", "window", "width", "stride", "paired"),
    [
        (16, 16, 3, 32, 1, [True, True]),  # the first stage of a ResNet for CIFAR-10
        (16, 32, 3, 32, 2, [False, False]),  # and the first layer of its second
        (32, 32, 3, 16, 1, [False, False]),
        (17, 16, 3, 8, 1, [True, False]),
        (16, 17, 3, 8, 1, [False, True]),
        (8, 8, 3, 9, 1, [False, False]),
        (8, 8, 2, 8, 1, [False, False]),
    ],
)
def test_few_filters_are_computed_for_pairs_of_neighbours(channels, filters, window, width, stride, paired):
    x, kernel = jnp.ones((2, 8, width, channels)), jnp.ones((3, window, channels, filters))

    def loss(x, kernel):
        return conv_general_dilated(x, kernel, (stride, stride), "SAME", **PLAIN).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel))
    of_map, of_x, _ = re.findall(r"window_strides=(\(.*?\))", program)
    assert [of_map == "(1, 2)", of_x == "(1, 2)"] == paired


@pytest.mark.parametrize(
    "options", [{"feature_group_count": 2}, {"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 2)}]
)
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_groups_and_dilation_are_xla_s(options, size, platform):
    x = drawn(0, 3, size, size, 4)
    kernel = drawn(1, 3, 3, 4 // options.get("feature_group_count", 1), 6)
    with fast.written_for(platform):
        assert_same_convolution(x, kernel, (2, 2), ((2, 2), (2, 2)), options)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 2), ("gpu", 1), ("tpu", 2)])
def test_each_group_has_a_convolution_of_its_own_on_a_cpu_and_a_tpu(platform, convolutions):
    x, kernel = jnp.ones((3, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    grouped = functools.partial(conv_general_dilated, **PLAIN | {"feature_group_count": 2})
    with fast.written_for(platform):
        program = str(jax.make_jaxpr(lambda x, kernel: grouped(x, kernel, (1, 1), "SAME"))(x, kernel))
    assert program.count("= conv_general_dilated[") == convolutions


def test_what_goes_into_a_convolution_is_not_computed_again_for_its_gradient():
    def loss(kernel, x):
        y = conv_general_dilated(jnp.maximum(x, 0), kernel, (1, 1), ((1, 1), (1, 1)), **PLAIN)
        return (y**2).sum()

    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    program = jax.jit(jax.grad(loss)).lower(kernel, x).compile().as_text()
    assert len(re.findall(r" maximum\(", program)) == 1


def test_no_sum_of_a_residual_net_is_computed_twice():
    def maxima(depth):
        model, image = CifarResNet(depth, num_classes=3), jnp.ones((2, 32, 32, 3))
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
        infer = jax.jit(functools.partial(model.apply, train=False))
        return infer.lower(variables, image).compile().as_text().count(" maximum(")

    assert maxima(26) == maxima(14) + 12  # a ReLU in each of twelve layers


@pytest.mark.parametrize("function", [conv_in_order, matrix_product], ids=lambda function: function.__name__)
def test_nothing_is_transposed_before_the_gradient_is_there(function):
    if function is conv_in_order:
        factors, more = (drawn(0, 2, 5, 5, 3), drawn(1, 3, 3, 3, 4)), ((1, 1), ((1, 1), (1, 1)))
    else:
        factors, more = (drawn(0, 2, 5), drawn(1, 5, 4)), ()

    def gradients(x, other, gradient):
        return jax.vjp(lambda x, other: function(x, other, *more), x, other)[1](gradient)

    program = jax.make_jaxpr(gradients)(*factors, function(*factors, *more)).jaxpr
    x, _, gradient = program.invars
    both = next(eqn for eqn in program.eqns if eqn.primitive.name == "optimization_barrier")
    assert both.invars == [x, gradient]
    rest = program.eqns[program.eqns.index(both) + 1 :]
    assert not any(gradient in eqn.invars or x in eqn.invars for eqn in rest)


@pytest.mark.parametrize(
    ("x_shape", "filters", "transposed"),
    [
        ((2, 9), 8, [(2, 8), (9, 2), (2, 9)]),  # a dense layer: not its kernel
        ((90, 9), 2, [(9, 2), (90, 2), (2, 9)]),  # a 1x1 convolution with fewer filters than channels
        ((90, 2), 9, [(2, 9), (90, 2)]),  # and with more
        ((5, 3, 4), 2, None),
    ],
)
def test_gradients_of_a_matrix_product_transpose_as_little_as_possible(x_shape, filters, transposed):
    x, matrix = drawn(0, *x_shape), drawn(1, x_shape[-1], filters)
    functions = matrix_product, lambda x, matrix: x @ matrix
    (ours, our_gradients), (plain, plain_gradients) = values_and_gradients(
        functions, lambda shape: drawn(2, *shape), x, matrix
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(our_gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    if transposed:
        gradients = jax.make_jaxpr(jax.grad(lambda *factors: matrix_product(*factors).sum(), argnums=(0, 1)))
        program = gradients(x, matrix).jaxpr
        found = [eqn.invars[0].aval.shape for eqn in program.eqns if eqn.primitive.name == "transpose"]
        assert sorted(found) == sorted(transposed)
        # XLA would turn transposition and product back into one operation.
        assert sum(eqn.primitive.name == "optimization_barrier" for eqn in program.eqns) >= 3


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_shard_map_sums_the_gradients_over_the_parts_of_a_batch(platform):
    def loss(kernel, x):
        y = nn.relu(conv_general_dilated(x, kernel, (1, 1), "SAME", **PLAIN))
        y = max_pool(y, (2, 2), (2, 2)).mean((1, 2))
        return (matrix_product(y, kernel[0, 0].T) ** 2).sum()

    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    whole, parts = PartitionSpec(), PartitionSpec("batch")
    kernel, x = drawn(0, 3, 3, 4, 8), drawn(1, 4, 8, 8, 4)
    gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(whole, parts), out_specs=whole)
    with fast.written_for(platform):
        found = jax.jit(gradient)(kernel, x)
    np.testing.assert_allclose(found, jax.grad(loss)(kernel, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    "function",
    [lambda x, kernel: conv_general_dilated(x, kernel, (1, 1), "SAME"), matrix_product],
    ids=["conv_general_dilated", "matrix_product"],
)
def test_shard_map_sums_the_gradients_over_the_parts_of_a_kernel(function, platform):
    """Each device has some of the filters, and all have the same input."""

    def loss(x, kernel):
        return (function(x, kernel) ** 2).sum()

    mesh = Mesh(np.array(jax.devices()[:2]), ("filters",))
    if function is matrix_product:
        x, kernel = drawn(0, 4, 5), drawn(1, 5, 8)
    else:
        x, kernel = drawn(0, 4, 8, 8, 4), drawn(1, 3, 3, 4, 8)
    whole, parts = PartitionSpec(), PartitionSpec(*(None,) * (kernel.ndim - 1), "filters")
    gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(whole, parts), out_specs=whole)
    with fast.written_for(platform):
        found = jax.jit(gradient)(x, kernel)
    np.testing.assert_allclose(found, jax.grad(loss)(x, kernel), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_may_be_split_over_a_mesh_by_its_type(platform, groups):
    def loss(kernel, x):
        options = PLAIN | {"feature_group_count": groups}
        y = nn.relu(conv_general_dilated(x, kernel, (1, 1), "SAME", **options))
        y = max_pool(y, (2, 2), (2, 2)).mean((1, 2))
        return (matrix_product(y, kernel[0, 0].T) ** 2).sum()

    kernel, x = drawn(0, 3, 3, 4 // groups, 8), drawn(1, 4, 8, 8, 4)
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    with fast.written_for(platform), jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss))(
            jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())),
            jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch"))),
        )
    np.testing.assert_allclose(found, jax.grad(loss)(kernel, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    ("side", "channels", "filters"), [(14, 6, 16), (8, 16, 16), (2, 16, 16)], ids=["band", "wide", "patches"]
)
def test_a_network_can_be_exported_for_batches_of_any_size(platform, side, channels, filters):
    kernel, x = drawn(0, 3, 3, channels, filters), drawn(1, 3, side, side, channels)

    def network(x):
        y = max_pool(conv_general_dilated(x, kernel, (1, 1), "SAME", **PLAIN), (2, 2), (2, 2))
        return matrix_product(y.mean((1, 2)), kernel[0, 0].T)

    any_batch = jax.export.symbolic_shape(f"batch, {side}, {side}, {channels}")
    with fast.written_for(platform):
        exported = jax.export.export(jax.jit(network))(jax.ShapeDtypeStruct(any_batch, jnp.float32))
    np.testing.assert_allclose(exported.call(x), jax.jit(network)(x), atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_max_pool_has_windows_of_more_cells_than_a_byte_can_number(backend):
    x = drawn(0, 1, 17, 17, 3)
    places = jax.jit(jax.grad(lambda x: max_pool(x, (17, 17), (1, 1)).sum()))
    with fast.written_for(backend):
        np.testing.assert_array_equal(places(x), x == x.max((1, 2), keepdims=True))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "options"),
    [
        ((4, 8, 8, 3), (3, 3, 3, 4), {"batch_group_count": 2}),
        ((4, 8, 8, 3), (3, 3, 3, 4), {"preferred_element_type": jnp.float32}),
        ((4, 8, 8, 3), (1, 1, 3, 4), {"preferred_element_type": jnp.float32}),
        ((4, 3, 8, 8), (4, 3, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
        ((4, 8, 3), (3, 3, 4), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
        ((4, 8, 6, 7, 3), (3, 3, 3, 3, 4), {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}),
    ],
    ids=str,
)
def test_what_is_not_rewritten_is_xla_s(x_shape, kernel_shape, options, platform):
    x, kernel = (drawn(0, *shape).astype(jnp.bfloat16) for shape in (x_shape, kernel_shape))
    strides = (1,) * (len(x_shape) - 2)
    options = {"dimension_numbers": PLAIN["dimension_numbers"]} | options
    with fast.written_for(platform):
        ones = dict(lhs_dilation=strides, rhs_dilation=strides)
        ours = conv_general_dilated(x, kernel, strides, "VALID", **ones, **options)
    xla = lax.conv_general_dilated(x, kernel, strides, "VALID", **options)
    assert (ours.shape, ours.dtype) == (xla.shape, xla.dtype)
    np.testing.assert_array_equal(ours, xla)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("window", [1, 3], ids=["patches", "band"])
@pytest.mark.parametrize(
    ("channels", "filters", "dtype", "groups"),
    [(3, 4, jnp.float32, 1), (2, 4, jnp.float32, 2), (3, 5, jnp.float32, 2), (6, 4, jnp.bfloat16, 1)],
)
def test_a_kernel_that_does_not_fit_the_maps_is_rejected_as_by_xla(
    platform, window, channels, filters, dtype, groups, monkeypatch
):
    monkeypatch.setattr(fast, "_WORTH_A_BAND", 0)
    x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((window, window, channels, filters), dtype)
    options = PLAIN | {"feature_group_count": groups}
    with pytest.raises((TypeError, ValueError)) as xla:
        lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)
    with fast.written_for(platform), pytest.raises(xla.type, match=re.escape(str(xla.value))):
        conv_general_dilated(x, kernel, (1, 1), "SAME", **options)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 3, 8)])
def test_a_window_larger_than_the_map_is_an_error(platform, shape):
    x, kernel = jnp.ones(shape), jnp.ones((5, 5, 8, 4))
    message = (
        f"a feature map of 3x{shape[2]} pixels is smaller than a window of 5x5: the images are too small"
    )
    with fast.written_for(platform):
        with pytest.raises(ValueError, match=message):
            conv_general_dilated(x, kernel, (1, 1), "VALID")
        with pytest.raises(ValueError, match=message):
            max_pool(x, (5, 5), (1, 1))
        with pytest.raises(ValueError, match=message):
            avg_pool(x, (5, 5), (1, 1))
        assert conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1))).shape == (1, 1, shape[2] - 2, 4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("window", [(2, 2), (3, 3), (2, 3)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("padding", "dtype"),
    [
        ("VALID", jnp.float32),
        ("SAME", jnp.float32),
        (((0, 1), (0, 1)), jnp.bfloat16),
        (((1, 1), (1, 0)), jnp.float32),
    ],
)
def test_max_pool_is_flax_s_in_value_and_gradient(backend, window, strides, padding, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # ReLU's zeros and small integers, so that many cells of a window are equal; and gradients that add up
    # without rounding.
    x = np.random.default_rng(0).integers(-4, 3, (2, 8, 9, 4)).clip(0).astype(dtype)
    (ours, our_gradients), (flax, flax_gradients) = values_and_gradients(
        [lambda x, pool=pool: pool(x, window, strides, padding) for pool in (max_pool, nn.max_pool)],
        lambda shape: np.random.default_rng(1).integers(1, 5, shape).astype(dtype),
        x,
    )
    np.testing.assert_array_equal(ours, flax)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(*our_gradients, *flax_gradients)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_max_pool_hides_no_nan(backend, place, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jnp.ones((1, 4, 4, 1)).at[0, *place, 0].set(jnp.nan)
    assert np.isnan(max_pool(x, (2, 2), (2, 2))).ravel().tolist() == [True, False, False, False]


@pytest.mark.parametrize(("backend", "scatters"), [("cpu", False), ("gpu", False), ("tpu", True)])
def test_max_pool_has_no_scatter_on_a_cpu_or_gpu_and_is_flax_s_on_a_tpu(backend, scatters):
    gradient = jax.grad(lambda x: max_pool(x, (3, 3), (2, 2), ((0, 1), (0, 1))).sum())
    with fast.written_for(backend):
        assert ("scatter" in str(jax.make_jaxpr(gradient)(jnp.ones((1, 8, 8, 1))))) == scatters


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((5, 5), (3, 3), "VALID"),
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((3, 2), (1, 3), ((1, 0), (0, 2))),
        ((3, 3), (2, 2), "SAME"),
    ],
)
def test_avg_pool_is_flax_s_in_value_and_gradient(platform, window, strides, padding):
    with fast.written_for(platform):
        (ours, our_gradients), (flax, flax_gradients) = values_and_gradients(
            [lambda x, pool=pool: pool(x, window, strides, padding) for pool in (avg_pool, nn.avg_pool)],
            lambda shape: drawn(1, *shape),
            drawn(0, 2, 8, 9, 4),
        )
    np.testing.assert_allclose(ours, flax, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(*our_gradients, *flax_gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("platform", "by_windows"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_avg_pool_has_no_windows_of_xla_on_a_cpu(platform, by_windows):
    gradient = jax.value_and_grad(lambda x: avg_pool(x, (5, 5), (3, 3)).sum())
    with fast.written_for(platform):
        assert ("reduce_window" in str(jax.make_jaxpr(gradient)(jnp.ones((1, 8, 8, 1))))) == by_windows


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_is_flax_s_with_all_its_derivatives(dtype):
    x = jnp.concatenate([drawn(0, 1000), jnp.zeros(2), -jnp.zeros(2), jnp.array([jnp.inf, -jnp.inf])])
    x, change = x.astype(dtype), drawn(1, *x.shape).astype(dtype)
    for derive in (
        lambda f: f(x),
        lambda f: jax.jvp(f, (x,), (change,))[1],
        lambda f: jax.vjp(f, x)[1](change)[0],
        lambda f: jax.grad(lambda x: jax.grad(lambda x: (f(x) ** 3).sum())(x[:-2]).sum())(x),
    ):
        ours, flax = derive(relu), derive(nn.relu)
        assert ours.dtype == flax.dtype == dtype
        np.testing.assert_array_equal(ours, flax)


def test_layers_are_written_for_the_devices_that_jax_has_unless_told_otherwise():
    assert fast.platform() == "cpu"
    with fast.written_for("tpu"):
        with fast.written_for("gpu"):
            assert fast.platform() == "gpu"
        assert fast.platform() == "tpu"
    assert fast.platform() == "cpu"


def test_written_for_a_tpu_a_network_has_forward_derivatives():
    model, image = CifarResNet(8, num_classes=3), jnp.ones((2, 32, 32, 3))

    def hessian_product():
        params, batch_stats = model.init(jax.random.key(0), image, train=False).values()

        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            return jnp.square(model.apply(variables, image, train=False)).sum()

        return params, jax.jvp(jax.grad(loss), (params,), (params,))[1]

    with fast.written_for("tpu"):
        params, product = jax.eval_shape(hessian_product)
    assert product == params
