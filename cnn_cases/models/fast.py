"""Faster formulations, for XLA, of some Flax operations: the same values and gradients.

On a CPU some have no forward-mode derivative (`jax.jvp`, and products with the Hessian): trace those within
`written_for("tpu")`, which takes Flax's operations.

Readers of the networks can skip this file: read `conv_general_dilated` as `lax`'s and `max_pool` as `nn`'s.
`docs/speed.md` has the measurements.
"""

import contextlib
import contextvars
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_WORTH_A_BAND = 10_000_000  # multiplications of a convolution; see `_conv_for_cpu`
_ORDER = ("NHWC", "HWIO", "NHWC")  # of the axes of images, kernel and result
_FILTERS_AT_ONCE = 64  # of a GPU's matrix units; see `conv_of_wide_pixels`

_written_for = contextvars.ContextVar("written_for", default=None)


def platform():
    """What layers are written for: "cpu", "gpu" or "tpu"; JAX's choice, unless `written_for` says more."""
    return _written_for.get() or jax.default_backend()


@contextlib.contextmanager
def written_for(name):
    """Writes the layers that are traced within for the platform of that name, be it there or not."""
    token = _written_for.set(name)
    try:
        yield
    finally:
        _written_for.reset(token)


def is_for_cpu():
    """Whether layers are written for XLA's CPU compiler here."""
    return platform() == "cpu"


def conv_general_dilated(x, kernel, window_strides, padding, **options):
    """`lax.conv_general_dilated`, written so that XLA is quick with it and its gradients.

    On a CPU `_conv_for_cpu` says what is different. On a GPU, where there are few filters, neighbours in a
    row become one pixel with all their channels, by `conv_of_wide_pixels`. On a CPU and a TPU, a convolution
    in groups becomes one for each group: on a CPU the gradient of a kernel in two groups takes fifteen times
    as long as those of two kernels, and on a TPU the step of AlexNet's two groups an eighth less, by its
    compiler's estimate. One with dilations, which no network here has, is left as it is.

    Shapes: x [B, H, W, C], kernel [h, w, C / groups, F] -> [B, H', W', F].

    Raises:
      ValueError: the maps have no pixels.
    """
    if 0 in x.shape[1:3]:
        raise ValueError(
            f"a map of {x.shape[1]}x{x.shape[2]} pixels cannot be convolved: the images are too small for "
            "this network (data.image_size, data.border)"
        )
    groups = options["feature_group_count"]
    if groups > 1 and (is_for_cpu() or platform() == "tpu"):
        options |= {"feature_group_count": 1}
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        parts = [conv_general_dilated(*part, window_strides, padding, **options) for part in parts]
        return jnp.concatenate(parts, axis=-1)
    if any(dilation > 1 for dilation in (*options["lhs_dilation"], *options["rhs_dilation"])):
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    if is_for_cpu():
        return _conv_for_cpu(x, kernel, window_strides, padding)
    if platform() == "gpu":
        pads = _pads(x, kernel.shape[:2], window_strides, padding)
        size = _pixels_in_one(x, kernel, pads) if max(window_strides) == groups == 1 else 1
        if size > 1:
            return conv_of_wide_pixels(x, kernel, pads, size, **options)
    return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)


def _conv_for_cpu(x, kernel, window_strides, padding):
    """A convolution in operations with which XLA is quick on a CPU.

    Times are of two cores, in November 2026; `docs/speed.md` has those of whole networks.

    - One of 1x1, or whose maps have 2x2 pixels and less, becomes the matrix product of its patches: the
      gradient of a 1x1 kernel takes half the time, a convolution of the tiniest maps an eighth.
    - One of few channels and a small map, as LeNet-5's two and the first of a ResNet for CIFAR-10, becomes
      the product of its strips with a banded matrix, and takes a quarter to a half of the time. It takes a
      third of a second more to compile, for which a small batch is not worth it.
    - With more channels, or larger maps, XLA's own is faster, and by `conv_in_order` inside a loop, too.
    - Barriers make XLA keep the input and the output. Without them it recomputes the input, transposed, for
      the gradient of the kernel, all the way back to the previous convolution or through all shortcuts of a
      stage, and likewise the gradient of the output: a ResNet-20's step takes a quarter longer.
    """
    keep = lax.optimization_barrier
    x = keep(x)
    height, width, channels, filters = kernel.shape
    pads = _pads(x, (height, width), window_strides, padding)
    padded = [sum(edges) + size for edges, size in zip(pads, x.shape[1:3], strict=True)]
    out_height, out_width = (
        (size - window) // stride + 1
        for size, window, stride in zip(padded, (height, width), window_strides, strict=True)
    )
    narrow = channels < 8 and out_width <= 32 and _block(out_width) >= 4
    if height * width == 1 or max(out_height, out_width) <= 2:
        factors = _patches_and_matrix
    elif narrow and x.shape[0] * out_height * out_width * kernel.size >= _WORTH_A_BAND:
        factors = _strips_and_band
    else:
        return keep(conv_in_order(x, kernel, tuple(window_strides), tuple(map(tuple, pads))))
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, matrix = factors(x, kernel, window_strides, out_height, out_width)
    return keep(keep(rows) @ keep(matrix)).reshape(-1, out_height, out_width, filters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_in_order(x, kernel, strides, pads):
    """A convolution whose gradients have the order of axes that XLA's library for CPUs wants.

    Those that JAX derives leave the arrays as they are and name their axes anew, batch and channels having
    changed places. XLA then moves the axes, but not inside a loop, where it computes without its library: a
    step of ResNet-20 on digits took 14 times as long (one core, November 2026).

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, F].
      strides: of the height and the width, a tuple.
      pads: zero pixels above and below, and left and right, a tuple of tuples.

    Returns:
      [B, H', W', F].
    """
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_ORDER)


