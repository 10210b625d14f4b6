"""The Inception module, naive and with 1x1 reductions, and GoogLeNet, which has nine of the latter.

Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich, "Going deeper with convolutions",
2014, table 1 (the filters inside the modules are in TABLE_1 below):

    layer                      output         parameters
    image                      224x224x3
    conv 7x7, stride 2         112x112x64          9,472
    max pool 3x3, stride 2     56x56x64                     then local response normalisation
    conv 1x1                   56x56x64            4,160
    conv 3x3                   56x56x192         110,784    then local response normalisation
    max pool 3x3, stride 2     28x28x192
    inception 3a               28x28x256         163,696
    inception 3b               28x28x480         388,736
    max pool 3x3, stride 2     14x14x480
    inception 4a               14x14x512         376,176    side branch 1: 3,188,840
    inception 4b               14x14x512         449,160
    inception 4c               14x14x512         510,104
    inception 4d               14x14x528         605,376    side branch 2: 3,190,888
    inception 4e               14x14x832         868,352
    max pool 3x3, stride 2     7x7x832
    inception 5a               7x7x832         1,043,456
    inception 5b               7x7x1024        1,444,080
    average pool, dropout 0.4  1024
    dense                      1000            1,025,000    6,998,552 in all, 13,378,280 with side branches

Two side branches (the paper's auxiliary classifiers, section 5) take the outputs of 4a and 4d, in training
only: average pool 5x5 with stride 3 (4x4), conv 1x1 with 128 filters, dense 1024, dropout 0.7, dense. Their
losses are added with weight 0.3.

`batch_norm=True` is the form of the public weights (torchvision): batch normalisation replaces the biases of
convolutions and local response normalisation, kernels are 3x3 where the table says 5x5 (an old slip that the
weights have kept), and the last max pool has a 2x2 window. It has 6,624,904 parameters, 13,004,888 with side
branches. It does not follow torchvision's dropout of 0.2 before the logits, nor its side branches' pooling to
4x4 from any size: these change nothing at evaluation.

Departures from the paper: the last average pool is over the whole map (7x7 at 224 pixels), so that other
image sizes work. Local response normalisation is where figure 3 has it. Where the paper is silent: the
constants of local response normalisation are AlexNet's; weights are drawn from He et al.'s normal
distribution (truncated at two standard deviations), and biases are initialised to zero; batch normalisation
has torchvision's epsilon of 1e-3, and each step keeps 0.9 of its running statistics.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases.models.fast import avg_pool, max_pool, relu
from cnn_cases.models.layers import (
    ConvUnit,
    Dense,
    Dropout,
    batch_norm,
    check_image_size,
    halving_max_pool,
    local_response_norm,
)

# Filters of each module, in the column order of table 1:
# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
TABLE_1 = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}

SIDE_BRANCHES = {"4a": "side1", "4d": "side2"}


def max_pool_same(x):
    """3x3 max pooling with stride 1, the fourth branch of a module. [B, H, W, C] -> [B, H, W, C]."""
    return max_pool(x, (3, 3), (1, 1), padding=((1, 1), (1, 1)))


class NaiveInceptionModule(nn.Module):
    """1x1, 3x3 and 5x5 convolutions and an unprojected max pooling, side by side on the input (figure 2a).

    Attributes:
      filters_1x1, filters_3x3, filters_5x5: output channels of the three convolutions.
      unit: `ConvUnit` with the network's settings.
    """

    filters_1x1: int
    filters_3x3: int
    filters_5x5: int
    unit: Any = ConvUnit

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, filters_1x1 + filters_3x3 + filters_5x5 + C]."""
        branches = [
            self.unit(self.filters_1x1, (1, 1), name="conv_1x1")(x),
            self.unit(self.filters_3x3, (3, 3), name="conv_3x3")(x),
            self.unit(self.filters_5x5, (5, 5), name="conv_5x5")(x),
            max_pool_same(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionModule(nn.Module):
    """The module with 1x1 convolutions before the 3x3 and 5x5 ones and after the pooling (figure 2b).

    Attributes:
      filters_1x1, reduce_3x3, filters_3x3, reduce_5x5, filters_5x5, filters_pool: a row of TABLE_1.
      wide_kernel_size: side of the kernel that table 1 calls 5x5.
      unit: `ConvUnit` with the network's settings.
    """

    filters_1x1: int
    reduce_3x3: int
    filters_3x3: int
    reduce_5x5: int
    filters_5x5: int
    filters_pool: int
    wide_kernel_size: int = 5
    unit: Any = ConvUnit

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H, W, filters_1x1 + filters_3x3 + filters_5x5 + filters_pool]."""
        wide = (self.wide_kernel_size, self.wide_kernel_size)
        narrow_3x3 = self.unit(self.reduce_3x3, (1, 1), name="reduce_3x3")(x)
        narrow_5x5 = self.unit(self.reduce_5x5, (1, 1), name="reduce_5x5")(x)
        branches = [
            self.unit(self.filters_1x1, (1, 1), name="conv_1x1")(x),
            self.unit(self.filters_3x3, (3, 3), name="conv_3x3")(narrow_3x3),
            self.unit(self.filters_5x5, wide, name="conv_5x5")(narrow_5x5),
            self.unit(self.filters_pool, (1, 1), name="project_pool")(max_pool_same(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class SideBranch(nn.Module):
    """An auxiliary classifier on a map in the middle of the trunk, used in training only.

    Attributes:
      unit, dense: `ConvUnit` and `Dense` with the network's settings.
      num_classes: length of the logits.
      axis_name: as in `GoogLeNet`.
    """

    unit: Any
    dense: Any
    num_classes: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, H, W, C] -> logits [B, num_classes]; the first dense layer's weights depend on H and W."""
        x = avg_pool(x, (5, 5), (3, 3))
        x = self.unit(128, (1, 1), name="conv")(x)
        x = x.reshape(x.shape[0], -1)
        x = relu(self.dense(1024, name="dense")(x))
        x = Dropout(0.7, self.axis_name, name="dropout")(x, train)
        return self.dense(self.num_classes, name="logits")(x)


class GoogLeNet(nn.Module):
    """GoogLeNet, as published or in the form that public weights use.

    Attributes:
      batch_norm: use the public form, with batch normalisation (see the module's docstring).
      side_branches: in training, also return the logits of both side branches.
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which the batch is split, None if it is not.
    """

    batch_norm: bool = False
    side_branches: bool = True
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        In training with side branches, returns a tuple of three: the net's own logits and those of side
        branches 1 and 2. Side branches need images of the size used at initialisation; the trunk does not.

        Raises:
          ValueError: the image is smaller than 31x31, or than 79x79 if the side branches run.
        """
        # Initialisation has to create the side branches' parameters, although it is not a training call.
        run_sides = self.side_branches and (train or self.is_initializing())
        check_image_size("GoogLeNet", x, 31)
        if run_sides:
            check_image_size("GoogLeNet with its side branches (model.side_branches)", x, 79)
        norm = batch_norm(train=train, epsilon=1e-3, dtype=self.dtype, axis_name=self.axis_name)
        unit = functools.partial(ConvUnit, norm=norm if self.batch_norm else None, dtype=self.dtype)
        dense = functools.partial(Dense, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)

        x = halving_max_pool(unit(64, (7, 7), 2, name="conv1")(x))
        if not self.batch_norm:
            x = local_response_norm(x)
        x = unit(64, (1, 1), name="conv2_reduce")(x)
        x = unit(192, (3, 3), name="conv2")(x)
        if not self.batch_norm:
            x = local_response_norm(x)
        x = halving_max_pool(x)
        side_logits = []
        for module, filters in TABLE_1.items():
            if module == "4a":
                x = halving_max_pool(x)
            if module == "5a":
                x = halving_max_pool(x, window=2 if self.batch_norm else 3)
            wide_kernel_size = 3 if self.batch_norm else 5
            x = InceptionModule(*filters, wide_kernel_size, unit, name=f"inception_{module}")(x)
            if run_sides and module in SIDE_BRANCHES:
                side = SideBranch(unit, dense, self.num_classes, self.axis_name, name=SIDE_BRANCHES[module])
                side_logits.append(side(x, train))
        x = x.mean(axis=(1, 2))
        x = Dropout(0.4, self.axis_name, name="dropout")(x, train)
        logits = dense(self.num_classes, name="logits")(x)
        return (logits, *side_logits) if train and self.side_branches else logits
