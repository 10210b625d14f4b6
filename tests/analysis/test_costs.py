import collections
import csv
import functools
import io
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from cnn_cases.analysis import costs
from cnn_cases.data import sources
from cnn_cases.models import fast, make_model
from cnn_cases.models.alexnet import AlexNet
from cnn_cases.models.inception import GoogLeNet, InceptionModule
from cnn_cases.models.inception_v3 import InceptionV3
from cnn_cases.models.layers import BatchNorm, Conv, ConvUnit, batch_norm
from cnn_cases.models.lenet import LeNet5, LeNet5Original
from cnn_cases.models.nin import NIN
from cnn_cases.models.resnet import CifarResNet, PreactCifarResNet, ResNet
from cnn_cases.models.vgg import VGG

counted = functools.cache(costs.count)

CIFAR = (32, 32, 3)
IMAGENET = (224, 224, 3)


class Alone(nn.Module):
    """One layer or module that takes no `train`, as a model."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x, train):
        del train
        return self.layer(x)


def alone(layer, image_shape, **options):
    return costs.count(Alone(layer), image_shape, **options)


def trunk_shapes(model, image_shape, *kinds):
    return [layer.output for layer in counted(model, image_shape) if layer.kind in kinds]


# The lecture


def test_a_5x5_convolution_with_and_without_a_bottleneck_costs_what_the_lecture_says():
    direct = alone(nn.Conv(32, (5, 5), padding=2), (28, 28, 192))
    assert costs.total(direct).multiply_adds == 120_422_400
    narrow = alone(
        nn.Sequential([nn.Conv(16, (1, 1)), nn.Conv(32, (5, 5), padding=2)]),
        (28, 28, 192),
    )
    assert [layer.multiply_adds for layer in narrow] == [2_408_448, 10_035_200]
    assert costs.total(narrow).multiply_adds == 12_443_648


def test_a_1x1_convolution_keeps_the_pixels_and_changes_the_channels():
    (layer,) = alone(nn.Conv(32, (1, 1)), (28, 28, 192))
    assert layer.output == (28, 28, 32)
    assert (layer.parameters, layer.multiply_adds) == (192 * 32 + 32, 28 * 28 * 192 * 32)


def test_the_branches_of_an_inception_module_add_up_to_its_channels():
    layers = alone(InceptionModule(64, 96, 128, 16, 32, 32), (28, 28, 192))
    outputs = {layer.name.split("/")[1]: layer.output for layer in layers}
    branches = [outputs[name] for name in ("conv_1x1", "conv_3x3", "conv_5x5", "project_pool")]
    assert branches == [(28, 28, 64), (28, 28, 128), (28, 28, 32), (28, 28, 32)]
    googlenet = {layer.name: layer for layer in counted(GoogLeNet(), IMAGENET)}
    assert googlenet["inception_3a/conv_3x3/conv"].output == (28, 28, 128)
    reader = googlenet["inception_3b/conv_1x1/conv"]
    assert reader.parameters == 256 * 128 + 128, "3a must hand 64 + 128 + 32 + 32 channels to 3b"


def test_the_layers_of_lenet_5_have_the_shapes_of_the_slide():
    assert [layer.output for layer in counted(LeNet5(), (32, 32, 1))] == [
        (28, 28, 6),
        (14, 14, 6),
        (10, 10, 16),
        (5, 5, 16),
        (120,),
        (84,),
        (10,),
    ]


def test_the_layers_of_alexnet_have_the_shapes_of_the_slide():
    layers = counted(AlexNet("lecture"), (227, 227, 3))
    assert [(layer.kind, layer.kernel, layer.stride[:1], layer.output) for layer in layers] == [
        ("conv", (11, 11), (4,), (55, 55, 96)),
        ("max pool", (3, 3), (2,), (27, 27, 96)),
        ("conv", (5, 5), (1,), (27, 27, 256)),
        ("max pool", (3, 3), (2,), (13, 13, 256)),
        ("conv", (3, 3), (1,), (13, 13, 384)),
        ("conv", (3, 3), (1,), (13, 13, 384)),
        ("conv", (3, 3), (1,), (13, 13, 256)),
        ("max pool", (3, 3), (2,), (6, 6, 256)),
        ("dense", (), (), (4096,)),
        ("dense", (), (), (4096,)),
        ("dense", (), (), (1000,)),
    ]


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])  # each of which pools in another way
def test_the_layers_of_vgg_16_have_the_shapes_of_the_slide(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    convolutions = {64: (224, 2), 128: (112, 2), 256: (56, 3)}
    expected = []
    for filters, (size, times) in convolutions.items():
        expected += [(size, size, filters)] * times + [(size // 2, size // 2, filters)]
    expected += [(28, 28, 512)] * 3 + [(14, 14, 512)] * 4 + [(7, 7, 512)]
    expected += [(1, 1, 4096), (1, 1, 4096), (1, 1, 1000)]
    assert trunk_shapes(VGG("D"), IMAGENET, "conv", "max pool") == expected


# Totals


def cifar_resnet(depth):
    """Stem, 6n convolutions of equal cost but for the two that halve the map, and the dense layer."""
    n = (depth - 2) // 6
    return 9 * 3 * 16 * 32**2 + 6 * n * 9 * 16**2 * 32**2 - 2 * (9 * 16 * 32 * 16**2) + 64 * 10


@pytest.mark.parametrize(
    ("model", "image_shape", "parameters", "multiply_adds", "published"),
    [
        (LeNet5(), (32, 32, 1), 61_706, 416_520, "0.000417"),
        (AlexNet("two_groups"), (227, 227, 3), 60_965_224, 724_406_816, "0.724"),
        (AlexNet("lecture"), (227, 227, 3), 62_378_344, 1_135_256_096, "1.135"),
        (AlexNet("one_tower"), IMAGENET, 61_100_840, 714_188_480, "0.714"),
        (VGG("A"), IMAGENET, 132_863_336, 7_609_090_048, "7.609"),
        (VGG("B"), IMAGENET, 133_047_848, 11_308_466_176, "11.308"),
        (VGG("D"), IMAGENET, 138_357_544, 15_470_264_320, "15.470"),
        (VGG("E"), IMAGENET, 143_667_240, 19_632_062_464, "19.632"),
        (VGG("E", batch_norm=True), IMAGENET, 143_678_248, 19_632_062_464, "19.632"),
        (NIN("cifar"), CIFAR, 966_986, 222_486_528, "0.222"),
        (NIN("imagenet", num_classes=1000), IMAGENET, 7_595_176, 1_100_188_800, "1.10"),
        (GoogLeNet(), IMAGENET, 6_998_552, 1_582_671_872, "1.583"),
        (GoogLeNet(batch_norm=True), IMAGENET, 6_624_904, 1_498_376_192, "1.498"),
        (InceptionV3(), (299, 299, 3), 23_834_568, 5_713_216_096, "5.713"),
        (CifarResNet(20), CIFAR, 269_722, cifar_resnet(20), "0.0406"),
        (CifarResNet(32), CIFAR, 464_154, cifar_resnet(32), "0.0689"),
        (CifarResNet(44), CIFAR, 658_586, cifar_resnet(44), "0.0972"),
        (CifarResNet(56), CIFAR, 853_018, cifar_resnet(56), "0.1255"),
        (CifarResNet(56, plain=True), CIFAR, 853_018, cifar_resnet(56), "0.1255"),
        (CifarResNet(110), CIFAR, 1_727_962, cifar_resnet(110), "0.2529"),
        (CifarResNet(1202, scan_blocks=True), CIFAR, 19_421_274, cifar_resnet(1202), "2.829"),
        (ResNet(18), IMAGENET, 11_689_512, 1_814_073_344, "1.814"),
        (ResNet(34), IMAGENET, 21_797_672, 3_663_761_408, "3.664"),
        (ResNet(34, plain=True, shortcut="A"), IMAGENET, 21_623_848, 3_644_493_824, "3.644"),
        (ResNet(50), IMAGENET, 25_557_032, 3_857_973_248, "3.858"),
        (ResNet(101), IMAGENET, 44_549_160, 7_570_194_432, "7.570"),
        (ResNet(152), IMAGENET, 60_192_808, 11_282_415_616, "11.282"),
        (ResNet(50, stride_placement="v1.5"), IMAGENET, 25_557_032, 4_089_184_256, "4.089"),
        (ResNet(101, stride_placement="v1.5"), IMAGENET, 44_549_160, 7_801_405_440, "7.801"),
        (ResNet(152, stride_placement="v1.5"), IMAGENET, 60_192_808, 11_513_626_624, "11.514"),
    ],
    ids=str,
)
def test_totals_are_those_of_the_tables(model, image_shape, parameters, multiply_adds, published):
    sums = costs.total(counted(model, image_shape))
    assert (sums.parameters, sums.multiply_adds) == (parameters, multiply_adds)
    decimals = len(published.partition(".")[2])
    assert f"{multiply_adds / 1e9:.{decimals}f}" == published


@pytest.mark.parametrize(
    ("model", "image_shape", "parameters"),
    [
        (GoogLeNet(), IMAGENET, 6_379_728),
        (GoogLeNet(batch_norm=True), IMAGENET, 6_379_984),
        (InceptionV3(), (299, 299, 3), 3_326_696),
        (AlexNet("lecture"), (227, 227, 3), 0),
    ],
    ids=str,
)
def test_side_branches_have_totals_of_their_own(model, image_shape, parameters):
    layers = counted(model, image_shape)
    assert costs.total(layers, side=True).parameters == parameters
    assert {layer.name.split("/")[0][:4] for layer in layers if layer.side} <= {"side"}
    assert layers == sorted(layers, key=lambda layer: layer.side)


def test_side_branches_do_not_change_what_the_trunk_costs():
    without = costs.count(GoogLeNet(side_branches=False), IMAGENET)
    assert without == [layer for layer in counted(GoogLeNet(), IMAGENET) if not layer.side]


@pytest.mark.parametrize("net", [CifarResNet, PreactCifarResNet])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_scanned_blocks_cost_what_unrolled_ones_do(net, blocks):
    depth = blocks * (6 if net is CifarResNet else 9) + 2
    scanned, unrolled = (costs.count(net(depth, scan_blocks=scan), CIFAR, 4) for scan in (True, False))
    assert costs.total(scanned) == costs.total(unrolled)
    assert len(scanned) < len(unrolled) or blocks <= 2
    assert sum(layer.repeats for layer in scanned) == len(unrolled)


def test_lenet_5_of_1998_costs_the_weights_of_its_connections():
    layers = counted(LeNet5Original(), (32, 32, 1))
    sums = costs.total(layers)
    assert sums.parameters == 60_000
    biases = {"c1": 28 * 28 * 6, "c3": 10 * 10 * 16, "c5": 120, "f6": 84}
    connections = {layer.name: layer.multiply_adds + biases.get(layer.name, 0) for layer in layers}
    assert connections == {"c1": 122_304, "s2": 0, "c3": 151_600, "s4": 0, "c5": 48_120, "f6": 10_164}
    assert [layer.output for layer in layers] == [
        (28, 28, 6),
        (14, 14, 6),
        (10, 10, 16),
        (5, 5, 16),
        (1, 1, 120),
        (84,),
    ]


def test_larger_images_cost_multiply_adds_and_no_parameters():
    small, large = (costs.total(counted(NIN("cifar"), (size, size, 3))) for size in (32, 64))
    assert small.parameters == large.parameters
    assert 4 * small.multiply_adds == large.multiply_adds


# Layers


def test_groups_divide_the_cost():
    (whole,) = alone(nn.Conv(8, (3, 3), padding=1), (6, 6, 4))
    (halves,) = alone(nn.Conv(8, (3, 3), padding=1, feature_group_count=2), (6, 6, 4))
    assert whole.multiply_adds == 2 * halves.multiply_adds == 6 * 6 * 9 * 4 * 8


def test_windows_that_are_not_square_are_told_apart():
    (layer,) = alone(nn.Conv(2, (1, 7), strides=(2, 1), padding=0), (9, 9, 3))
    assert (layer.kernel, layer.stride, layer.output) == ((1, 7), (2, 1), (5, 3, 2))
    assert layer.multiply_adds == 5 * 3 * 7 * 3 * 2


@pytest.mark.parametrize(
    ("layer", "multiply_adds"),
    [
        (nn.DenseGeneral((4, 2)), 6 * 6 * 4 * 8),
        (nn.DenseGeneral(5, axis=(-2, -1)), 6 * 6 * 4 * 5),
        (nn.DenseGeneral((5,), axis=(1, 2, 3)), 6 * 6 * 4 * 5),
        (nn.Dense(5), 6 * 6 * 4 * 5),
        (nn.ConvTranspose(8, (3, 3), (2, 2)), 6 * 6 * 9 * 4 * 8),
        (nn.ConvLocal(8, (3, 3), padding="VALID"), 4 * 4 * 9 * 4 * 8),
    ],
)
def test_other_linear_layers_cost_what_they_multiply(layer, multiply_adds):
    (found,) = alone(layer, (6, 6, 4))
    assert found.multiply_adds == multiply_adds
    assert found.kernel == ((3, 3) if "Conv" in type(layer).__name__ else ())


def test_attention_costs_its_projections():
    """Of 36 tokens of 4 features, whatever the number of heads."""
    tokens = nn.Sequential([lambda x: x.reshape(len(x), 36, 4), nn.MultiHeadDotProductAttention(2)])
    layers = alone(tokens, (6, 6, 4))
    assert len(layers) == 4
    for layer in layers:
        assert (layer.kind, layer.kernel, layer.multiply_adds) == ("dense", (), 36 * 4 * 4)


@pytest.mark.parametrize(
    "layer", [nn.Einsum((4, 5), "bhwc,cd->bhwd"), nn.DenseGeneral(5, axis=(-1,), batch_dims=(0, 1))]
)
def test_a_layer_whose_products_nobody_knows_is_refused(layer):
    with pytest.raises(
        ValueError, match=rf"^cannot count the multiply-adds of layer \({type(layer).__name__}\)"
    ):
        alone(layer, (6, 6, 4))


def test_a_window_of_one_side_is_its_length():
    (layer,) = alone(nn.Sequential([lambda x: x.reshape(len(x), 36, 4), nn.Conv(8, (3,))]), (6, 6, 4))
    assert (layer.kernel, layer.multiply_adds) == ((3,), 36 * 3 * 4 * 8)


class Position(nn.Module):
    """Takes nothing."""

    @nn.compact
    def __call__(self):
        return self.param("position", nn.initializers.zeros, (6, 6, 4))


class Split(nn.Module):
    """Takes two maps and gives two, and has a parameter."""

    @nn.compact
    def __call__(self, maps):
        scale = self.param("scale", nn.initializers.ones, ())
        return tuple(scale * one for one in maps)


class Rooted(nn.Module):
    """Has parameters itself, pools, and calls layers by keywords and without any argument."""

    @nn.compact
    def __call__(self, image, train):
        del train
        shift = self.param("shift", nn.initializers.zeros, (4,))
        first, second = Split(name="split")((image + shift, image + Position(name="position")()))
        return nn.max_pool(nn.Dense(5, name="dense")(inputs=first + second), (2, 2), (2, 2))


def test_a_layer_may_take_and_give_several_maps_and_be_called_by_keywords():
    position, split, dense, pool, root = costs.count(Rooted(), (6, 6, 4))
    assert (position.parameters, position.kept) == (6 * 6 * 4, 0)
    assert (pool.kind, pool.output) == ("max pool", (3, 3, 5))
    assert (split.output, split.forward, split.multiply_adds) == ((6, 6, 4), 4 * 4 * 6 * 6 * 4, 0)
    assert (dense.multiply_adds, dense.output) == (6 * 6 * 4 * 5, (6, 6, 5))
    assert (root.name, root.parameters, root.kind) == ("shift", 4, "Rooted")


def test_a_map_without_pixels_is_refused():
    conv = Conv(4, (3, 3), padding=1)
    with pytest.raises(ValueError, match="a feature map of 0x6 pixels is smaller than a window of 3x3"):
        alone(nn.Sequential([lambda x: x[:, 6:], conv]), (6, 6, 4))


def test_a_norm_and_a_pooling_cost_no_multiply_adds():
    norm, pool = alone(
        nn.Sequential(
            [BatchNorm(use_running_average=True, epsilon=1e-5), lambda x: nn.max_pool(x, (2, 2), (2, 2))]
        ),
        (6, 6, 4),
    )
    assert (norm.kind, norm.parameters, norm.multiply_adds) == ("batch norm", 8, 0)
    assert (pool.kind, pool.parameters, pool.multiply_adds, pool.output) == ("max pool", 0, 0, (3, 3, 4))


def test_pooling_is_flax_s_own_again_afterwards():
    before = nn.max_pool, nn.avg_pool
    with pytest.raises(ValueError, match="at least 16x16"):
        costs.count(LeNet5(), (8, 8, 1))
    costs.count(LeNet5(), (16, 16, 1))
    assert (nn.max_pool, nn.avg_pool) == before


class Pooled(nn.Module):
    """A layer of our own: a weight for each map, and a pooling on the way."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return x * self.param("coefficient", nn.initializers.ones, x.shape[-1:])


