"""Inception-v3: large convolutions factorised into smaller ones.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer vision", 2015,
in the form of its public weights:

    layer                          output         parameters
    image                          299x299x3
    conv 3x3, stride 2             149x149x32            928
    conv 3x3                       147x147x32          9,280
    conv 3x3, padded               147x147x64         18,560
    max pool 3x3, stride 2         73x73x64
    conv 1x1                       73x73x80            5,280
    conv 3x3                       71x71x192         138,624
    max pool 3x3, stride 2         35x35x192
    inception 5b        figure 5   35x35x256         255,904
    inception 5c        figure 5   35x35x288         277,472
    inception 5d        figure 5   35x35x288         285,152
    inception 6a        figure 10  17x17x768       1,153,280
    inception 6b        figure 6   17x17x768       1,297,408
    inception 6c, 6d    figure 6   17x17x768       1,691,008 each
    inception 6e        figure 6   17x17x768       2,141,952    side branch: 3,326,696
    inception 7a                   8x8x1280        1,698,304
    inception 7b        figure 7   8x8x2048        5,044,608
    inception 7c        figure 7   8x8x2048        6,076,800
    average pool, dropout 0.2      2048
    dense                          1000            2,049,000    23,834,568 in all, 27,161,264 with side branch

Batch normalisation and ReLU follow every convolution. Only the layer marked "padded", and those layers inside
a module that keep the map's size, have padding. The side branch (auxiliary classifier, figure 8) takes the
output of 6e, in training only: average pool 5x5 with stride 3 (5x5), conv 1x1 with 128 filters, conv 5x5 with
768 (1x1), dense.

Departures from the paper, all made by the authors' code and kept in the public weights:
- table 1 has conv 3x3 with 80 filters, conv 3x3 with 192 and stride 2, conv 3x3 with 288, where the weights
  have conv 1x1, conv 3x3, max pool;
- the modules of figure 5 have a 5x5 convolution where the figure has a 3x3;
- module 6a has no 1x1 convolution before its single 3x3 (figure 10, as recalled, has one);
- the 5x5 convolution of the side branch has 768 filters (figure 8, as recalled, has 1,024);
- the modules of figure 5 have 256, 288 and 288 filters in all, where table 1 has 288 throughout;
- there are four modules of figure 6, where section 6 has five after the reduction.

The numbers of filters inside the modules follow the public weights too: the paper leaves them to a file that
accompanies its source, which was not consulted.

Where the paper is silent: weights are drawn from He et al.'s normal distribution (truncated at two standard
deviations); batch normalisation has the public epsilon of 1e-3, and each step keeps 0.9 of its running
statistics; dropout before the logits has rate 0.2, as in the authors' training code (0.5 in torchvision); the
average pools inside the modules count padding as zeros, as in torchvision (the authors' code leaves it out of
the average). The last average pool is over the whole map (8x8 at 299 pixels), so that other image sizes work.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases.models.fast import avg_pool, max_pool
from cnn_cases.models.layers import ConvUnit, Dense, Dropout, batch_norm, check_image_size

# Filters of the pool projection in the modules of figure 5, and `filters` of the modules of figure 6.
FIGURE_5 = {"5b": 32, "5c": 64, "5d": 64}
FIGURE_6 = {"6b": 128, "6c": 160, "6d": 160, "6e": 192}
FIGURE_7 = ("7b", "7c")


def avg_pool_same(x):
    """3x3 average pooling with stride 1; padding counts as zeros. [B, H, W, C] -> [B, H, W, C]."""
    return avg_pool(x, (3, 3), (1, 1), padding=((1, 1), (1, 1)))


class Figure5Module(nn.Module):
    """For the 35x35 maps: 1x1; 5x5; two 3x3 in sequence; average pool and 1x1.

    Attributes:
      filters_pool: output channels of the pool projection.
      unit: `ConvUnit` with the network's settings.
    """

    filters_pool: int
    unit: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, 224 + filters_pool]."""
        one = self.unit(64, (1, 1), name="conv_1x1")(x)

        five = self.unit(48, (1, 1), name="reduce_5x5")(x)
        five = self.unit(64, (5, 5), name="conv_5x5")(five)

        double = self.unit(64, (1, 1), name="reduce_double")(x)
        double = self.unit(96, (3, 3), name="double1_3x3")(double)
        double = self.unit(96, (3, 3), name="double2_3x3")(double)

        pool = self.unit(self.filters_pool, (1, 1), name="project_pool")(avg_pool_same(x))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class Figure10Module(nn.Module):
    """From 35x35 to 17x17 maps: convolutions and a max pool, with stride 2, side by side.

    Attributes:
      unit: `ConvUnit` with the network's settings.
    """

    unit: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, (H - 1) // 2, (W - 1) // 2, 480 + C]."""
        three = self.unit(384, (3, 3), 2, (0, 0), name="conv_3x3")(x)

        double = self.unit(64, (1, 1), name="reduce_double")(x)
        double = self.unit(96, (3, 3), name="double1_3x3")(double)
        double = self.unit(96, (3, 3), 2, (0, 0), name="double2_3x3")(double)

        return jnp.concatenate([three, double, max_pool(x, (3, 3), (2, 2))], axis=-1)


