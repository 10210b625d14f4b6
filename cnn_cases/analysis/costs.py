"""Counts what a network costs, layer by layer: parameters, multiply-adds and memory of activations.

    python -m cnn_cases.analysis.costs configs/lenet5_digits.py
    python -m cnn_cases.analysis.costs configs/resnet_digits.py --set model.depth=56
    python -m cnn_cases.analysis.costs configs/lenet5_digits.py configs/resnet_digits.py --figure=costs.png

The layers are those that Flax calls while it traces the model on shapes alone (`nn.intercept_methods` under
`jax.eval_shape`), so no layer is described twice, nothing is computed and no parameter is allocated.

A layer is a module that has parameters itself, or a pooling. Each layer has three costs besides parameters:

    multiply-adds  for one image. Each weight of a kernel counts once for each pixel of the output map, in
                   dense layers and in convolutions with or without groups; in a transposed convolution, once
                   for each pixel of the input. Products with padding count, as is usual and as in the
                   lecture. Biases, norms, poolings and activation functions do not count, nor do products of
                   two maps, as in attention.
    forward        bytes of the layer's input and output for the whole batch, which it needs while it runs.
                   The total is the maximum: the peak of a net that runs layer by layer, without the memory of
                   branches that wait for each other.
    kept           bytes that the backward pass needs again, for the whole batch: the input of each layer with
                   parameters, in the layer's compute type, and of each max pooling. An input of several
                   layers counts for the first of them. The total is the sum. Operations between layers
                   (ReLU, dropout, response normalisation, additions) are not seen, although some of their
                   values are kept too, above all the sign for ReLU.

Forward and kept are the memory that the network itself needs. A compiled program may need another amount,
since the compiler can fuse layers; `cnn_cases.studies.bottleneck` measures that for two examples.

Totals cover the trunk, which is what runs at inference. The side branches (auxiliary classifiers), which run
only in training, have separate totals.
"""

import argparse
import ast
import collections
import contextlib
import json
import math
import pathlib
import re
import runpy
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from matplotlib.figure import Figure

from cnn_cases import parsing, settings, tables
from cnn_cases.models import fast, make_model
from cnn_cases.models.layers import BatchNorm, Conv, Dense

KINDS = {
    Conv: "conv",
    nn.Conv: "conv",
    nn.ConvTranspose: "transposed conv",
    Dense: "dense",
    nn.Dense: "dense",
    nn.DenseGeneral: "dense",
    BatchNorm: "batch norm",
}

# Height, width and channels of the images, and number of classes, of the data sets that the configs use.
# Height and width are None if the images vary in size.
DATA_SETS = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenette": ((None, None, 3), 10),
    "imagenet2012": ((None, None, 3), 1000),
}


class Layer(NamedTuple):
    """One row of the table; shapes omit the batch axis."""

    name: str  # the path of the module, as in the tree of parameters
    kind: str
    kernel: tuple[int, ...]  # height and width, () if there is no window
    stride: tuple[int, ...]  # vertical and horizontal, () if there is no window
    output: tuple[int, ...]
    repeats: int  # copies that run one after another (`nn.scan`) and share this row
    parameters: int
    multiply_adds: int  # for one image
    forward: int  # bytes for the batch
    kept: int  # bytes for the batch
    side: bool  # runs in training only


class Total(NamedTuple):
    """Sums over layers; for `forward`, the maximum."""

    parameters: int
    multiply_adds: int
    forward: int
    kept: int


class _Call(NamedTuple):
    """The record of a layer's call while the model is traced; in a scan, of one of the repetitions."""

    path: tuple[str, ...]  # of the module; for a pooling, of the module that calls it
    name: str
    kind: str
    input: Any  # one or several arrays; keeping them keeps their ids unique
    output: Any
    params: dict  # of the module itself, {name: array}
    computes_in: Any = None  # the type to which the input is converted; None for the input's type
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    multiply_adds: int = 0