def test_a_layer_of_our_own_has_one_row():
    (layer,) = alone(Pooled(), (6, 6, 4))
    assert (layer.kind, layer.parameters, layer.output) == ("Pooled", 4, (3, 3, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        return nn.max_pool(x, (3, 3), (1, 1), padding=((1, 1), (1, 1)))


class Scanned(nn.Module):
    length: int
    shared: bool = False

    @nn.compact
    def __call__(self, x, train):
        del train
        axes = {"variable_broadcast": "params"} if self.shared else {"variable_axes": {"params": 0}}
        repeat = nn.scan(
            lambda block, x, _: (block(x), None),
            split_rngs={"params": not self.shared},
            length=self.length,
            **axes,
        )
        return repeat(Block(name="blocks"), x, None)[0]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_body_of_a_scan_counts_as_often_as_it_runs(length):
    conv, pool = costs.count(Scanned(length), (6, 6, 4))
    (once,) = alone(nn.Conv(4, (3, 3), padding=1), (6, 6, 4))
    assert (conv.name, conv.repeats, conv.output) == ("blocks/conv", length, (6, 6, 4))
    assert conv.parameters == length * once.parameters
    assert conv.multiply_adds == length * once.multiply_adds
    assert (conv.forward, conv.kept) == (once.forward, length * once.kept)
    assert (pool.kind, pool.repeats, pool.kept) == ("max pool", length, conv.kept)


def test_parameters_that_serve_several_times_are_refused():
    with pytest.raises(ValueError, match="blocks/conv runs several times with the same parameters"):
        costs.count(Scanned(3, shared=True), (6, 6, 4))


# Memory


def test_memory_is_that_of_the_batch_in_the_compute_type():
    layers = costs.count(LeNet5(dtype=jnp.bfloat16), (32, 32, 1), batch_size=3)
    conv1, pool1, conv2, *_ = layers
    assert conv1.forward == 3 * (4 * 32 * 32 + 2 * 28 * 28 * 6), "the image is float32"
    assert conv1.kept == 3 * 2 * 32 * 32, "in the type in which it computes"
    assert pool1.kept == 0, "an average needs none of its input again"
    assert conv2.kept == 3 * 2 * 14 * 14 * 6
    sums = costs.total(layers)
    assert sums.forward == max(layer.forward for layer in layers)
    assert sums.kept == sum(layer.kept for layer in layers)


def test_a_norm_keeps_its_input_in_float32():
    norm = batch_norm(train=False, epsilon=1e-3, dtype=jnp.bfloat16, axis_name=None)
    conv, norm = alone(ConvUnit(8, (3, 3), norm=norm, dtype=jnp.bfloat16), (6, 6, 4), batch_size=5)
    assert (conv.kind, conv.kept) == ("conv", 5 * 2 * 36 * 4)
    assert (norm.kind, norm.kept) == ("batch norm", 5 * 4 * 36 * 8)
    assert conv.forward == 5 * 36 * (4 * 4 + 2 * 8), "the image is float32"
    assert norm.forward == 5 * 36 * (2 * 8 + 2 * 8)


def test_an_input_of_several_branches_is_kept_once():
    layers = alone(InceptionModule(64, 96, 128, 16, 32, 32), (28, 28, 192), batch_size=2)
    pixels = 2 * 4 * 28 * 28
    # The input, the two reduced maps, and the pooled input.
    assert costs.total(layers).kept == pixels * (192 + 96 + 16 + 192)


@pytest.fixture
def layers_of_accelerators():
    """Those of a CPU multiply zeros, and keep patches of their input."""
    with fast.written_for("tpu"):
        yield


@pytest.mark.usefixtures("layers_of_accelerators")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("model", "image_shape"),
    [(LeNet5(), (32, 32, 1)), (CifarResNet(14), (16, 16, 3)), (NIN(), (16, 16, 3))],
    ids=str,
)
def test_what_counts_as_kept_is_among_what_autodiff_keeps(model, image_shape, dtype):
    """`jax.vjp` holds its residuals as the leaves of the function that it returns."""
    model = model.clone(dtype=dtype)

    def residuals(image):
        variables = model.init(jax.random.key(0), image, train=False)
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def apply(params):
            rngs = {"dropout": jax.random.key(0)}
            return model.apply({"params": params, **rest}, image, True, mutable=["batch_stats"], rngs=rngs)

        return jax.tree.leaves(jax.vjp(apply, params, has_aux=True)[1])

    image = jax.ShapeDtypeStruct((5, *image_shape), jnp.float32)
    there = collections.Counter(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(residuals, image))
    kept = [layer.kept for layer in costs.count(model, image_shape, batch_size=5) if layer.kept]
    assert not collections.Counter(kept) - there


# Against XLA's own count, which is of floating point operations: two for a multiply-add, and one and more for
# every bias, norm, activation and pooling.


def xla_flops(model, image_shape):
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)
    apply = jax.jit(functools.partial(model.apply, train=False))
    return apply.lower(variables, image).cost_analysis()["flops"]


