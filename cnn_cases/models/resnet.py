"""Residual networks and their plain twins, the CIFAR family of depth 6n + 2.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2015, section 4.2:

    output map    32x32     16x16    8x8
    layers        1 + 2n    2n       2n
    filters       16        32       64

then global average pooling and a dense layer. The first block of the second and third stage has stride 2.
A plain net is the same net without the additions (section 3.3). With shortcut option A it has the same
parameters, with the same names, so that both start from the same values.

Departures from the paper: none in the network. Batch normalisation uses fb.resnet.torch's epsilon of 1e-5
and keeps 0.9 of its running statistics at each step (the paper gives neither).
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases.models.layers import conv_general_dilated

SHORTCUTS = {
    "A": "identity, subsampled and padded with zero channels where the shape changes",
    "B": "1x1 projection where the shape changes, identity elsewhere",
    "C": "1x1 projection everywhere",
}

# He et al. 2015b ("Delving deep into rectifiers"): standard deviation sqrt(2 / fan_in), not truncated.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def identity_shortcut(x, filters, stride):
    """Option A: every `stride`-th pixel, new channels zero. [B, H, W, C] -> [B, H', W', filters]."""
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them (figure 2).

    Attributes:
      filters: channels of both convolutions.
      stride: of the first convolution.
      shortcut: a key of SHORTCUTS (section 4.1).
      plain: leave the shortcut and its addition out.
      conv, norm: `nn.Conv` and `nn.BatchNorm` with the network's settings.
    """

    filters: int
    stride: int
    shortcut: str
    plain: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.filters, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.filters, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        if not self.plain:
            y = y + self._shortcut(x)
        return nn.relu(y)

    def _shortcut(self, x):
        changes_shape = self.stride != 1 or x.shape[-1] != self.filters
        if self.shortcut == "C" or (self.shortcut == "B" and changes_shape):
            x = self.conv(self.filters, (1, 1), self.stride, padding=0, name="projection")(x)
            return self.norm(name="projection_norm")(x)
        return identity_shortcut(x, self.filters, self.stride)


class CifarResNet(nn.Module):
    """The network of depth 6n + 2, residual or plain.

    Attributes:
      depth: number of weighted layers: 8, 14, 20, ..., 1202.
      plain: leave the shortcuts out.
      shortcut: a key of SHORTCUTS; a plain net has only option A, which has no parameters.
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are taken, None for this device's alone.
    """

    depth: int = 20
    plain: bool = False
    shortcut: str = "A"
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        Raises:
          ValueError: `depth` is not 6n + 2, `shortcut` is unknown, or a plain net is asked for projections.
        """
        blocks_per_stage, rest = divmod(self.depth - 2, 6)
        if rest or blocks_per_stage < 1:
            lower = max(8, 6 * blocks_per_stage + 2)
            raise ValueError(
                f"model.depth = {self.depth} is not 6n + 2 with n >= 1; nearest: {lower} and {lower + 6}"
            )
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"model.shortcut = {self.shortcut!r} is unknown; known: {', '.join(SHORTCUTS)}")
        if self.plain and self.shortcut != "A":
            raise ValueError(
                f"model.shortcut = {self.shortcut!r} has no use in a plain net; "
                "set it to 'A', or model.plain to False"
            )
        conv = functools.partial(
            nn.Conv,
            use_bias=False,
            kernel_init=he_normal,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
        )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = conv(16, (3, 3), padding=1, name="conv1")(x)
        x = nn.relu(norm(name="norm1")(x))
        for stage, filters in enumerate((16, 32, 64), start=1):
            for block in range(1, blocks_per_stage + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = BasicBlock(filters, stride, self.shortcut, self.plain, conv, norm, name=name)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=he_normal, dtype=self.dtype, name="logits")(x)
