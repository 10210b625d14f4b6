"""The networks of this project in plain PyTorch, layer for layer, for the benchmarks to compare with.

Inputs and outputs are as in PyTorch's own networks: image [B, C, H, W] -> logits [B, num_classes]. A net with
side branches (auxiliary classifiers) returns a tuple (logits, *side_logits) in training mode. PyTorch draws
the initial values. `benchmarks.throughput` checks that the numbers of parameters and multiply-adds equal
ours, and tests/test_peers.py that logits and gradients do. Functions import our tables only when they need
them, so that a process that only trains a peer imports no JAX.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional


class Mean(nn.Module):
    """The mean of each feature map."""

    def forward(self, x):
        """[B, C, H, W] -> [B, C]."""
        return x.mean(dim=(2, 3))


def halving_max_pool(window=3):
    """`layers.halving_max_pool`."""
    return nn.MaxPool2d(window, 2, ceil_mode=True)


def conv_relu(channels, filters, size, stride=1, padding=0, groups=1):
    """A convolution with biases and a ReLU, as a list."""
    return [nn.Conv2d(channels, filters, size, stride, padding, groups=groups), nn.ReLU(inplace=True)]


def lenet5(channels, image_size):
    """`lenet.LeNet5`."""
    side = ((image_size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *conv_relu(channels, 6, 5),
        nn.AvgPool2d(2),
        *conv_relu(6, 16, 5),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        nn.ReLU(inplace=True),
        nn.Linear(120, 84),
        nn.ReLU(inplace=True),
        nn.Linear(84, 10),
    )


def alexnet_two_groups(num_classes=1000):
    """`alexnet.AlexNet` as in the paper, for 227x227 pixels; PyTorch's alpha is five times the paper's."""
    from cnn_cases.models import alexnet

    variant = alexnet.VARIANTS["two_groups"]
    filters, groups = variant.filters, variant.groups

    def norm():
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    return nn.Sequential(
        *conv_relu(3, filters[0], 11, 4, variant.padding, groups[0]),
        norm(),
        nn.MaxPool2d(3, 2),
        *conv_relu(filters[0], filters[1], 5, 1, 2, groups[1]),
        norm(),
        nn.MaxPool2d(3, 2),
        *conv_relu(filters[1], filters[2], 3, 1, 1, groups[2]),
        *conv_relu(filters[2], filters[3], 3, 1, 1, groups[3]),
        *conv_relu(filters[3], filters[4], 3, 1, 1, groups[4]),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(filters[4] * 36, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, num_classes),
    )


def vgg_net(variant="D", num_classes=1000):
    """`vgg.VGG` without batch normalisation, for 224x224 pixels."""
    from cnn_cases.models import vgg

    layers, channels = [], 3
    for filters, sizes in zip(vgg.FILTERS, vgg.VARIANTS[variant], strict=True):
        for size in sizes:
            layers += conv_relu(channels, filters, size, padding=size // 2)
            channels = filters
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    layers += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4096, num_classes)]
    return nn.Sequential(*layers)


def nin_net(variant="cifar", num_classes=10):
    """`nin.NIN`."""
    from cnn_cases.models import nin

    layers, channels = [], 3
    for number, stage in enumerate(nin.VARIANTS[variant]):
        if number:
            layers.append(halving_max_pool())
        if stage.dropout:
            layers.append(nn.Dropout(0.5))
        first, second, third = stage.filters if len(stage.filters) == 3 else (*stage.filters, num_classes)
        layers += conv_relu(channels, first, stage.kernel_size, stage.stride, stage.padding)
        layers += [*conv_relu(first, second, 1), *conv_relu(second, third, 1)]
        channels = third
    return nn.Sequential(*layers, Mean())


class Residual(nn.Module):
    """A block of `resnet`: its branch, the shortcut unless it is plain, and a ReLU."""

    def __init__(self, branch, shortcut):
        """`shortcut` is None in a plain net."""
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x):
        """[B, C, H, W] -> [B, C', H', W']."""
        y = self.branch(x)
        return functional.relu(y if self.shortcut is None else y + self.shortcut(x))


class Subsample(nn.Module):
    """`resnet.identity_shortcut`."""

    def __init__(self, filters, stride):
        """The output has `filters` channels; the added ones are zero."""
        super().__init__()
        self.filters, self.stride = filters, stride

    def forward(self, x):
        """[B, C, H, W] -> [B, filters, H', W']."""
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, self.filters - x.shape[1]))


