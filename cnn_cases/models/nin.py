"""Network in Network: the authors' nets for CIFAR and for ImageNet.

Lin, Chen, Yan, "Network in network", 2013. The paper gives neither net in full; both follow the authors'
published definitions: mavenlin/cuda-convnet (NIN/cifar-10_def) for the first, Caffe for the second.

    cifar              output       parameters     imagenet            output       parameters
    image              32x32x3                     image               224x224x3
    mlpconv 5x5        32x32x192        14,592     mlpconv 11x11 / 4   54x54x96         34,944
                       32x32x160        30,880                         54x54x96          9,312
                       32x32x96         15,456                         54x54x96          9,312
    pool 3x3 / 2       16x16x96                    pool 3x3 / 2        27x27x96
    mlpconv 5x5        16x16x192       460,992     mlpconv 5x5         27x27x256       614,656
                       16x16x192        37,056                         27x27x256        65,792
                       16x16x192        37,056                         27x27x256        65,792
    pool 3x3 / 2       8x8x192                     pool 3x3 / 2        13x13x256
    mlpconv 3x3        8x8x192         331,968     mlpconv 3x3         13x13x384       885,120
                       8x8x192          37,056                         13x13x384       147,840
                       8x8x10            1,930                         13x13x384       147,840
    average            10                          pool 3x3 / 2        6x6x384
                                                   mlpconv 3x3         6x6x1024      3,539,968
                                                                       6x6x1024      1,049,600
                                                                       6x6x1000      1,025,000
                                                   average             1000
                                       966,986                                       7,595,176

Dropout with rate 0.5 precedes the second and third mlpconv of cifar, and the fourth of imagenet. ReLU follows
every convolution, even the last, so no logit is negative. Weights are drawn from normal distributions with
the standard deviations of the authors' definitions; biases are initialised to 0.

Departures: none in the nets. Global average pooling accepts maps of any size, where the definitions fix 8x8
and 6x6, so the nets accept other image sizes with the same parameters.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases import checks
from cnn_cases.models.fast import relu
from cnn_cases.models.layers import Conv, Dropout, check_image_size, halving_max_pool


class MLPConv(nn.Module):
    """A perceptron that slides over the maps: a spatial convolution, then two 1x1 convolutions (section 3.1).

    Attributes:
      filters: channels of the three convolutions.
      kernel_size: side of the spatial convolution's square kernel.
      stride, padding: of the spatial convolution.
      stds: standard deviations of the three convolutions' initial weights.
      dtype: compute type; parameters are float32.
    """

    filters: tuple[int, int, int]
    kernel_size: int
    stride: int
    padding: int
    stds: tuple[float, float, float]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H', W', filters[2]]."""
        normals = [nn.initializers.normal(std) for std in self.stds]
        spatial = dict(
            kernel_size=(self.kernel_size, self.kernel_size), strides=self.stride, padding=self.padding
        )
        x = Conv(self.filters[0], **spatial, kernel_init=normals[0], dtype=self.dtype, name="conv")(x)
        x = relu(x)
        x = Conv(self.filters[1], (1, 1), kernel_init=normals[1], dtype=self.dtype, name="mlp1")(x)
        x = relu(x)
        x = Conv(self.filters[2], (1, 1), kernel_init=normals[2], dtype=self.dtype, name="mlp2")(x)
        return relu(x)


class Stage(NamedTuple):
    """An MLPConv and the dropout before it; max pooling separates the stages."""

    filters: tuple[int, ...]  # two in the last stage, whose third layer has a channel for each class
    kernel_size: int
    stride: int
    padding: int
    stds: tuple[float, float, float]
    dropout: bool  # drop half of the input


VARIANTS = {
    "cifar": (
        Stage((192, 160, 96), 5, 1, 2, (0.05, 0.05, 0.05), dropout=False),
        Stage((192, 192, 192), 5, 1, 2, (0.05, 0.05, 0.05), dropout=True),
        Stage((192, 192), 3, 1, 1, (0.05, 0.05, 0.05), dropout=True),
    ),
    "imagenet": (
        Stage((96, 96, 96), 11, 4, 0, (0.01, 0.05, 0.05), dropout=False),
        Stage((256, 256, 256), 5, 1, 2, (0.05, 0.05, 0.05), dropout=False),
        Stage((384, 384, 384), 3, 1, 1, (0.01, 0.05, 0.05), dropout=False),
        Stage((1024, 1024), 3, 1, 1, (0.05, 0.05, 0.01), dropout=True),
    ),
}

# Side of the smallest image that leaves a pixel after the poolings, each of which halves the map. Two of them
# need 4 pixels; three need 8, for which the first convolution needs 7 * 4 + 11 = 39.
SMALLEST = {"cifar": 4, "imagenet": 39}


class NIN(nn.Module):
    """Network in Network.

    Attributes:
      variant: a key of VARIANTS.
      num_classes: length of the logits.
      dtype: compute type; parameters are float32.
      axis_name: the pmap axis over which the batch is split, None if it is not.
    """

    variant: str = "cifar"
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes], none negative.

        Raises:
          ValueError: `variant` is unknown, or the image is smaller than SMALLEST.
        """
        checks.one_of("model.variant", self.variant, VARIANTS)
        check_image_size(f"NIN {self.variant}", x, SMALLEST[self.variant])
        for number, stage in enumerate(VARIANTS[self.variant], start=1):
            if number > 1:
                x = halving_max_pool(x)
            if stage.dropout:
                x = Dropout(0.5, self.axis_name, name=f"dropout{number}")(x, train)
            x = MLPConv(
                stage.filters if len(stage.filters) == 3 else (*stage.filters, self.num_classes),
                stage.kernel_size,
                stage.stride,
                stage.padding,
                stage.stds,
                self.dtype,
                name=f"mlpconv{number}",
            )(x)
        return x.mean(axis=(1, 2))