def count(model, image_shape, batch_size=1):
    """Returns the layers of a model in the order in which they run, those of side branches last.

    Args:
      model: a Linen module, called as `model(image, train)`.
      image_shape: height, width and channels.
      batch_size: number of images, for the memory.

    Returns:
      A list of Layer.

    Raises:
      ValueError: the model rejects its settings or the image; the multiply-adds of a layer cannot be counted;
        or a layer runs several times with the same parameters, which tracing cannot tell from a loop.
    """
    image = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    # `init` runs the whole model; `apply` with train=False runs the trunk only.
    variables, calls, entered = _trace(lambda image: model.init(jax.random.key(0), image, train=False), image)
    _, _, trunk = _trace(
        lambda variables, image: model.apply(variables, image, train=False), variables, image
    )

    params = traverse_util.flatten_dict(variables["params"])
    weighted = {call.path for call in calls if call.params}
    # A pooling inside a layer has no row of its own, unless that layer contains other layers too.
    single = weighted - {path[:depth] for path in weighted for depth in range(len(path))}
    calls = [call for call in calls if call.params or call.path not in single]
    calls.sort(key=lambda call: call.path not in trunk)
    layers, kept = [], set()
    for call in calls:
        repeats = _repeats(call, calls, params, entered)
        wanted = [call.input] if call.params or call.kind == "max pool" else []
        newly = [leaf for leaf in jax.tree.leaves(wanted) if id(leaf) not in kept]
        kept.update(map(id, newly))
        layers.append(
            Layer(
                name=call.name,
                kind=call.kind,
                kernel=call.kernel,
                stride=call.stride,
                output=jax.tree.leaves(call.output)[0].shape[1:],
                repeats=repeats,
                parameters=repeats * sum(leaf.size for leaf in call.params.values()),
                multiply_adds=repeats * call.multiply_adds,
                forward=_bytes(call.input) + _bytes(call.output),
                kept=repeats * _bytes(newly, call.computes_in),
                side=call.path not in trunk,
            )
        )
    return layers


def total(layers, side=False):
    """Returns the Total of the trunk or, with `side`, of the side branches."""
    layers = [layer for layer in layers if layer.side == side]
    return Total(
        parameters=sum(layer.parameters for layer in layers),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        forward=max((layer.forward for layer in layers), default=0),
        kept=sum(layer.kept for layer in layers),
    )


def _trace(run, *inputs):
    """Traces `run(*inputs)`, which calls a model once.

    Returns:
      The shapes of the results, a list of _Call, and how often each module was entered, {path: times}.
    """
    calls, entered, inside = [], collections.Counter(), []

    def note(*call, **more):
        # The body of an `nn.scan` is traced several times; the first is enough.
        if entered[inside[-1]] == 1:
            calls.append(_Call(inside[-1], *call, **more))

    def watch_module(method, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        inside.append(module.path)
        entered[module.path] += 1
        output = method(*args, **kwargs)
        params = module.variables.get("params", {})
        own = {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)}
        if own:
            given = [leaf for leaf in jax.tree.leaves((args, kwargs)) if hasattr(leaf, "shape")]
            # The network itself has an empty path, so its parameters give the name.
            name = "/".join(module.path) or ", ".join(own)
            kind = KINDS.get(type(module), type(module).__name__)
            computes_in = jnp.float32 if isinstance(module, BatchNorm) else getattr(module, "dtype", None)
            more = _of_kernel(module, own["kernel"], given, output) if "kernel" in own else {}
            note(name, kind, given, output, own, computes_in, **more)
        inside.pop()
        return output

    def watch_pooling(function, kind):
        def pool(inputs, window_shape, strides=None, **options):
            output = function(inputs, window_shape, strides, **options)
            number = sum(call.path == inside[-1] and call.kind == kind for call in calls) + 1
            name = "/".join((*inside[-1], f"{kind.replace(' ', '_')}{number}"))
            note(name, kind, inputs, output, {}, kernel=tuple(window_shape), stride=_pair(strides))
            return output

        return pool

    poolings = (
        (nn, "max_pool", "max pool"),
        (nn, "avg_pool", "average pool"),
        (fast, "max_pool_by_shifts", "max pool"),
        (fast, "max_pool_by_place", "max pool"),
        (fast, "avg_pool_by_shifts", "average pool"),
    )
    # `nn.intercept_methods` reports methods of modules only; poolings are plain functions.
    with contextlib.ExitStack() as stack:
        for home, function, kind in poolings:
            original = getattr(home, function)
            setattr(home, function, watch_pooling(original, kind))
            stack.callback(setattr, home, function, original)
        stack.enter_context(nn.intercept_methods(watch_module))
        shapes = jax.eval_shape(run, *inputs)
    return shapes, calls, entered


