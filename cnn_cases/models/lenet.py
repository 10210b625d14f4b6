"""LeNet-5, as the lecture draws it and as the 1998 paper describes it.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.

`LeNet5`, the lecture's net:

    layer        output      parameters
    image        32x32x1
    conv 5x5     28x28x6            156
    average 2x2  14x14x6
    conv 5x5     10x10x16         2,416
    average 2x2  5x5x16
    dense        120             48,120
    dense        84              10,164
    dense        10                 850     61,706 in all

Departures from the paper, as in the lecture: plain average pooling instead of trainable subsampling, a full
second convolution instead of the connection table, softmax instead of the RBF output. The activation function
is ReLU, where the slide recalls the sigmoid and tanh of the time.

`LeNet5Original`, the paper's net (section II.B and figure 2):

    layer                     output      parameters                    connections
    image                     32x32x1
    C1   conv 5x5             28x28x6     6 * (5*5 + 1)      =    156       122,304
    S2   subsampling 2x2      14x14x6     6 * 2              =     12         5,880
    C3   conv 5x5, Table I    10x10x16    60 * 5*5 + 16      =  1,516       151,600
    S4   subsampling 2x2      5x5x16      16 * 2             =     32         2,000
    C5   conv 5x5             1x1x120     120 * (16*5*5 + 1) = 48,120        48,120
    F6   dense                84          84 * (120 + 1)     = 10,164        10,164
    RBF  distance to codes    10          fixed              =      0           840
                                                               60,000       340,908

Every layer up to and including F6 ends in the squashing function 1.7159 tanh(2x / 3). The paper scales
pixels so that the background is -0.1 and the ink 1.175, which makes their mean about 0 and their variance
about 1. That is preprocessing; this model takes the pixels as they are.

Departures from the paper: the ten bitmap codes were drawn for this project, after the paper's figure 3 but
not pixel for pixel. The paper's initialisation (appendix A) is silent on biases: they are drawn like the
weights of their unit, and the fan-in does not count them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from cnn_cases.models.fast import avg_pool, conv_general_dilated, relu
from cnn_cases.models.layers import Conv, Dense, broadcast_like, check_image_size

# Table I: the maps of S2 that feed each of C3's sixteen maps.
C3_INPUTS = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)

# The digits 0 to 9, each 7 pixels wide and 12 high; any two differ in at least 20 of their 84 pixels.
BITMAPS = """
    ..###.. ...##.. .#####. ######. ....##. ####### ....### ####### .#####. ..###..
    .##.##. ..###.. ##...## #...### ...###. ####### ..###.. ####### ##...## .##.##.
    ##...## .####.. #....## .....## ..####. ##..... .##.... ##...## ##...## ##...##
    ##...## ...##.. .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##
    ##...## ...##.. ....##. ....##. ##..##. ######. ##..... ....##. .##.##. ##...##
    ##...## ...##.. ...##.. .####.. #...##. ##..### ######. ...##.. ..###.. ##..###
    ##...## ...##.. ..##... ....##. ####### .....## ###..## ...##.. .##.##. .######
    ##...## ...##.. .##.... .....## ####### .....## ##...## ..##... ##...## .....##
    ##...## ...##.. ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
    ##...## ...##.. ##..... #....## ....##. .....## ##...## .##.... ##...## ....##.
    .##.##. .###### ####### ##..##. ....##. ##.###. .##.##. .##.... ##...## ..###..
    ..###.. .###### ####### .####.. ....##. .####.. ..###.. .##.... .#####. ###....
"""


def digit_codes():
    """Returns the bitmaps as the RBF units' centres: [10, 84] float32, row by row, ink +1, background -1."""
    rows = [line.split() for line in BITMAPS.strip().splitlines()]
    bitmaps = zip(*rows, strict=True)
    return np.array(
        [[1 if pixel == "#" else -1 for pixel in "".join(bitmap)] for bitmap in bitmaps], np.float32
    )


def squash(x):
    """f(a) = A tanh(S a), A = 1.7159, S = 2/3, so that f(1) = 1 and f(-1) = -1 (equation 6, appendix A)."""
    return 1.7159 * jnp.tanh(x * (2 / 3))