def conv_norm(channels, filters, size, stride=1):
    """A convolution without biases and a batch normalisation, as a list."""
    conv = nn.Conv2d(channels, filters, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(filters)]


def residual_block(channels, filters, stride, *, bottleneck, shortcut, plain):
    """A block with `filters` channels inside, and its number of output channels: (block, channels)."""
    wide = 4 * filters if bottleneck else filters
    if bottleneck:
        branch = [*conv_norm(channels, filters, 1), nn.ReLU(inplace=True)]
        branch += [*conv_norm(filters, filters, 3, stride), nn.ReLU(inplace=True)]
        branch += conv_norm(filters, wide, 1)
    else:
        branch = [
            *conv_norm(channels, filters, 3, stride),
            nn.ReLU(inplace=True),
            *conv_norm(filters, wide, 3),
        ]
    if plain:
        side = None
    elif stride == 1 and channels == wide:
        side = nn.Identity()
    elif shortcut == "A":
        side = Subsample(wide, stride)
    else:
        side = nn.Sequential(*conv_norm(channels, wide, 1, stride))
    return Residual(nn.Sequential(*branch), side), wide


def resnet_net(depth, *, plain=False, num_classes=1000):
    """`resnet.ResNet` with shortcut B and stride placement "v1.5", or plain."""
    from cnn_cases.models import resnet

    block_type, sizes = resnet.IMAGENET_DEPTHS[depth]
    bottleneck = block_type is resnet.BottleneckBlock
    layers = [*conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(sizes):
        for number in range(count):
            stride = 2 if stage and not number else 1
            options = dict(bottleneck=bottleneck, shortcut="B", plain=plain)
            block, channels = residual_block(channels, 64 * 2**stage, stride, **options)
            layers.append(block)
    return nn.Sequential(*layers, Mean(), nn.Linear(channels, num_classes))


def cifar_resnet(depth, *, channels=3, plain=False, num_classes=10):
    """`resnet.CifarResNet` with shortcut A, or plain."""
    layers = [*conv_norm(channels, 16, 3), nn.ReLU(inplace=True)]
    channels = 16
    for stage, number in itertools.product(range(3), range((depth - 2) // 6)):
        stride = 2 if stage and not number else 1
        options = dict(bottleneck=False, shortcut="A", plain=plain)
        block, channels = residual_block(channels, 16 * 2**stage, stride, **options)
        layers.append(block)
    return nn.Sequential(*layers, Mean(), nn.Linear(64, num_classes))


class Branches(nn.Module):
    """Layers side by side on one input; their outputs are concatenated."""

    def __init__(self, *branches):
        """Each branch is a list of layers, applied one after another."""
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)

    def forward(self, x):
        """[B, C, H, W] -> [B, sum of the branches' channels, H', W']."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SideBranched(nn.Module):
    """A trunk in parts; in training, each part except the last is followed by a side branch with logits."""

    def __init__(self, parts, sides):
        """One side branch fewer than parts."""
        super().__init__()
        self.parts, self.sides = nn.ModuleList(parts), nn.ModuleList(sides)

    def forward(self, x):
        """Image -> logits, or in training (logits, *side_logits)."""
        side_logits = []
        for part, side in itertools.zip_longest(self.parts, self.sides):
            x = part(x)
            if side is not None and self.training:
                side_logits.append(side(x))
        return (x, *side_logits) if self.training else x


def googlenet(num_classes=1000):
    """`inception.GoogLeNet` as published, with side branches, for 224x224 pixels."""
    from cnn_cases.models import inception

    def norm():
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def module(channels, one, reduce3, three, reduce5, five, pool):
        return Branches(
            conv_relu(channels, one, 1),
            [*conv_relu(channels, reduce3, 1), *conv_relu(reduce3, three, 3, padding=1)],
            [*conv_relu(channels, reduce5, 1), *conv_relu(reduce5, five, 5, padding=2)],
            [nn.MaxPool2d(3, 1, 1), *conv_relu(channels, pool, 1)],
        )

    def side(channels):
        layers = [nn.AvgPool2d(5, 3), *conv_relu(channels, 128, 1), nn.Flatten()]
        layers += [nn.Linear(128 * 16, 1024), nn.ReLU(inplace=True), nn.Dropout(0.7)]
        return nn.Sequential(*layers, nn.Linear(1024, num_classes))

    layers = [*conv_relu(3, 64, 7, 2, 3), halving_max_pool(), norm(), *conv_relu(64, 64, 1)]
    layers += [*conv_relu(64, 192, 3, padding=1), norm(), halving_max_pool()]
    parts, sides, channels = [], [], 192
    for name, (one, reduce3, three, reduce5, five, pool) in inception.TABLE_1.items():
        if name in ("4a", "5a"):
            layers.append(halving_max_pool())
        layers.append(module(channels, one, reduce3, three, reduce5, five, pool))
        channels = one + three + five + pool
        if name in inception.SIDE_BRANCHES:
            parts.append(nn.Sequential(*layers))
            sides.append(side(channels))
            layers = []
    parts.append(nn.Sequential(*layers, Mean(), nn.Dropout(0.4), nn.Linear(channels, num_classes)))
    return SideBranched(parts, sides)


def inception_v3_net(num_classes=1000):
    """`inception_v3.InceptionV3` with its side branch, for 299x299 pixels."""
    from cnn_cases.models import inception_v3

    def unit(channels, filters, window, stride=1, padding=None):
        padding = tuple(size // 2 for size in window) if padding is None else padding
        conv = nn.Conv2d(channels, filters, window, stride, padding, bias=False)
        return [conv, nn.BatchNorm2d(filters, eps=1e-3), nn.ReLU(inplace=True)]

    def units(channels, *rows):
        layers = []
        for filters, window, *rest in rows:
            layers += unit(channels, filters, window, *rest)
            channels = filters
        return layers

    average = nn.AvgPool2d(3, 1, 1)
    end = (2, (0, 0))  # stride 2 without padding

    def figure_5(channels, pool):
        return Branches(
            units(channels, (64, (1, 1))),
            units(channels, (48, (1, 1)), (64, (5, 5))),
            units(channels, (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            [average, *units(channels, (pool, (1, 1)))],
        )

    def figure_6(filters):
        double = [(filters, (1, 1)), (filters, (7, 1)), (filters, (1, 7)), (filters, (7, 1)), (192, (1, 7))]
        return Branches(
            units(768, (192, (1, 1))),
            units(768, (filters, (1, 1)), (filters, (1, 7)), (192, (7, 1))),
            units(768, *double),
            [average, *units(768, (192, (1, 1)))],
        )

    def figure_7(channels):
        def cross():
            return Branches(unit(384, 384, (1, 3)), unit(384, 384, (3, 1)))

        return Branches(
            units(channels, (320, (1, 1))),
            [*units(channels, (384, (1, 1))), cross()],
            [*units(channels, (448, (1, 1)), (384, (3, 3))), cross()],
            [average, *units(channels, (192, (1, 1)))],
        )

    layers = units(3, (32, (3, 3), *end), (32, (3, 3), 1, (0, 0)), (64, (3, 3)))
    layers += [nn.MaxPool2d(3, 2), *units(64, (80, (1, 1)), (192, (3, 3), 1, (0, 0))), nn.MaxPool2d(3, 2)]
    channels = 192
    for pool in inception_v3.FIGURE_5.values():
        layers.append(figure_5(channels, pool))
        channels = 224 + pool
    layers.append(
        Branches(
            units(channels, (384, (3, 3), *end)),
            units(channels, (64, (1, 1)), (96, (3, 3)), (96, (3, 3), *end)),
            [nn.MaxPool2d(3, 2)],
        )
    )
    layers += [figure_6(filters) for filters in inception_v3.FIGURE_6.values()]
    side = [nn.AvgPool2d(5, 3), *units(768, (128, (1, 1)), (768, (5, 5), 1, (0, 0))), Mean()]
    last = [
        Branches(
            units(768, (192, (1, 1)), (320, (3, 3), *end)),
            units(768, (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), *end)),
            [nn.MaxPool2d(3, 2)],
        ),
        figure_7(1280),
        figure_7(2048),
    ]
    trunk = nn.Sequential(*last, Mean(), nn.Dropout(0.2), nn.Linear(2048, num_classes))
    return SideBranched([nn.Sequential(*layers), trunk], [nn.Sequential(*side, nn.Linear(768, num_classes))])