class Figure6Module(nn.Module):
    """For the 17x17 maps: 7x7 convolutions factorised into 1x7 and 7x1, once and twice.

    Attributes:
      filters: channels between the 1x7 and 7x1 convolutions.
      unit: `ConvUnit` with the network's settings.
    """

    filters: int
    unit: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, 768]."""
        one = self.unit(192, (1, 1), name="conv_1x1")(x)

        seven = self.unit(self.filters, (1, 1), name="reduce_7x7")(x)
        seven = self.unit(self.filters, (1, 7), name="conv_1x7")(seven)
        seven = self.unit(192, (7, 1), name="conv_7x1")(seven)

        double = self.unit(self.filters, (1, 1), name="reduce_double")(x)
        double = self.unit(self.filters, (7, 1), name="double1_7x1")(double)
        double = self.unit(self.filters, (1, 7), name="double1_1x7")(double)
        double = self.unit(self.filters, (7, 1), name="double2_7x1")(double)
        double = self.unit(192, (1, 7), name="double2_1x7")(double)

        pool = self.unit(192, (1, 1), name="project_pool")(avg_pool_same(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class SecondReduction(nn.Module):
    """From 17x17 to 8x8 maps: like figure 10, with 1x7 and 7x1 before one of the strided convolutions.

    Attributes:
      unit: `ConvUnit` with the network's settings.
    """

    unit: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, (H - 1) // 2, (W - 1) // 2, 512 + C]."""
        three = self.unit(192, (1, 1), name="reduce_3x3")(x)
        three = self.unit(320, (3, 3), 2, (0, 0), name="conv_3x3")(three)

        seven = self.unit(192, (1, 1), name="reduce_7x7")(x)
        seven = self.unit(192, (1, 7), name="conv_1x7")(seven)
        seven = self.unit(192, (7, 1), name="conv_7x1")(seven)
        seven = self.unit(192, (3, 3), 2, (0, 0), name="conv_3x3_after_7x7")(seven)

        return jnp.concatenate([three, seven, max_pool(x, (3, 3), (2, 2))], axis=-1)


class Figure7Module(nn.Module):
    """For the 8x8 maps: 3x3 convolutions split into 1x3 and 3x1 side by side, which widens the module.

    Attributes:
      unit: `ConvUnit` with the network's settings.
    """

    unit: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, 2048]."""
        one = self.unit(320, (1, 1), name="conv_1x1")(x)

        three = self.unit(384, (1, 1), name="reduce_3x3")(x)
        row = self.unit(384, (1, 3), name="conv_1x3")(three)
        column = self.unit(384, (3, 1), name="conv_3x1")(three)

        double = self.unit(448, (1, 1), name="reduce_double")(x)
        double = self.unit(384, (3, 3), name="double1_3x3")(double)
        double_row = self.unit(384, (1, 3), name="double2_1x3")(double)
        double_column = self.unit(384, (3, 1), name="double2_3x1")(double)

        pool = self.unit(192, (1, 1), name="project_pool")(avg_pool_same(x))
        return jnp.concatenate([one, row, column, double_row, double_column, pool], axis=-1)


class SideBranch(nn.Module):
    """An auxiliary classifier on the last 17x17 maps, used in training only (figure 8).

    Attributes:
      unit, dense: `ConvUnit` and `Dense` with the network's settings.
      num_classes: length of the logits.
    """

    unit: Any
    dense: Any
    num_classes: int

    @nn.compact
    def __call__(self, x):
        """[B, H, W, 768] -> logits [B, num_classes]."""
        x = avg_pool(x, (5, 5), (3, 3))
        x = self.unit(128, (1, 1), name="conv1")(x)
        x = self.unit(768, (5, 5), padding=(0, 0), name="conv2")(x)
        return self.dense(self.num_classes, name="logits")(x.mean(axis=(1, 2)))


class InceptionV3(nn.Module):
    """Inception-v3.

    Attributes:
      side_branches: in training, also return the logits of the side branch.
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which the batch is split, None if it is not.
    """

    side_branches: bool = True
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        In training with the side branch, returns a pair: the net's own logits and the side branch's.

        Raises:
          ValueError: the image is smaller than 75x75, or than 299x299 if the side branch runs.
        """
        # Initialisation has to create the side branch's parameters, although it is not a training call.
        run_side = self.side_branches and (train or self.is_initializing())
        check_image_size("Inception-v3", x, 75)
        if run_side:
            check_image_size("Inception-v3 with its side branch (model.side_branches)", x, 299)
        norm = batch_norm(train=train, epsilon=1e-3, dtype=self.dtype, axis_name=self.axis_name)
        unit = functools.partial(ConvUnit, norm=norm, dtype=self.dtype)
        dense = functools.partial(Dense, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)

        x = unit(32, (3, 3), 2, (0, 0), name="conv1a")(x)
        x = unit(32, (3, 3), 1, (0, 0), name="conv2a")(x)
        x = unit(64, (3, 3), name="conv2b")(x)
        x = max_pool(x, (3, 3), (2, 2))
        x = unit(80, (1, 1), name="conv3b")(x)
        x = unit(192, (3, 3), 1, (0, 0), name="conv4a")(x)
        x = max_pool(x, (3, 3), (2, 2))
        for module, filters_pool in FIGURE_5.items():
            x = Figure5Module(filters_pool, unit, name=f"inception_{module}")(x)
        x = Figure10Module(unit, name="inception_6a")(x)
        for module, filters in FIGURE_6.items():
            x = Figure6Module(filters, unit, name=f"inception_{module}")(x)
        side_logits = SideBranch(unit, dense, self.num_classes, name="side")(x) if run_side else None
        x = SecondReduction(unit, name="inception_7a")(x)
        for module in FIGURE_7:
            x = Figure7Module(unit, name=f"inception_{module}")(x)
        x = x.mean(axis=(1, 2))
        x = Dropout(0.2, self.axis_name, name="dropout")(x, train)
        logits = dense(self.num_classes, name="logits")(x)
        return (logits, side_logits) if train and self.side_branches else logits