def uniform_by_fan_in(fan_in):
    """Returns an initialiser, uniform in +-2.4 / fan_in (appendix A); an array `fan_in` is broadcast."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * (2.4 / jnp.asarray(fan_in, dtype))

    return init


class LeNet5(nn.Module):
    """The lecture's LeNet-5.

    Attributes:
      num_classes: length of the logits.
      dtype: compute type; parameters are float32.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        Raises:
          ValueError: the image is smaller than 16x16.
        """
        del train  # no layer behaves differently in training
        check_image_size("LeNet-5", x, 16)
        x = relu(Conv(6, (5, 5), padding="VALID", dtype=self.dtype, name="conv1")(x))
        x = avg_pool(x, (2, 2), (2, 2))
        x = relu(Conv(16, (5, 5), padding="VALID", dtype=self.dtype, name="conv2")(x))
        x = avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = relu(Dense(120, dtype=self.dtype, name="dense1")(x))
        x = relu(Dense(84, dtype=self.dtype, name="dense2")(x))
        return Dense(self.num_classes, dtype=self.dtype, name="logits")(x)


class Subsampling(nn.Module):
    """Sums 2x2 pixels, then applies a trainable coefficient and a trainable bias to each map (S2 and S4).

    Attributes:
      dtype: compute type; parameters are float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H/2, W/2, C]."""
        init = uniform_by_fan_in(4)
        coefficient = self.param("coefficient", init, x.shape[-1:])
        bias = self.param("bias", init, x.shape[-1:])
        x = 4 * avg_pool(x.astype(self.dtype), (2, 2), (2, 2))
        return x * broadcast_like(coefficient, x) + broadcast_like(bias, x)


class TableConv(nn.Module):
    """A 5x5 convolution with a connection table (C3); only the connected kernels exist as parameters.

    Attributes:
      inputs: for each output map, the input maps that feed it.
      dtype: compute type; parameters are float32.
    """

    inputs: tuple[tuple[int, ...], ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H-4, W-4, F] for F rows of the table; the kernel is [5, 5, connections]."""
        sources = np.array([source for row in self.inputs for source in row])
        targets = np.array([target for target, row in enumerate(self.inputs) for _ in row])
        fan_in = 5 * 5 * np.array([len(row) for row in self.inputs])
        kernel = self.param("kernel", uniform_by_fan_in(fan_in[targets]), (5, 5, len(sources)))
        bias = self.param("bias", uniform_by_fan_in(fan_in), (len(self.inputs),))
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        # One ordinary convolution, with zeros for the missing connections, instead of sixteen.
        dense = jnp.zeros((5, 5, x.shape[-1], len(self.inputs)), kernel.dtype)
        dense = dense.at[:, :, sources, targets].set(kernel)
        y = conv_general_dilated(x, dense, (1, 1), "VALID")
        return y + broadcast_like(bias, y)


class RBF(nn.Module):
    """Euclidean radial basis function units, y_i = sum_j (x_j - w_ij)^2, with the digits' codes as w (eq. 7).

    Attributes:
      num_classes: number of units, one for each digit from 0 up.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x):
        """[B, 84] -> penalties [B, num_classes], float32.

        A penalty is about 84 initially, where bfloat16 has steps of 0.5: too coarse to tell two digits apart,
        so the distances are computed and returned in float32.
        """
        codes = digit_codes()[: self.num_classes]
        return jnp.sum((x.astype(jnp.float32)[:, None] - codes) ** 2, axis=-1)


class LeNet5Original(nn.Module):
    """The LeNet-5 of the 1998 paper.

    Attributes:
      num_classes: length of the logits, at most 10, since only the ten digits have codes.
      dtype: compute type up to F6; the logits are float32, and so are the parameters.
    """

    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, 32, 32, C] -> logits [B, num_classes], the negative RBF penalties.

        The closest code has the smallest penalty and so the largest logit.

        Raises:
          ValueError: the image is not 32x32, or there are more classes than codes.
        """
        del train  # no layer behaves differently in training
        if x.shape[1:3] != (32, 32):
            raise ValueError(
                f"the 1998 LeNet-5 needs images of 32x32 pixels (C5 reduces them to one), "
                f"got {x.shape[1]}x{x.shape[2]}; pad or resize them (data.border, data.image_size)"
            )
        if self.num_classes > 10:
            raise ValueError(
                f"num_classes = {self.num_classes} must be at most 10: the 1998 LeNet-5 has one code per "
                "digit"
            )

        def paper_init(fan_in):
            init = uniform_by_fan_in(fan_in)
            return dict(kernel_init=init, bias_init=init, dtype=self.dtype)

        c1 = Conv(6, (5, 5), padding="VALID", **paper_init(5 * 5 * x.shape[-1]), name="c1")
        c5 = Conv(120, (5, 5), padding="VALID", **paper_init(5 * 5 * 16), name="c5")
        f6 = Dense(84, **paper_init(120), name="f6")
        x = squash(c1(x))
        x = squash(Subsampling(self.dtype, name="s2")(x))
        x = squash(TableConv(C3_INPUTS, self.dtype, name="c3")(x))
        x = squash(Subsampling(self.dtype, name="s4")(x))
        x = squash(c5(x))
        x = squash(f6(x.reshape(x.shape[0], -1)))
        return -RBF(self.num_classes, name="rbf")(x)
