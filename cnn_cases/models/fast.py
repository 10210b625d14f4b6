"""Some of Flax's operations, rewritten so that XLA runs them faster, with the same values and gradients.

On a CPU or GPU, some of them have no forward-mode derivative, which `jax.jvp` and Hessian-vector products
need: trace such computations inside `written_for("tpu")`, which selects Flax's operations. Where a map or a
gradient holds a NaN or an infinity, pixels beside those that see it can become NaN, too: some of these forms
multiply it by zeros.

You can read the networks without this file: take `conv_general_dilated` for `lax.conv_general_dilated`,
`matrix_product` for `@`, `max_pool` and `avg_pool` for those of `nn`, `relu` for `nn.relu`, and `keep(x)`
for x. `docs/speed.md` has the measurements.
"""

import contextlib
import contextvars
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

_WORTH_A_BAND = 10_000_000  # multiplications from which on a band pays off; see `_conv_for_cpu`
_ORDER = ("NHWC", "HWIO", "NHWC")  # axis order of images, kernel and result
_OPTIONS = {"lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count", "precision"}
_FILTERS_AT_ONCE = 64  # that a GPU's matrix units compute; see `conv_of_wide_pixels`

_written_for = contextvars.ContextVar("written_for", default=None)


def platform():
    """Returns the platform to write layers for, "cpu", "gpu" or "tpu": `written_for`'s, or else JAX's."""
    return _written_for.get() or jax.default_backend()


@contextlib.contextmanager
def written_for(name):
    """Writes the layers traced inside it for the platform `name`, even if there is no such device."""
    token = _written_for.set(name)
    try:
        yield
    finally:
        _written_for.reset(token)


def is_for_cpu():
    """Returns whether layers are written for XLA's CPU compiler."""
    return platform() == "cpu"


def keep(x):
    """Returns x, which XLA's CPU compiler then stores instead of computing it again wherever it is used.

    For the sum in a residual block, that would go back to the first block of the stage: the sum of the block
    before, on which it depends, is computed again as well.
    """
    return lax.optimization_barrier(x) if is_for_cpu() else x


def conv_general_dilated(x, kernel, window_strides, padding, **options):
    """`lax.conv_general_dilated`, written so that XLA runs it and its gradients fast.

    - On a CPU, `_conv_for_cpu` replaces it.
    - On a GPU, a kernel as large as the map is a dense layer, and becomes a matrix product: cuDNN needs the
      kernel transposed, which costs VGG's dense layers 2.2 GB of memory traffic a step (`docs/speed.md`). If
      there are few filters, `conv_of_wide_pixels` joins neighbours in a row into one pixel with all their
      channels.
    - On a CPU and a TPU, a grouped convolution becomes one convolution for each group. On a CPU, the gradient
      of a kernel in two groups takes fifteen times as long as those of two kernels. On a TPU, the change
      makes a step of AlexNet with two groups an eighth shorter, by the compiler's estimate.
    - Others than those of the networks here keep `lax`'s form; see `_is_like_ours`.

    Without `options`, nothing is dilated and there is one group.

    Shapes: x [B, H, W, C], kernel [h, w, C / groups, F] -> [B, H', W', F].

    Raises:
      ValueError: the maps are smaller than the kernel.
    """
    undilated = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
    options = undilated | {"dimension_numbers": _ORDER, "precision": None} | options
    if not _is_like_ours(x, kernel, options):
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    pads = _pads(x, kernel.shape[:2], window_strides, padding)
    groups = options["feature_group_count"]
    if groups > 1 and (is_for_cpu() or platform() == "tpu"):
        options |= {"feature_group_count": 1}
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        parts = [conv_general_dilated(*part, window_strides, pads, **options) for part in parts]
        return jnp.concatenate(parts, axis=-1)
    if is_for_cpu():
        return _conv_for_cpu(x, kernel, window_strides, pads)
    if platform() == "gpu":
        if x.shape[1:] == kernel.shape[:-1] and not any(map(any, pads)):
            matrix = kernel.reshape(-1, kernel.shape[-1])
            return jnp.dot(x.reshape(len(x), -1), matrix, precision=options["precision"])[:, None, None]
        size = _pixels_in_one(x, kernel, pads) if max(window_strides) == groups == 1 else 1
        if size > 1:
            return conv_of_wide_pixels(x, kernel, pads, size, **options)
    return lax.conv_general_dilated(x, kernel, window_strides, pads, **options)


