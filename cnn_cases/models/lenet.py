"""LeNet-5 as the lecture draws it.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.

    layer        output      parameters
    image        32x32x1
    conv 5x5     28x28x6            156
    average 2x2  14x14x6
    conv 5x5     10x10x16         2,416
    average 2x2  5x5x16
    dense        120             48,120
    dense        84              10,164
    dense        10                 850     61,706 in all

Departures from the paper, all the lecture's: ReLU for the scaled tanh, plain average pooling for the
trainable subsampling, a full second convolution for the connection table, softmax for the RBF output.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn


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
        if min(x.shape[1:3]) < 16:
            raise ValueError(f"LeNet-5 needs images of at least 16x16 pixels, got {x.shape[1]}x{x.shape[2]}")
        x = nn.relu(nn.Conv(6, (5, 5), padding="VALID", dtype=self.dtype, name="conv1")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID", dtype=self.dtype, name="conv2")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, dtype=self.dtype, name="dense1")(x))
        x = nn.relu(nn.Dense(84, dtype=self.dtype, name="dense2")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x)