@pytest.mark.usefixtures("layers_of_accelerators")
def test_xla_counts_the_same_where_nothing_is_padded():
    layers = counted(LeNet5(), (32, 32, 1))
    beside = xla_flops(LeNet5(), (32, 32, 1)) - 2 * costs.total(layers).multiply_adds
    # A bias and a ReLU each; 3 additions and a division for each value of a 2x2 pooling.
    weighted = sum(math.prod(layer.output) for layer in layers if layer.parameters)
    pooled = sum(math.prod(layer.output) for layer in layers if not layer.parameters)
    assert beside == pytest.approx(2 * weighted + 4 * pooled, rel=0.01)


@pytest.mark.usefixtures("layers_of_accelerators")
@pytest.mark.parametrize(
    ("model", "tolerance"),
    # Norms and additions, 6 operations a value, beside narrow convolutions of 16 channels; biases and ReLUs
    # beside wide ones.
    [(CifarResNet(8), 0.04), (NIN(), 0.01)],
    ids=str,
)
def test_xla_counts_the_same_but_for_products_with_padding(model, tolerance):
    inside = 0
    for layer in counted(model, CIFAR):
        if not layer.multiply_adds:
            continue
        share = 1
        for size, kernel, stride in zip(layer.output, layer.kernel, layer.stride, strict=False):
            taps = [out * stride - kernel // 2 + tap for out in range(size) for tap in range(kernel)]
            share *= sum(0 <= tap < size * stride for tap in taps) / len(taps)
        inside += layer.multiply_adds * share
    flops = xla_flops(model, CIFAR)
    assert 2 * inside < flops < 2 * inside * (1 + tolerance)


# The command


def run(capsys, *arguments):
    costs.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_command_prints_a_table_for_each_config_and_their_totals_side_by_side(capsys):
    text = run(capsys, "configs/lenet5_digits.py", "configs/resnet_digits.py", "--batch_size=2")
    parts = text.split("\n\n")
    assert parts[::2] == [
        "configs/lenet5_digits.py: lenet5, 2 images of 32x32x1",
        "configs/resnet_digits.py: resnet_cifar, 2 images of 8x8x1",
        "Side by side",
    ]
    head, lenet, resnet = parts[5].splitlines()
    assert head.split("  ")[0] == "config"
    assert lenet.split()[:4] == ["lenet5_digits", "32x32x1", "61,706", "416,520"]
    assert resnet.split()[:2] == ["resnet_digits", "8x8x1"]


def test_the_table_has_a_row_for_each_layer_and_shares_of_the_total(capsys):
    table = run(capsys, "configs/lenet5_digits.py", "--format=markdown").split("\n\n")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[3] == [
        "average_pool1",
        "average pool",
        "2x2",
        "2",
        "14x14x6",
        "0",
        "",
        "0",
        "",
        "0.022",
        "0.000",
    ]
    assert rows[6][:9] == ["dense1", "dense", "", "", "120", "48,120", "78.0%", "48,000", "11.5%"]
    assert rows[-1][0] == "total"


def test_csv_and_json_hold_exact_numbers(capsys):
    options = "configs/lenet5_digits.py", "--set=data.image_size=40"
    rows = list(csv.DictReader(io.StringIO(run(capsys, *options, "--format=csv"))))
    (report,) = json.loads(run(capsys, *options, "--format=json"))
    layers = counted(LeNet5(), (40, 40, 1))
    assert report["image_shape"] == [40, 40, 1]
    assert report["total"]["parameters"] == costs.total(layers).parameters
    for row, entry, layer in zip(rows, report["layers"], layers, strict=True):
        assert (row["config"], row["name"], row["output"]) == (
            options[0],
            layer.name,
            "x".join(map(str, layer.output)),
        )
        assert entry["multiply_adds"] == int(row["multiply_adds"]) == layer.multiply_adds


def write_config(path, *lines):
    body = "\n    ".join(("config = common.get_config()", *lines, "return config"))
    path.write_text(f"from configs import common\n\n\ndef get_config():\n    {body}\n")
    return path


def test_side_branches_have_a_subtotal(tmp_path, capsys):
    config = write_config(
        tmp_path / "c.py", "config.model.name = 'googlenet'", "config.data.name = 'imagenet2012'"
    )
    lines = run(capsys, config, "--image_shape=224x224x3").splitlines()
    assert lines[-2].startswith("total, without side branches")
    assert "6,998,552" in lines[-2]
    assert lines[-1].startswith("side branches")
    assert "6,379,728" in lines[-1]
    (report,) = json.loads(run(capsys, config, "--set=data.image_size=224", "--format=json"))
    assert report["side_branches"]["parameters"] == 6_379_728


def test_stages_are_the_layers_with_maps_of_one_size():
    parts = costs.stages(counted(GoogLeNet(), IMAGENET))
    assert list(parts) == ["112x112", "56x56", "28x28", "14x14", "7x7", "1x1", "side branches"]
    assert parts["28x28"].parameters == 163_696 + 388_736
    assert parts["1x1"].parameters == 1_025_000
    assert list(costs.stages(counted(LeNet5(), (32, 32, 1)))) == ["28x28", "10x10", "1x1"]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_figure_is_drawn(form, tmp_path, capsys):
    path = tmp_path / f"costs.{form}"
    run(capsys, "configs/lenet5_digits.py", "configs/resnet_digits.py", f"--figure={path}")
    assert path.stat().st_size > 1000


def test_the_figure_shows_each_stage_of_each_config():
    reports = [costs.analyse(f"configs/{name}.py") for name in ("lenet5_digits", "resnet_digits")]
    axes = costs.draw(reports).axes
    assert [bar.get_width() for bar in axes[0].patches] == [117_600, 240_000, 58_920]
    assert [text.get_text() for text in axes[1].texts] == ["156", "2.42 k", "59.1 k"]
    assert [label.get_text() for label in axes[2].get_yticklabels()] == ["8x8", "4x4", "2x2", "1x1"]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ((), ["--set=data.image_size=8"], "LeNet-5 needs images of at least 16x16"),
        (("config.model.name = 'lenet'",), [], "model.name = 'lenet' is unknown"),
        (
            ("config.model.depth = 20",),
            [],
            "model.depth = 20: lenet5 has no such setting; its settings are: ",
        ),
        (
            ("config.data.name = 'own'",),
            [],
            "'own' .*--image_shape=HEIGHTxWIDTHxCHANNELS and --num_classes=N",
        ),
        (("config.data.name = 'own'",), ["--image_shape=32x32x3"], "'own' .*--num_classes=N"),
        (("config.data.name = 'imagenet2012'",), [], "'imagenet2012' .*--image_shape"),
        (("config = config.data",), [], "is not a training config: it has no model, only "),
        (("raise RuntimeError('oh')",), [], "cannot be read as a config: RuntimeError: oh"),
    ],
)
def test_a_config_that_cannot_be_counted_is_answered_by_one_message(
    lines, options, message, tmp_path, capsys
):
    path = write_config(tmp_path / "c.py", *lines)
    with pytest.raises(SystemExit) as stop:
        costs.main([str(path), *options])
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.match(f"error: {path}.*{message}", errors), errors
    assert errors.count("\n") == 1