def _is_like_ours(x, kernel, options):
    """Returns whether a convolution is of the kind that the networks here have, and so can be rewritten.

    It has two spatial axes, no dilation, this axis order and only options that `nn.Conv` passes. What `lax`
    rejects is not, so that it says why: the products of `_conv_for_cpu` may fit where the kernel does not.
    """
    groups = options["feature_group_count"]
    orders = (options["dimension_numbers"], _ORDER)
    return (
        kernel.ndim == 4
        and options.keys() <= _OPTIONS
        and len({lax.conv_dimension_numbers(x.shape, kernel.shape, order) for order in orders}) == 1
        and max(*options["lhs_dilation"], *options["rhs_dilation"]) == 1
        and _are_whole(x, kernel)
        and x.dtype == kernel.dtype
        and x.shape[-1] == groups * kernel.shape[2]
        and kernel.shape[3] % groups == 0
    )


def _are_whole(*arrays):
    """Returns whether the arrays' types give all sizes, and no split over the devices of a mesh.

    `jax.export` can leave sizes open. Under `jax.set_mesh` types tell a split, and only operations of `lax`
    know how their results are split then.
    """
    types = [jax.typeof(array) for array in arrays]
    return all(isinstance(size, int) for one in types for size in one.shape) and not any(
        axis for one in types for axis in one.sharding.spec
    )


def _conv_for_cpu(x, kernel, window_strides, pads):
    """A convolution in operations that XLA runs fast on a CPU.

    Times were measured on two cores in November 2026; `docs/speed.md` has those of whole networks.

    - A 1x1 convolution, or one whose output maps have at most 2x2 pixels, becomes a matrix product of its
      patches: the gradient of a 1x1 kernel takes half the time, a convolution of the smallest maps an eighth.
    - A convolution of few channels on a small map, such as both of LeNet-5 and the first of a ResNet for
      CIFAR-10, becomes the product of its strips with a banded matrix and takes a quarter to a half of the
      time. It takes a third of a second longer to compile, which does not pay off for a small batch.
    - With more channels or larger maps, XLA's own convolution is faster; `conv_in_order` keeps it fast inside
      a loop, and computes two neighbours at once if there are few filters.
    - The input and the output are kept, see `keep`. XLA would recompute the transposed input for the gradient
      of the kernel, all the way back to the previous convolution, and likewise the gradient of the output:
      without any barriers, a step of ResNet-20 takes half as long again.
    """
    x = keep(x)
    height, width, channels, filters = kernel.shape
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
    return keep(matrix_product(keep(rows), keep(matrix))).reshape(-1, out_height, out_width, filters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_in_order(x, kernel, strides, pads):
    """A convolution whose gradients have the axis order that XLA's CPU library needs.

    JAX's own gradients leave the arrays as they are and rename their axes, with batch and channels swapped.
    XLA then transposes the arrays, but not inside a loop, where it computes without its library: a step of
    ResNet-20 on digits took 16 times as long (one core, November 2026).

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, F].
      strides: (vertical, horizontal), a tuple.
      pads: pixels of zero padding, ((above, below), (left, right)), a tuple of tuples.

    Returns:
      [B, H', W', F].
    """
    return _conv_of_pairs(x, kernel, pads, strides=strides)


def _conv_and_inputs(x, kernel, strides, pads):
    return conv_in_order(x, kernel, strides, pads), (x, kernel)


def _conv_gradients(strides, pads, inputs, gradient):
    x, kernel = inputs
    # XLA would transpose x right after the forward convolution, and store both forms until here.
    x, gradient = keep((x, gradient))
    pads_of_x, pads_of_kernel = [], []
    for axis, (stride, (low, high)) in enumerate(zip(strides, pads, strict=True)):
        window = kernel.shape[axis]
        reach = (gradient.shape[1 + axis] - 1) * stride + 1  # from the first window's start to the last's
        rest = x.shape[1 + axis] + low + high - window + 1 - reach  # unused starts after that
        pads_of_x.append((window - 1 - low, window - 1 - high + rest))
        pads_of_kernel.append((low, high - rest))
    of_x = _conv_of_pairs(gradient, kernel[::-1, ::-1].swapaxes(2, 3), pads_of_x, dilation=strides)
    of_kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        pads_of_kernel,
        rhs_dilation=strides,
        dimension_numbers=_ORDER,
    )
    # Not the x from the barrier, which takes the gradient's type: it may be shared by fewer devices.
    return _summed_as(inputs[0], of_x), _summed_as(kernel, of_kernel.transpose(1, 2, 0, 3))