def _of_kernel(module, kernel, given, output):
    """Returns the fields of _Call that only a layer with a kernel has."""
    if hasattr(module, "kernel_size"):
        window = tuple(np.atleast_1d(module.kernel_size).tolist())
    else:
        window = kernel.shape[:2] if kernel.ndim > 2 and not isinstance(module, nn.DenseGeneral) else ()
    stride = _pair(getattr(module, "strides", 1)) if window else ()
    places = _places(module, given, jax.tree.leaves(output))
    return {"kernel": window, "stride": stride, "multiply_adds": kernel.size * places}


def _places(module, given, output):
    """Returns how often one image uses each weight of a module's kernel in a call with these maps."""
    if isinstance(module, nn.ConvLocal):
        return 1
    if isinstance(module, nn.ConvTranspose):
        return math.prod(given[0].shape[1:-1])
    if isinstance(module, nn.Einsum) or getattr(module, "batch_dims", ()):
        name = "/".join(module.path)
        raise ValueError(f"cannot count the multiply-adds of {name} ({type(module).__name__})")
    if isinstance(module, nn.DenseGeneral):
        return math.prod(output[0].shape[1:]) // math.prod(np.atleast_1d(module.features).tolist())
    return math.prod(output[0].shape[1:-1])


def _repeats(call, calls, params, entered):
    """Returns how often a layer runs: once, or once for each copy of its parameters in a scan's stack."""
    if not call.params and entered[call.path] == 1:
        return 1
    # A pooling inside a scan runs as often as the layers next to it.
    beside = (one for one in calls if one.params and one.path[: len(call.path)] == call.path)
    witness = call if call.params else next(beside, None)
    if witness is not None:
        name, seen = next(iter(witness.params.items()))
        full = params[*witness.path, name]
        if full.shape != seen.shape:
            return full.size // seen.size
    if entered[call.path] > 1:
        raise ValueError(
            f"{call.name} runs several times with the same parameters; the number of runs cannot be "
            "determined"
        )
    return 1


def _pair(strides):
    return (strides or 1,) * 2 if isinstance(strides, int | None) else tuple(strides)


def _bytes(arrays, dtype=None):
    """Returns the bytes of arrays, converted to `dtype` if it is given."""
    return sum(one.size * jnp.dtype(dtype or one.dtype).itemsize for one in jax.tree.leaves(arrays))


class Report(NamedTuple):
    """The costs of one config."""

    config: str  # its file
    model: str  # its name in the registry
    image_shape: tuple[int, int, int]
    batch_size: int
    layers: list[Layer]