def test_an_output_that_cannot_be_written_is_answered_by_one_message():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-u", "-m", "cnn_cases.analysis.costs", "configs/lenet5_digits.py"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_shape=32x32"], "'32x32' is not HEIGHTxWIDTHxCHANNELS"),
        (["--batch_size=0"], "'0' is not a positive integer"),
        (["--figure=costs.txt"], "'costs.txt' must end in .png or .svg"),
        (["--format=html"], "invalid choice: 'html'"),
        (["--set", "model.depth"], "'model.depth' is not KEY=VALUE"),
        (["--set", "model.depht=56"], "py: model.depht = 56: there is no such key; known: model.name\n"),
        (["--set", "num_step=5"], "py: num_step = 5: there is no such key; did you mean num_steps?"),
        (["--set", "num_steps=many"], "num_steps = 'many': it must be an int (of 64 bits), as 400 is"),
        (["--set", "num_steps={[]: 1}"], "num_steps = '{[]: 1}': it must be an int"),
        (["--set", f"num_steps={'(' * 300}"], "it must be an int"),
        (["--set", "model=5"], "model = 5: there is no such key; known: model.name\n"),
        (["--set=model.name=a", "--set=model.name=b"], "--set model.name is given more than once"),
        (["--set", "lr=1"], "lr = 1: there is no such key; configs/common.py lists the keys"),
        (["--figure=no/such/place.png"], "No such file or directory"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        costs.main(["configs/lenet5_digits.py", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_runs_as_the_manual_says():
    command = [sys.executable, "-m", "cnn_cases.analysis.costs", "configs/lenet5_digits.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "61,706" in done.stdout.splitlines()[-1]


def test_keys_and_choices_can_be_set(tmp_path, capsys):
    options = ("--set=model.depth=56", "--set=dtype=bfloat16", "--format=json")
    (deep,) = json.loads(run(capsys, "configs/resnet_digits.py", *options))
    (report,) = json.loads(run(capsys, "configs/resnet_digits.py", "--format=json"))
    blocks = 6 * (16**2 + 32**2 + 64**2) * 2 * 9 + 6 * 4 * (16 + 32 + 64)  # six more in each stage
    assert deep["total"]["parameters"] - report["total"]["parameters"] == blocks
    assert 2 * deep["layers"][2]["forward"] == report["layers"][2]["forward"], "two bytes for four"
    path = tmp_path / "c.py"
    path.write_text(
        "from configs import common\n\n\ndef get_config(name='lenet5'):\n"
        "    config = common.get_config()\n    config.model.name = name\n    return config\n"
    )
    (report,) = json.loads(run(capsys, f"{path}:alexnet", "--image_shape=227x227x3", "--format=json"))
    assert report["model"] == "alexnet"


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"configs/nope.py cannot be read as a config: FileNotFoundError"):
        costs.analyse("configs/nope.py")


@pytest.mark.parametrize("name", costs.DATA_SETS)
def test_the_data_sets_are_as_tfds_describes_them(name, tmp_path):
    features = sources.make_builder(name, str(tmp_path)).info.features
    assert costs.DATA_SETS[name] == (features["image"].shape, features["label"].num_classes)


def test_a_config_s_own_image_size_counts_before_its_data_set_s(tmp_path):
    config = write_config(tmp_path / "c.py", "config.data.name = 'cifar100'", "config.data.image_size = 48")
    report = costs.analyse(str(config))
    assert report.image_shape == (48, 48, 3)
    assert report.layers[-1].output == (100,)
    model = make_model("lenet5", num_classes=100, dtype="float32")
    assert report.layers == costs.count(model, (48, 48, 3))


def test_a_number_of_classes_that_is_given_counts_before_the_data_set_s():
    assert costs.analyse("configs/lenet5_digits.py", num_classes=7).layers[-1].output == (7,)


def test_a_version_in_a_data_set_s_name_is_no_other_data_set(tmp_path):
    config = write_config(tmp_path / "c.py", "config.data.name = 'cifar100:3.0.2'")
    assert costs.analyse(str(config)).image_shape == (32, 32, 3)


def test_the_border_of_the_data_counts():
    for name, parameters in (("lenet5_mnist", 61_706), ("lenet5_1998_mnist", 60_000)):
        report = costs.analyse(f"configs/{name}.py")
        assert report.image_shape == (32, 32, 1)
        assert costs.total(report.layers).parameters == parameters


def test_a_short_number_has_three_digits_whatever_it_rounds_to():
    assert [costs._short(number) for number in (850, 61_706, 999_600, 15_470_264_320)] == [
        "850",
        "61.7 k",
        "1.00 M",
        "15.5 G",
    ]


def test_the_comparison_has_the_memory_in_the_order_of_its_head(capsys):
    text = run(capsys, "configs/lenet5_digits.py", "configs/resnet_digits.py", "--batch_size=2")
    sums = costs.total(costs.count(LeNet5(), (32, 32, 1), batch_size=2))
    assert sums.forward != sums.kept
    row = text.split("\n\n")[5].splitlines()[1].split()
    assert row[4:] == [f"{sums.forward / 2**20:.3f}", f"{sums.kept / 2**20:.3f}"]