def _summed_as(value, gradient):
    """Returns the gradient of `value`; inside `jax.shard_map`, its sum over the devices that share `value`.

    JAX does so in the gradients of its own operations, of which an addition is one, and leaves it to others.
    """
    if jax.typeof(gradient) == jax.typeof(value):
        return gradient
    return jax.vjp(lambda value: value + gradient, value)[1](gradient)[0]


conv_in_order.defvjp(_conv_and_inputs, _conv_gradients)


def _conv_of_pairs(x, kernel, pads, *, strides=(1, 1), dilation=(1, 1)):
    """A convolution that computes two neighbours in a row at once if there are few filters.

    What two neighbours see is hardly wider than what one sees, and XLA's CPU library has half as many patches
    to copy, each for twice as many filters. With the 16 filters of a ResNet for CIFAR-10 this takes a sixth
    less time, although a quarter of the kernel is zeros; with 32 it takes longer.
    """
    width, filters = kernel.shape[1], kernel.shape[-1]
    out_width = x.shape[2] + sum(pads[1]) - width + 1
    if max(*strides, *dilation) > 1 or width < 3 or filters > 16 or out_width % 2:
        return lax.conv_general_dilated(
            x, kernel, strides, pads, lhs_dilation=dilation, dimension_numbers=_ORDER
        )
    band = _band(kernel, range(2), width + 1)
    band = band.reshape(*band.shape[:3], 2 * filters)
    pairs = lax.conv_general_dilated(x, band, (1, 2), pads, dimension_numbers=_ORDER)
    return pairs.reshape(*pairs.shape[:2], out_width, filters)


def matrix_product(x, matrix):
    """`x @ matrix`, written so that XLA computes its gradients fast on a CPU.

    Each gradient is a product with a transposed factor, or the transpose of such a product. XLA always takes
    the first form, in which the kernel of a dense layer is transposed: for VGG-16 and two images, that was a
    third of a training step. Here the form with less to transpose is taken. Barriers keep XLA from joining
    transposition and product again.

    Shapes: x [..., C], matrix [C, F] -> [..., F].
    """
    if is_for_cpu() and x.ndim == 2 and _are_whole(x, matrix):
        return _product(x, matrix)
    return x @ matrix


@jax.custom_vjp
def _product(rows, matrix):
    return rows @ matrix


def _product_and_factors(rows, matrix):
    return rows @ matrix, (rows, matrix)


def _product_gradients(factors, gradient):
    rows, matrix = factors
    rows, gradient = keep((rows, gradient))  # as in `_conv_gradients`
    if gradient.size + rows.size < matrix.size:
        of_rows = keep(matrix @ keep(gradient.T)).T
    else:
        of_rows = gradient @ keep(matrix.T)
    if gradient.size + matrix.size < rows.size:
        of_matrix = keep(keep(gradient.T) @ rows).T
    else:
        of_matrix = keep(rows.T) @ gradient
    # XLA would copy the matrix: the optimizer might change it, in place, before `of_rows` has read it.
    of_rows, of_matrix = keep((of_rows, of_matrix))
    return _summed_as(factors[0], of_rows), _summed_as(matrix, of_matrix)  # as in `_conv_gradients`


_product.defvjp(_product_and_factors, _product_gradients)