def _conv_and_inputs(x, kernel, strides, pads):
    return conv_in_order(x, kernel, strides, pads), (x, kernel)


def _conv_gradients(strides, pads, inputs, gradient):
    x, kernel = inputs
    pads_of_x, pads_of_kernel = [], []
    for axis, (stride, (low, high)) in enumerate(zip(strides, pads, strict=True)):
        window = kernel.shape[axis]
        reach = (gradient.shape[1 + axis] - 1) * stride + 1  # of the first pixels of the windows
        rest = x.shape[1 + axis] + low + high - window + 1 - reach  # which no window begins at any more
        pads_of_x.append((window - 1 - low, window - 1 - high + rest))
        pads_of_kernel.append((low, high - rest))
    of_x = lax.conv_general_dilated(
        gradient,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        pads_of_x,
        lhs_dilation=strides,
        dimension_numbers=_ORDER,
    )
    of_kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        pads_of_kernel,
        rhs_dilation=strides,
        dimension_numbers=_ORDER,
    )
    return of_x, of_kernel.transpose(1, 2, 0, 3)


conv_in_order.defvjp(_conv_and_inputs, _conv_gradients)


def _patches_and_matrix(x, kernel, strides, out_height, out_width):
    """What each place of the map sees, a row each, and the kernel as a matrix: their product is the map."""
    height, width, channels, filters = kernel.shape
    patches = [
        x[:, i :: strides[0], j :: strides[1]][:, :out_height, :out_width]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(patches, axis=-1)
    return patches.reshape(-1, height * width * channels), kernel.reshape(-1, filters)


def _strips_and_band(x, kernel, strides, out_height, out_width):
    """What some neighbours in a row of the map see together, and a matrix that gives the map of all of them.

    In each column of the matrix the kernel stands where one of the neighbours sees it, between zeros. More
    is multiplied than needed, but in matrices that are wide enough for a processor to be quick with.
    """
    height, width, channels, filters = kernel.shape
    row_stride, stride = strides
    block = _block(out_width)
    reach = (block - 1) * stride + width
    by_row = [x[:, i::row_stride][:, :out_height] for i in range(height)]
    strips = [
        [rows[:, :, left : left + reach].reshape(-1, out_height, 1, reach * channels) for rows in by_row]
        for left in range(0, out_width * stride, block * stride)
    ]
    strips = jnp.block(strips).reshape(-1, height * reach * channels)
    return strips, _band(kernel, range(0, block * stride, stride), reach).reshape(-1, block * filters)


def _block(out_width):
    """How many neighbours a strip serves: the most, up to 8, of which a row has a whole number."""
    return max(size for size in range(1, 9) if out_width % size == 0)


def _band(kernel, lefts, reach):
    """A kernel at several places of a strip of `reach` pixels: [h, w, C, F] -> [h, reach, C, places, F]."""
    beside = [((0, 0), (left, reach - kernel.shape[1] - left), (0, 0), (0, 0)) for left in lefts]
    return jnp.stack([jnp.pad(kernel, pads) for pads in beside], axis=3)


def conv_of_wide_pixels(x, kernel, pads, size, **options):
    """A convolution of stride 1 that takes `size` neighbours in a row for one pixel with all their channels.

    Its kernel is banded, with zeros where a neighbour does not see another. Kernels of cuDNN compute 64
    filters at once, whether there are as many or not, so that with the 16 of a ResNet for CIFAR-10 the zeros
    cost nothing: its step takes a quarter less (`docs/speed.md`).

    Args:
      x: [B, H, W, C], of whose W pixels `size` make one.
      kernel: [h, w, C, F].
      pads: zero pixels above and below, and left and right.
      size: see `_pixels_in_one`.

    Returns:
      [B, H', W', F].
    """
    width, filters = kernel.shape[1], kernel.shape[-1]
    whole, left, reach = _wide_pixels(width, pads[1], size)
    band = _band(kernel, range(left, left + size), reach * size)
    band = band.reshape(kernel.shape[0], reach, -1, size * filters)
    x = x.reshape(*x.shape[:2], x.shape[2] // size, -1)
    x = lax.conv_general_dilated(x, band, (1, 1), (pads[0], whole), **options)
    return x.reshape(*x.shape[:2], -1, filters)


def _wide_pixels(width, pads, size):
    """Of a kernel: wide pixels of padding, where in them it begins, and how many of them it reaches over."""
    whole = [-(-pad // size) for pad in pads]
    left = whole[0] * size - pads[0]
    return whole, left, -(-(left + size - 1 + width) // size)


def _pixels_in_one(x, kernel, pads):
    """How many neighbours `conv_of_wide_pixels` should take for one: as many as have _FILTERS_AT_ONCE.

    1, where that is not worth it or a row has no whole number of them, before the convolution or after it.
    """
    height, width, channels, filters = kernel.shape
    size = _FILTERS_AT_ONCE // filters
    if height * width == 1 or size < 4 or size * channels > _FILTERS_AT_ONCE:
        return 1
    whole, _, reach = _wide_pixels(width, pads[1], size)
    out_width = x.shape[2] + sum(pads[1]) - width + 1
    fits = x.shape[2] % size == 0 and (x.shape[2] // size + sum(whole) - reach + 1) * size == out_width
    return size if fits else 1


def max_pool(x, window_shape, strides, padding="VALID"):
    """`nn.max_pool`, written so that XLA is quick with its gradient on a CPU and on a GPU.

    There XLA makes index arithmetic and a scatter of it. The step of a network that pools often, as
    GoogLeNet's, takes much longer so on a CPU than with `max_pool_by_shifts`, and on a GPU a third longer
    than with `max_pool_by_place` (`docs/speed.md`). On a TPU nothing is replaced.

    Args:
      x: [B, H, W, C].
      window_shape, strides: two of each, for height and width.
      padding: "VALID", "SAME", or cells before and after the height, and the width.

    Returns:
      [B, H', W', C].
    """
    if is_for_cpu():
        pool = max_pool_by_shifts
    elif platform() == "gpu":
        pool = max_pool_by_place
    else:
        pool = nn.max_pool
    return pool(x, window_shape, strides, padding=padding)


def max_pool_by_shifts(x, window_shape, strides, padding):
    """`nn.max_pool` as the largest of shifted maps, first of the columns of a window and then of its rows.

    In value and in gradient, which goes to the first of equal cells, it is the same. Barriers around it keep
    XLA from computing it again for its gradient.
    """
    x = lax.optimization_barrier(x)
    pads = _pads(x, window_shape, strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    for axis, window, stride in ((2, window_shape[1], strides[1]), (1, window_shape[0], strides[0])):
        last = x.shape[axis] - window
        shifts = [lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(window)]
        x = functools.reduce(_larger, shifts)
    return lax.optimization_barrier(x)


def max_pool_by_place(x, window_shape, strides, padding):
    """`nn.max_pool` that notes where in its window the largest cell lies, of equal ones the first.

    In value and in gradient it is the same. A cell's gradient is gathered from the windows that it lies in,
    while XLA scatters them, with atomic additions.
    """
    return _largest(x, (x.shape[1:3], window_shape, strides, _pads(x, window_shape, strides, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _largest(x, geometry):
    return _largest_and_place(x, geometry)[0]


def _largest_and_place(x, geometry):
    """Of each window the largest cell, and its number in the window, row after row: [B, H', W', C] both."""
    _, window_shape, strides, pads = geometry
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    ends = [size - window + 1 for size, window in zip(x.shape[1:3], window_shape, strict=True)]
    cells = [
        x[:, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
        for row, column in itertools.product(*map(range, window_shape))
    ]
    largest, place = cells[0], jnp.zeros(cells[0].shape, jnp.uint8)
    for number, cell in enumerate(cells[1:], start=1):
        place = jnp.where(_is_larger(largest, cell), place, jnp.uint8(number))
        largest = _larger(largest, cell)
    return largest, place


def _gather_gradients(geometry, place, gradient):
    shape, window_shape, strides, pads = geometry
    zero = jnp.zeros((), gradient.dtype)
    total = 0
    for number, offsets in enumerate(itertools.product(*map(range, window_shape))):
        spread = [(0, 0, 0)]
        for axis in range(2):
            before = offsets[axis] - pads[axis][0]
            reach = before + (gradient.shape[1 + axis] - 1) * strides[axis] + 1
            spread.append((before, shape[axis] - reach, strides[axis] - 1))
        total += lax.pad(jnp.where(place == number, gradient, zero), zero, (*spread, (0, 0, 0)))
    return (total,)


_largest.defvjp(_largest_and_place, _gather_gradients)


def _pads(x, window_shape, strides, padding):
    if isinstance(padding, str):
        return lax.padtype_to_pads(x.shape[1:3], window_shape, strides, padding)
    return padding


def _larger(a, b):
    # `jnp.maximum` would halve the gradient between equals.
    return jnp.where(_is_larger(a, b), a, b)


def _is_larger(a, b):
    """Whether a wins over b: where it is larger or equal, and where it is NaN, which must propagate."""
    return (a >= b) | jnp.isnan(a)
