"""AlexNet: the two-group net of the paper, the lecture's net, and the later one-tower net.

Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012.
Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

                      output        output
                      two_groups,   one_tower      parameters   parameters   parameters
    layer             lecture                      two_groups      lecture    one_tower
    image             227x227x3     224x224x3
    conv 11x11 / 4    55x55x96      55x55x64           34,944       34,944       23,296
    pool 3x3 / 2      27x27x96      27x27x64
    conv 5x5          27x27x256     27x27x192         307,456      614,656      307,392
    pool 3x3 / 2      13x13x256     13x13x192
    conv 3x3          13x13x384     13x13x384         885,120      885,120      663,936
    conv 3x3          13x13x384     13x13x256         663,936    1,327,488      884,992
    conv 3x3          13x13x256     13x13x256         442,624      884,992      590,080
    pool 3x3 / 2      6x6x256       6x6x256
    dense             4096          4096           37,752,832   37,752,832   37,752,832
    dense             4096          4096           16,781,312   16,781,312   16,781,312
    dense             1000          1000            4,097,000    4,097,000    4,097,000
                                                   60,965,224   62,378,344   61,100,840

ReLU follows every convolution and every dense layer except the last. In two_groups, local response
normalisation follows the ReLU of conv 1 and conv 2, and conv 2, 4 and 5 have two groups: in these layers,
each of the paper's two GPUs sees only its own half of the maps. Dropout with rate 0.5 follows each hidden
dense layer. Weights are drawn from a normal distribution with standard deviation 0.01; biases are initialised
to 1 in conv 2, 4, 5 and the hidden dense layers, and to 0 elsewhere (section 5).

Departures from the 2012 paper:
- images have 227 pixels a side, since 224 do not give the paper's 55x55 maps;
- response normalisation crosses the border between the two groups, as the formula says, although the paper's
  two GPUs could not see each other's maps there;
- dropout doubles the surviving units in training, where the paper halves every unit at test time.

The lecture draws no groups, response normalisation or dropout; the net `lecture` does have dropout.

one_tower follows the widely used public weights (torchvision): the first convolution has padding of 2, and
there is no response normalisation. The author's own file for that net differs in both, and in the initial
values. The text of that paper (Krizhevsky 2014) has 384 filters in conv 4; the file and the weights have 256.
Initial values and dropout are those of the 2012 paper.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases import checks
from cnn_cases.models.fast import max_pool, relu
from cnn_cases.models.layers import (
    Conv,
    Dense,
    Dropout,
    check_dense_features,
    check_image_size,
    local_response_norm,
)


class Variant(NamedTuple):
    """The settings in which the versions differ."""

    filters: tuple[int, ...]  # of the five convolutions
    groups: tuple[int, ...]  # of the five convolutions
    padding: int  # of the first convolution, pixels on each side
    response_norm: bool


VARIANTS = {
    "two_groups": Variant((96, 256, 384, 384, 256), (1, 2, 1, 2, 2), padding=0, response_norm=True),
    "lecture": Variant((96, 256, 384, 384, 256), (1, 1, 1, 1, 1), padding=0, response_norm=False),
    "one_tower": Variant((64, 192, 384, 256, 256), (1, 1, 1, 1, 1), padding=2, response_norm=False),
}

normal = nn.initializers.normal(0.01)


class AlexNet(nn.Module):
    """AlexNet in one of its three versions.

    The first dense layer has an input for every pixel of the last maps, so these must have the size that they
    had at initialisation.

    Attributes:
      variant: a key of VARIANTS.
      dense_features: units of each hidden dense layer.
      num_classes: length of the logits.
      dtype: compute type; parameters are float32.
      axis_name: the pmap axis over which the batch is split, None if it is not.
    """

    variant: str = "two_groups"
    dense_features: int = 4096
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        Raises:
          ValueError: `variant` is unknown, `dense_features` is out of range, or the image is smaller than
            67x67 (63x63 for one_tower).
        """
        checks.one_of("model.variant", self.variant, VARIANTS)
        check_dense_features(self.dense_features)
        variant = VARIANTS[self.variant]
        # The three poolings leave one pixel of 15 (15 -> 7 -> 3 -> 1); conv 1 needs 14 * 4 + 11 = 67 for 15.
        smallest = 67 - 2 * variant.padding
        check_image_size(f"AlexNet {self.variant}", x, smallest)

        def conv(number, size, stride, padding, bias):
            return Conv(
                variant.filters[number - 1],
                (size, size),
                stride,
                padding=padding,
                feature_group_count=variant.groups[number - 1],
                kernel_init=normal,
                bias_init=nn.initializers.constant(bias),
                dtype=self.dtype,
                name=f"conv{number}",
            )

        def dense(features, name, bias):
            bias_init = nn.initializers.constant(bias)
            return Dense(features, kernel_init=normal, bias_init=bias_init, dtype=self.dtype, name=name)

        def norm(x):
            return local_response_norm(x) if variant.response_norm else x

        def pool(x):
            return max_pool(x, (3, 3), (2, 2))

        x = relu(conv(1, 11, stride=4, padding=variant.padding, bias=0)(x))
        x = pool(norm(x))
        x = relu(conv(2, 5, stride=1, padding=2, bias=1)(x))
        x = pool(norm(x))
        x = relu(conv(3, 3, stride=1, padding=1, bias=0)(x))
        x = relu(conv(4, 3, stride=1, padding=1, bias=1)(x))
        x = relu(conv(5, 3, stride=1, padding=1, bias=1)(x))
        x = pool(x)
        x = x.reshape(x.shape[0], -1)
        x = relu(dense(self.dense_features, "dense1", bias=1)(x))
        x = Dropout(0.5, self.axis_name, name="dropout1")(x, train)
        x = relu(dense(self.dense_features, "dense2", bias=1)(x))
        x = Dropout(0.5, self.axis_name, name="dropout2")(x, train)
        return dense(self.num_classes, "logits", bias=0)(x)
