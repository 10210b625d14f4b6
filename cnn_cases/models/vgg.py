"""VGG: the six nets of the paper's Table 1, with or without batch normalisation.

Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", 2014.

    stage   output       A      B      C        D        E
    image   224x224x3
    1       112x112x64   3      3 3    3 3      3 3      3 3
    2       56x56x128    3      3 3    3 3      3 3      3 3
    3       28x28x256    3 3    3 3    3 3 1    3 3 3    3 3 3 3
    4       14x14x512    3 3    3 3    3 3 1    3 3 3    3 3 3 3
    5       7x7x512      3 3    3 3    3 3 1    3 3 3    3 3 3 3
    dense   4096, 4096, 1000, the same in every net

    parameters           A 132,863,336   B 133,047,848   C 133,638,952   D 138,357,544   E 143,667,240
    with batch norm      A 132,868,840   B 133,053,736   C 133,647,400   D 138,365,992   E 143,678,248

Each digit is the side of a convolution's square kernel; a 2x2 max pooling ends each stage. ReLU follows every
convolution and every dense layer except the last; dropout with rate 0.5 follows each hidden dense layer.
A-LRN is A with local response normalisation after its first layer. D and E are known as VGG-16 and VGG-19.

The dense layers are convolutions: the first has a kernel as large as the last maps (7x7 for images of 224
pixels), the others 1x1. At that image size, this is the same as dense layers, number for number. A larger
image gives a map of class scores, which is averaged over space (section 3.2, "dense evaluation").

Departures from the paper: weights have Glorot and Bengio's uniform initialisation (2010), and biases are
initialised to 0. The paper trained A from normally distributed weights and initialised the deeper nets from a
trained A; its authors found later that Glorot's initialisation makes that unnecessary (section 3.1).
Batch normalisation, which is newer than the paper, comes between a convolution, which keeps its bias, and its
ReLU, as in the widely used public weights (torchvision); its epsilon is 1e-5, and each step keeps 0.9 of its
running statistics.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases import checks
from cnn_cases.models.fast import max_pool, relu
from cnn_cases.models.layers import (
    Conv,
    Dropout,
    batch_norm,
    check_dense_features,
    check_image_size,
    local_response_norm,
)

FILTERS = (64, 128, 256, 512, 512)  # of the convolutions of each stage

# Kernel sizes, stage by stage.
VARIANTS = {
    "A": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "A-LRN": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "B": ((3, 3), (3, 3), (3, 3), (3, 3), (3, 3)),
    "C": ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)),
    "D": ((3, 3), (3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "E": ((3, 3), (3, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3)),
}

glorot = nn.initializers.glorot_uniform()


def glorot_dense(key, shape, dtype):
    """Initialises a convolution [h, w, C, F] as the dense layer of h * w * C inputs that it represents.

    Glorot's rule for a convolution would multiply the fan-out by h * w and make the weights too small.
    """
    *window, features = shape
    return glorot(key, (math.prod(window), features), dtype).reshape(shape)


class VGG(nn.Module):
    """One of the nets of Table 1.

    Attributes:
      variant: a key of VARIANTS.
      batch_norm: normalise the output of every convolution.
      image_size: side of the square training images, in pixels, at least 32. It sets the side of the first
        dense layer's kernel, `image_size // 32`. Images may be larger, or as small as that kernel allows.
      dense_features: units of each hidden dense layer.
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which the batch is split, None if it is not.
    """

    variant: str = "D"
    batch_norm: bool = False
    image_size: int = 224
    dense_features: int = 4096
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes], averaged over the score map if there is one.

        Raises:
          ValueError: `variant` is unknown, `image_size` is below 32, `dense_features` is out of range, or
            the image is too small for the first dense layer.
        """
        checks.one_of("model.variant", self.variant, VARIANTS)
        if self.image_size < 32:
            raise ValueError(
                f"model.image_size = {self.image_size} must be at least 32: five poolings reduce 32 pixels "
                "to 1"
            )
        check_dense_features(self.dense_features)
        last_map = self.image_size // 32
        check_image_size(f"VGG with model.image_size = {self.image_size}", x, last_map * 32)
        conv = functools.partial(Conv, padding=0, kernel_init=glorot, dtype=self.dtype)
        norm = batch_norm(train=train, epsilon=1e-5, dtype=self.dtype, axis_name=self.axis_name)
        for stage, (filters, sizes) in enumerate(zip(FILTERS, VARIANTS[self.variant], strict=True), start=1):
            for number, size in enumerate(sizes, start=1):
                x = conv(filters, (size, size), padding=size // 2, name=f"conv{stage}_{number}")(x)
                x = nn.relu(norm(name=f"norm{stage}_{number}")(x)) if self.batch_norm else relu(x)
            if self.variant == "A-LRN" and stage == 1:
                x = local_response_norm(x)
            x = max_pool(x, (2, 2), (2, 2))
        x = conv(self.dense_features, (last_map, last_map), kernel_init=glorot_dense, name="dense1")(x)
        x = Dropout(0.5, self.axis_name, name="dropout1")(relu(x), train)
        x = conv(self.dense_features, (1, 1), name="dense2")(x)
        x = Dropout(0.5, self.axis_name, name="dropout2")(relu(x), train)
        x = conv(self.num_classes, (1, 1), name="logits")(x)
        return x.mean(axis=(1, 2))