def analyse(path, image_shape=None, num_classes=None, batch_size=1, overrides=()):
    """Returns the Report of a config file.

    Args:
      path: of a training config, followed by a colon and its choice if it takes one.
      image_shape: height, width, channels; None for those of the config's data set, resized to its
        data.image_size, with its data.border.
      num_classes: None for that of the config's data set.
      batch_size: number of images, for the memory.
      overrides: pairs of a key, such as "model.depth", and the value that replaces the file's.

    Raises:
      ValueError: the file is not a training config, or its model or data set is impossible or unknown.
    """
    file, _, choice = str(path).partition(":")
    try:
        config = runpy.run_path(file)["get_config"](*[choice] if choice else [])
    except Exception as error:  # a file that is not a config may raise anything
        raise ValueError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from error
    for key, value in overrides:
        try:
            settings.override(config, key, value)
        except ValueError as error:
            raise ValueError(f"{path}: {key} = {value!r}: {error}") from error
    try:
        settings.check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    (*size, channels), classes = DATA_SETS.get(re.split("[/:]", config.data.name)[0], ((None,) * 3, None))
    if image_shape is None:
        size = [config.data.image_size or pixels for pixels in size]
        image_shape = (*(pixels and pixels + 2 * config.data.border for pixels in size), channels)
    num_classes = num_classes or classes
    if None in image_shape:
        also = " and --num_classes=N" if num_classes is None else ""
        raise ValueError(
            f"{path}: the image shape of data.name = {config.data.name!r} is unknown to this command; "
            f"give it with --image_shape=HEIGHTxWIDTHxCHANNELS{also}"
        )
    if num_classes is None:
        raise ValueError(
            f"{path}: the number of classes of data.name = {config.data.name!r} is unknown to this "
            "command; give it with --num_classes=N"
        )
    try:
        model = make_model(**config.model, num_classes=num_classes, dtype=config.dtype)
        layers = count(model, image_shape, batch_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Report(path, config.model.name, tuple(image_shape), batch_size, layers)


def render(reports, form):
    """Returns the tables as text: one for each report, then, if there are several, one that compares totals.

    Args:
      reports: [Report].
      form: "text" or "markdown", for people; for programs, with bytes and without rounding, "csv" (a line for
        each layer of each report) or "json" (everything).
    """
    if form == "json":
        return json.dumps([_as_dict(report) for report in reports], indent=2) + "\n"
    if form == "csv":
        lines = [["config", *Layer._fields]]
        for report in reports:
            for layer in report.layers:
                cells = layer._replace(
                    kernel=_times(layer.kernel), stride=_times(layer.stride), output=_times(layer.output)
                )
                lines.append([report.config, *cells])
        return tables.comma_separated(lines)
    parts = [f"{_title(report)}\n\n{_table(_rows(report), form)}" for report in reports]
    if len(reports) > 1:
        parts.append(f"Side by side\n\n{_table(_comparison(reports), form)}")
    return "\n".join(parts)


def _as_dict(report):
    sums = {"total": total(report.layers)._asdict()}
    if any(layer.side for layer in report.layers):
        sums["side_branches"] = total(report.layers, side=True)._asdict()
    return report._asdict() | {"layers": [layer._asdict() for layer in report.layers]} | sums


def _title(report):
    images = "one image" if report.batch_size == 1 else f"{report.batch_size} images"
    return f"{report.config}: {report.model}, {images} of {_times(report.image_shape)}"


def _rows(report):
    """Returns the table of one report: header, then a row for each layer, then the totals."""
    whole = total(report.layers)

    def share(part, all_of_it):
        return f"{part / all_of_it:.1%}" if part and all_of_it else ""

    shapes, numbers = ["kernel", "stride", "output"], ["parameters", "share", "multiply-adds", "share"]
    rows = [["layer", "kind", *shapes, *numbers, "forward MiB", "kept MiB"]]
    for layer in report.layers:
        parameters, multiply_adds, *memory = _cells(layer)
        rows.append(
            [
                layer.name + (f" x {layer.repeats}" if layer.repeats > 1 else ""),
                layer.kind,
                _times(layer.kernel),
                _times(layer.stride if len(set(layer.stride)) > 1 else layer.stride[:1]),
                _times(layer.output),
                parameters,
                "" if layer.side else share(layer.parameters, whole.parameters),
                multiply_adds,
                "" if layer.side else share(layer.multiply_adds, whole.multiply_adds),
                *memory,
            ]
        )
    sums = {"total": whole}
    if any(layer.side for layer in report.layers):
        sums = {"total, without side branches": whole, "side branches": total(report.layers, side=True)}
    for name, one in sums.items():
        parameters, multiply_adds, *memory = _cells(one)
        rows.append([name, "", "", "", "", parameters, "", multiply_adds, "", *memory])
    return rows


def _comparison(reports):
    rows = [["config", "image", "parameters", "multiply-adds", "forward MiB", "kept MiB"]]
    for report in reports:
        rows.append([_name_of(report), _times(report.image_shape), *_cells(total(report.layers))])
    return rows


def _cells(costs):
    """Returns the four costs of a Layer or a Total as text: two numbers, and two sizes in MiB."""
    sizes = (f"{size / 2**20:,.3f}" for size in (costs.forward, costs.kept))
    return [f"{costs.parameters:,}", f"{costs.multiply_adds:,}", *sizes]


def _table(rows, form):
    words = [number for number, title in enumerate(rows[0]) if title in ("layer", "kind", "config")]
    return tables.render(rows, form, words)


def _name_of(report):
    """Returns the config's name, `resnet_cifar10`, or with a choice, `resnet_cifar10:full_train`."""
    return pathlib.Path(report.config).name.replace(".py", "")


def _times(shape):
    return "x".join(str(size) for size in shape)


def stages(layers):
    """Returns the costs by stage: the layers whose output maps have the same size.

    Returns:
      {"55x55": Total, ...}, the largest maps first. Dense layers have maps of 1x1. The side branches are one
      stage, the last. Stages that only pool are left out.
    """
    groups = {}
    for layer in sorted(layers, key=lambda layer: (layer.side, -math.prod(layer.output[:-1]))):
        stage = "side branches" if layer.side else _times(layer.output[:-1] or (1, 1))
        groups.setdefault(stage, []).append(layer)
    totals = {stage: total(group, side=group[0].side) for stage, group in groups.items()}
    return {stage: sums for stage, sums in totals.items() if sums.parameters}


def draw(reports):
    """Draws the figure: multiply-adds left, parameters right; one bar per stage, one row per config."""
    by_stage = [stages(report.layers) for report in reports]
    heights = [len(parts) + 2.5 for parts in by_stage]
    figure = Figure(figsize=(9.5, 0.3 * sum(heights) + 0.6), layout="constrained")
    figure.suptitle("by the size of a layer's output map, in pixels; dense layers count as 1x1", fontsize=10)
    axes = figure.subplots(len(reports), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    titles = {"multiply_adds": "multiply-adds of one image", "parameters": "parameters"}
    colours = {"multiply_adds": "#0072B2", "parameters": "#D55E00"}  # distinct for the colour-blind too
    for row, report, parts in zip(axes, reports, by_stage, strict=True):
        whole = total(report.layers)
        for axis, (what, title) in zip(row, titles.items(), strict=True):
            values = [getattr(part, what) for part in parts.values()]
            shades = [0.35 if stage == "side branches" else 1 for stage in parts]
            bars = axis.barh(list(parts), values, color=[(colours[what], shade) for shade in shades])
            axis.bar_label(bars, [_short(value) for value in values], padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.14)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.tick_params(left=False, bottom=False, labelbottom=False, labelsize=8)
            axis.set_title(f"{title}: {_short(getattr(whole, what))}", fontsize=9, loc="left")
        row[0].set_ylabel(f"{_name_of(report)}\n{_times(report.image_shape)}", fontsize=9)
    return figure


def _short(number):
    """Formats a number with three digits and a unit: 15.5 G, 61.7 k, 850."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return str(number)


def _image_shape(text):
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTHxCHANNELS, such as 224x224x3")
    return tuple(map(int, text.split("x")))


def _override(text):
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as model.depth=56")
    try:
        return key, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # it documents all five
        return key, value


def _figure_path(text):
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png or .svg")
    return parsing.path(text)


def main(arguments=None):
    """Prints the tables and draws the figure; if that fails, exits with one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m cnn_cases.analysis.costs",
        description="What networks cost, layer by layer: parameters, multiply-adds, memory of activations.",
    )
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="a training config, such as configs/x.py"
    )
    parser.add_argument(
        "--set",
        action="append",
        type=_override,
        default=[],
        metavar="KEY=VALUE",
        help="override a key of all configs, as in --set model.depth=56",
    )
    parser.add_argument(
        "--batch_size",
        type=parsing.positive_number,
        default=1,
        help="number of images, for the memory columns; default 1",
    )
    parser.add_argument(
        "--image_shape",
        type=_image_shape,
        metavar="HxWxC",
        help="shape of the images; needed for a data set that is unknown to this command",
    )
    parser.add_argument("--num_classes", type=parsing.positive_number, help="number of classes; likewise")
    parser.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    parser.add_argument("--figure", type=_figure_path, metavar="FILE", help="a .png or .svg file to draw")
    options = parser.parse_args(arguments)
    keys = [key for key, _ in options.set]
    for key in keys:
        if keys.count(key) > 1:
            parser.error(f"--set {key} is given more than once")
    with parsing.one_message():
        reports = [
            analyse(path, options.image_shape, options.num_classes, options.batch_size, options.set)
            for path in options.configs
        ]
        if options.figure:
            draw(reports).savefig(options.figure, dpi=150)
        sys.stdout.write(render(reports, options.format))


if __name__ == "__main__":
    main()
