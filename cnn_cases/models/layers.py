"""Layers that several architectures share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import canonicalize_padding
from jax import lax

from cnn_cases.models.fast import conv_general_dilated, matrix_product, max_pool, platform, relu

MAX_DENSE_FEATURES = 16_384  # of a hidden dense layer: four times as many as in the papers


def broadcast_like(parameter, x):
    """Broadcasts a float32 parameter [C] to x's shape and type; its gradient is summed in float32.

    `x + bias.astype(x.dtype)` would sum it in x's type. In bfloat16 on a CPU, 32,768 gradients around 1 then
    add up to 1,300.
    """
    return jnp.broadcast_to(parameter, x.shape).astype(x.dtype)


def compiled(init):
    """Returns the initialiser as one program, for a network whose layers are initialised one by one."""
    return jax.jit(init, static_argnums=(1, 2))


class Conv(nn.Module):
    """`nn.Conv` for images, fast on a CPU and a GPU too, with the bias's gradient summed in float32.

    Attributes:
      features, kernel_size, strides, padding, feature_group_count, use_bias, kernel_init, bias_init: as in
        `nn.Conv`, whose parameters have the same names, shapes and initial values. `kernel_size` is a pair,
        and `padding` is with zeros: neither "CIRCULAR" nor "REFLECT".
      dtype: compute type; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: Any = "SAME"
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H', W', features]."""
        shape = (*self.kernel_size, x.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", compiled(self.kernel_init), shape, jnp.float32)
        y = conv_general_dilated(
            *promote_dtype(x, kernel, dtype=self.dtype),
            np.broadcast_to(self.strides, 2).tolist(),
            canonicalize_padding(self.padding, 2),
            feature_group_count=self.feature_group_count,
        )
        if self.use_bias:
            y = y + broadcast_like(self.param("bias", self.bias_init, (self.features,), jnp.float32), y)
        return y


class Dense(nn.Module):
    """`nn.Dense` with the bias's gradient summed in float32.

    Attributes:
      features, kernel_init, bias_init: as in `nn.Dense`, whose parameters have the same names, shapes and
        initial values.
      dtype: compute type; parameters are float32.
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        """[..., C] -> [..., features]."""
        kernel = self.param("kernel", compiled(self.kernel_init), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        y = matrix_product(*promote_dtype(x, kernel, dtype=self.dtype))
        return y + broadcast_like(bias, y)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe, Szegedy 2015, algorithms 1 and 2), in few passes over the maps.

    Variable names, and results up to rounding, are those of `nn.BatchNorm`, which subtracts the mean first
    and keeps the difference for the gradient. This layer applies one factor and one summand to each channel
    and keeps the input, in float32. Rounding errors are larger if a channel's mean is large compared with its
    standard deviation. As in `nn.BatchNorm`, the running variance averages the biased variances of the
    batches; the paper's algorithm 2 multiplies it by m / (m - 1), for batches of m values of a channel.

    Attributes:
      use_running_average: normalise by the running statistics, as in evaluation.
      epsilon: added to the variance.
      momentum: fraction of the running statistics that each step, or each microbatch of one, keeps.
      dtype: type of the result; statistics and arithmetic are float32.
      axis_name: the pmap axis over which the statistics are taken, None for this device's batch alone.
      scale_init: initialiser of the scale.
    """

    use_running_average: bool
    epsilon: float
    momentum: float = 0.9
    dtype: Any = jnp.float32
    axis_name: str | None = None
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        """[..., C] -> [..., C]; statistics of a channel are over all other axes."""
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", self.scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        x = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            axes = tuple(range(x.ndim - 1))
            moments = x.mean(axes), jnp.square(x).mean(axes)
            starts = self.is_initializing()
            # One device has nothing to synchronise, but XLA would not remove the `pmean`.
            if self.axis_name and not starts and lax.axis_size(self.axis_name) > 1:
                moments = lax.pmean(jnp.stack(moments), self.axis_name)
            mean, mean_of_squares = moments
            var = jnp.maximum(mean_of_squares - jnp.square(mean), 0)  # rounding could make it negative
            if not starts:
                for running, now in ((running_mean, mean), (running_var, var)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * now
        factor = scale * lax.rsqrt(var + self.epsilon)
        return (x * factor + (bias - mean * factor)).astype(self.dtype)


def batch_norm(*, train, epsilon, dtype, axis_name):
    """Returns `BatchNorm` with the settings that all norms of a network share."""
    return functools.partial(
        BatchNorm, use_running_average=not train, epsilon=epsilon, dtype=dtype, axis_name=axis_name
    )


def check_image_size(network, x, smallest):
    """Raises ValueError if images x [B, H, W, C] have a side below `smallest` pixels."""
    height, width = x.shape[1:3]
    if min(height, width) < smallest:
        raise ValueError(
            f"{network} needs images of at least {smallest}x{smallest} pixels, got {height}x{width} "
            "(data.image_size, data.border)"
        )


def check_dense_features(number):
    """Raises ValueError unless `number` is allowed for the features of hidden dense layers."""
    if not 1 <= number <= MAX_DENSE_FEATURES:
        raise ValueError(f"model.dense_features = {number} must be between 1 and {MAX_DENSE_FEATURES}")


def halving_max_pool(x, window=3):
    """Max pooling with stride 2 that halves a map, as in Caffe and cuda-convnet: 112 -> 56 -> 28 -> 14 -> 7.

    [B, H, W, C] -> [B, H // 2, W // 2, C] with the 3x3 window, [B, ceil(H / 2), ceil(W / 2), C] with 2x2. The
    last window may extend one pixel beyond the lower and right edges; this padding is never the maximum.
    """
    return max_pool(x, (window, window), (2, 2), padding=((0, 1), (0, 1)))


def local_response_norm(x, k=2.0, n=5, alpha=1e-4, beta=0.75):
    """Local response normalisation across channels (Krizhevsky et al. 2012, section 3.3).

    b_i = a_i / (k + alpha * sum of a_j^2)^beta, where j runs over the `n` channels centred on i, as far as
    they exist. `alpha` multiplies the sum, as in the paper; Caffe and PyTorch multiply the mean, so their
    alpha is `n` times the paper's.

    Args:
      x: [..., C], of any float type. The sum is taken in float32: squares lose too much in bfloat16.
      k, n, alpha, beta: the paper's constants; `n` must be odd (AssertionError).

    Returns:
      The normalised activations, [..., C], of x's type.
    """
    assert n % 2 == 1, n
    return (_normalised_from_input if platform() == "gpu" else _normalised)(x, k, n, alpha, beta)


def _normalised(x, k, n, alpha, beta):
    a = x.astype(jnp.float32)
    # On a CPU, XLA's own power takes almost four times as long.
    return (a * jnp.exp(-beta * jnp.log(k + alpha * _sum_of_neighbours(a * a, n)))).astype(x.dtype)


def _sum_of_neighbours(x, n):
    # Not a sum of n shifted copies: its gradient takes four times as long on a CPU.
    ones, zeros = (1,) * (x.ndim - 1), ((0, 0),) * (x.ndim - 1)
    return lax.reduce_window(
        x, 0.0, lax.add, (*ones, n), window_strides=(*ones, 1), padding=(*zeros, (n // 2, n // 2))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _normalised_from_input(x, k, n, alpha, beta):
    """`_normalised` with little memory traffic: its gradient keeps x alone, and nothing in float32."""
    # The barrier keeps XLA from recomputing the power for each cell of each window of a pooling that follows.
    return lax.optimization_barrier(_normalised(x, k, n, alpha, beta))


def _normalised_and_input(x, *constants):
    return _normalised_from_input(x, *constants), x


def _gradient_from_input(k, n, alpha, beta, x, gradient):
    # Without this barrier, XLA would keep the power, in float32, for here; without the other, its derivative.
    x, gradient = lax.optimization_barrier((x, gradient))
    a, g = x.astype(jnp.float32), gradient.astype(jnp.float32)
    denominator = k + alpha * _sum_of_neighbours(a * a, n)
    by_sum = lax.optimization_barrier((g * a * denominator ** (-beta - 1)).astype(x.dtype))
    by_sum = _sum_of_neighbours(by_sum.astype(jnp.float32), n)
    return ((g * denominator**-beta - 2 * alpha * beta * a * by_sum).astype(x.dtype),)


_normalised_from_input.defvjp(_normalised_and_input, _gradient_from_input)


class Dropout(nn.Module):
    """Dropout (Hinton et al. 2012), scaled in training, with a mask independent of the number of devices.

    The mask of an example is a function of the `dropout` key and of the example's position in the global
    batch, so splitting a batch over devices does not change its masks. `nn.Dropout` would give every device
    the same mask.

    Attributes:
      rate: the probability of setting a value to zero, in [0, 1).
      axis_name: the pmap axis over which the batch is split, None if it is not.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, ...] -> [B, ...]; the identity unless `train`. Raises ValueError if `rate` is not in [0, 1)."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of {self.name or 'Dropout'}, {self.rate}, must be in [0, 1)")
        if not train or self.rate == 0:
            return x
        batch = x.shape[0]
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * batch
        key = self.make_rng("dropout")
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(first + jnp.arange(batch))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


class ConvUnit(nn.Module):
    """A convolution, batch normalisation if the network has it, and ReLU.

    Attributes:
      filters: output channels.
      kernel_size: height and width.
      stride: in both directions.
      padding: zero pixels on each side, (vertical, horizontal); None for half the kernel size, with which an
        odd kernel at stride 1 keeps the size of the map.
      norm: `BatchNorm` with the network's settings, which replaces the biases; None for biases.
      dtype: compute type; parameters are float32.
    """

    filters: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] | None = None
    norm: Any = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H', W', filters]."""
        height, width = self.kernel_size
        x = Conv(
            self.filters,
            self.kernel_size,
            self.stride,
            padding=(height // 2, width // 2) if self.padding is None else self.padding,
            use_bias=self.norm is None,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        return relu(x) if self.norm is None else nn.relu(self.norm(name="norm")(x))