def _patches_and_matrix(x, kernel, strides, out_height, out_width):
    """Returns the patches of output pixels as rows, and the kernel as a matrix: their product is the map."""
    height, width, channels, filters = kernel.shape
    last = (out_height - 1) * strides[0], (out_width - 1) * strides[1]
    patches = [
        lax.slice(x, (0, i, j, 0), (len(x), last[0] + i + 1, last[1] + j + 1, channels), (1, *strides, 1))
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(patches, axis=-1)
    return patches.reshape(-1, height * width * channels), kernel.reshape(-1, filters)


def _strips_and_band(x, kernel, strides, out_height, out_width):
    """Returns the strips that neighbours in a row of the map see, and a matrix: their product is the map.

    Each column of the matrix has the kernel where one of the neighbours sees it, and zeros elsewhere. This
    multiplies more than needed, but in matrices that are wide enough for a processor to be fast with.
    """
    height, width, channels, filters = kernel.shape
    row_stride, stride = strides
    block = _block(out_width)
    reach = (block - 1) * stride + width
    last = (out_height - 1) * row_stride
    by_row = [lax.slice_in_dim(x, i, last + i + 1, row_stride, axis=1) for i in range(height)]
    strips = [
        [rows[:, :, left : left + reach].reshape(-1, out_height, 1, reach * channels) for rows in by_row]
        for left in range(0, out_width * stride, block * stride)
    ]
    strips = jnp.block(strips).reshape(-1, height * reach * channels)
    return strips, _band(kernel, range(0, block * stride, stride), reach).reshape(-1, block * filters)


def _block(out_width):
    """Returns how many neighbours share a strip: the largest number up to 8 that divides `out_width`."""
    return max(size for size in range(1, 9) if out_width % size == 0)


def _band(kernel, lefts, reach):
    """Puts a kernel at several places in `reach` pixels: [h, w, C, F] -> [h, reach, C, places, F]."""
    beside = [((0, 0), (left, reach - kernel.shape[1] - left), (0, 0), (0, 0)) for left in lefts]
    return jnp.stack([jnp.pad(kernel, pads) for pads in beside], axis=3)


def conv_of_wide_pixels(x, kernel, pads, size, **options):
    """A convolution of stride 1 that treats `size` neighbours in a row as one pixel with all their channels.

    Its kernel is banded, with zeros where one neighbour does not see another. Kernels of cuDNN compute 64
    filters at once even if there are fewer, so the zeros cost nothing with the 16 filters of a ResNet for
    CIFAR-10: its step takes a quarter less time (`docs/speed.md`).

    Args:
      x: [B, H, W, C]; `size` divides W.
      kernel: [h, w, C, F].
      pads: pixels of zero padding, ((above, below), (left, right)).
      size: pixels in a wide pixel; see `_pixels_in_one`.

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
    """Returns the wide pixels of padding, the kernel's offset, and the wide pixels that the band spans."""
    whole = [-(-pad // size) for pad in pads]
    left = whole[0] * size - pads[0]
    return whole, left, -(-(left + size - 1 + width) // size)


def _pixels_in_one(x, kernel, pads):
    """Returns how many neighbours `conv_of_wide_pixels` should join to have _FILTERS_AT_ONCE filters.

    1 if that does not pay off, or if a row, before or after the convolution, is not a whole number of them.
    """
    height, width, channels, filters = kernel.shape
    size = _FILTERS_AT_ONCE // filters
    if height * width == 1 or size < 4 or size * channels > _FILTERS_AT_ONCE:
        return 1
    whole, _, reach = _wide_pixels(width, pads[1], size)
    out_width = x.shape[2] + sum(pads[1]) - width + 1
    fits = x.shape[2] % size == 0 and (x.shape[2] // size + sum(whole) - reach + 1) * size == out_width
    return size if fits else 1


@jax.custom_jvp
def relu(x):
    """`nn.relu` whose gradient is computed from the result, for sums: those of a convolution and a bias, say.

    Value and gradient are the same. Nobody then needs x: on a GPU, the convolution itself adds the bias and
    applies the ReLU, and memory holds one map instead of two. On a CPU, the result is kept, see `keep`. After
    batch normalisation, `nn.relu` is better: the gradient of the norm reads its input anyway, from which XLA
    computes x again.
    """
    return keep(jnp.maximum(x, 0))


@relu.defjvp
def _relu_and_change(values, changes):
    result = relu(*values)
    # Not `result > 0`, which XLA simplifies to `x > 0`.
    return result, jnp.where(result != 0, *changes, 0)


def max_pool(x, window_shape, strides, padding="VALID"):
    """`nn.max_pool`, written so that XLA runs its gradient fast on a CPU and on a GPU.

    On these, XLA turns the gradient of `nn.max_pool` into index arithmetic and a scatter. A step of a network
    that pools often, such as GoogLeNet, then takes much longer on a CPU than with `max_pool_by_shifts`, and a
    third longer on a GPU than with `max_pool_by_place` (`docs/speed.md`). On a TPU, `nn.max_pool` is used.

    Args:
      x: [B, H, W, C].
      window_shape, strides: (height, width) of the window, (vertical, horizontal) strides.
      padding: "VALID", "SAME", or pixels of padding, ((above, below), (left, right)).

    Returns:
      [B, H', W', C].

    Raises:
      ValueError: the maps are smaller than the window.
    """
    pads = _pads(x, window_shape, strides, padding)
    if is_for_cpu():
        pool = max_pool_by_shifts
    elif platform() == "gpu":
        pool = max_pool_by_place
    else:
        pool = nn.max_pool
    return pool(x, window_shape, strides, padding=pads)


def max_pool_by_shifts(x, window_shape, strides, padding):
    """`nn.max_pool` as the maximum of shifted maps, first over a window's columns and then over its rows.

    Value and gradient are the same; the gradient goes to the first of equal cells. The barriers around it
    keep XLA from recomputing it for its gradient.
    """
    x = keep(x)
    pads = _pads(x, window_shape, strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    for axis in (2, 1):
        x = functools.reduce(_larger, _shifts(x, axis, window_shape, strides))
    return keep(x)


def _shifts(x, axis, window_shape, strides):
    """Returns, for each place in a window along axis 1 or 2 of x, that cell of all windows."""
    window, stride = window_shape[axis - 1], strides[axis - 1]
    last = x.shape[axis] - window
    return [lax.slice_in_dim(x, i, last + i + 1, stride, axis) for i in range(window)]


def max_pool_by_place(x, window_shape, strides, padding):
    """`nn.max_pool` that records where in its window the largest cell lies (the first of equal ones).

    Value and gradient are the same. A cell's gradient is gathered from the windows that contain the cell,
    whereas XLA scatters the windows' gradients with atomic additions.
    """
    return _largest(x, (x.shape[1:3], window_shape, strides, _pads(x, window_shape, strides, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _largest(x, geometry):
    return _largest_and_place(x, geometry)[0]


def _largest_and_place(x, geometry):
    """Returns each window's largest cell and its row-major index in the window, both [B, H', W', C]."""
    _, window_shape, strides, pads = geometry
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    ends = [size - window + 1 for size, window in zip(x.shape[1:3], window_shape, strict=True)]
    cells = [
        x[:, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
        for row, column in itertools.product(*map(range, window_shape))
    ]
    numbers = np.arange(len(cells), dtype=np.min_scalar_type(len(cells) - 1))  # a byte for up to 16x16 cells
    largest, place = cells[0], jnp.zeros(cells[0].shape, numbers.dtype)
    for number, cell in zip(numbers[1:], cells[1:], strict=True):
        place = jnp.where(_is_larger(largest, cell), place, number)
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


def avg_pool(x, window_shape, strides, padding="VALID"):
    """`nn.avg_pool`, written so that XLA runs it and its gradient fast on a CPU: `avg_pool_by_shifts`.

    Padding counts as zeros. Shapes and errors are those of `max_pool`.
    """
    pads = _pads(x, window_shape, strides, padding)
    pool = avg_pool_by_shifts if is_for_cpu() else nn.avg_pool
    return pool(x, window_shape, strides, padding=pads)


def avg_pool_by_shifts(x, window_shape, strides, padding):
    """`nn.avg_pool` as the mean of shifted maps, first over a window's columns and then over its rows.

    Value and gradient are the same up to rounding. XLA adds up each window of `nn.avg_pool` cell by cell, and
    in its gradient visits the zeros between the windows, too: that of a side branch of GoogLeNet, for eight
    images, takes 5 ms, and this one 0.14 (two cores, 2026-12-01).
    """
    x = keep(x)
    x = jnp.pad(x, ((0, 0), *_pads(x, window_shape, strides, padding), (0, 0)))
    of_columns = keep(functools.reduce(jnp.add, _shifts(x, 2, window_shape, strides)))
    of_windows = functools.reduce(jnp.add, _shifts(of_columns, 1, window_shape, strides))
    return keep(of_windows / math.prod(window_shape))


def _pads(x, window_shape, strides, padding):
    """Returns the pixels of padding, ((above, below), (left, right)).

    Raises ValueError if no window fits: the result would be an empty map, and its mean NaN.
    """
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], window_shape, strides, padding)
    sides = zip(x.shape[1:3], pads, window_shape, strict=True)
    if any(side + sum(edges) < window for side, edges, window in sides):
        raise ValueError(
            f"a feature map of {x.shape[1]}x{x.shape[2]} pixels is smaller than a window of "
            f"{window_shape[0]}x{window_shape[1]}: the images are too small for this network "
            "(data.image_size, data.border)"
        )
    return pads


def _larger(a, b):
    # `jnp.maximum` would split the gradient between equal values.
    return jnp.where(_is_larger(a, b), a, b)


def _is_larger(a, b):
    """Returns whether `a` wins over `b`: it does if it is at least as large, or NaN, which must propagate."""
    return (a >= b) | jnp.isnan(a)
