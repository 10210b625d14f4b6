"""Measures what a 1x1 convolution before a larger one saves: multiply-adds, time and memory on this device.

    python -m cnn_cases.studies.bottleneck --workdir=runs/bottleneck

The lecture's two comparisons, on its input of 28x28x192:

    5x5 convolution     192 -> 32 channels, against a 1x1 convolution to 16 channels and then the 5x5 to 32
    Inception module    3a of GoogLeNet (Szegedy et al. 2014, table 1) without its 1x1 reductions (figure 2a),
                        against the full module (figure 2b)

The naive module passes the pooled input on unchanged, so it also has more output channels: 416 against 256.

Multiply-adds are counted (`cnn_cases.analysis.costs`). Time and memory are those of the forward pass,
compiled for this device, in float32. Time is the median over calls; the networks take turns, so a busy
machine slows all of them alike. Memory is what the compiler reserves for the output and for intermediate
values, without parameters and input; scratch space that a library allocates during a convolution may not be
included.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cnn_cases import parsing, tables
from cnn_cases.analysis import costs
from cnn_cases.models.inception import TABLE_1, InceptionModule, NaiveInceptionModule
from cnn_cases.models.layers import ConvUnit
from cnn_cases.studies import figures
from cnn_cases.training import devices, disk, provenance, runtime

IMAGE_SHAPE = (28, 28, 192)
REPEATS = 15

COLOURS = dict(zip(("naive", "reduced"), figures.TWO_COLOURS, strict=True))


class Network(nn.Module):
    """One or several modules in sequence, with the call signature of the project's networks.

    Attributes:
      modules: the modules, in the order in which they are applied.
    """

    modules: tuple[Any, ...]

    @nn.compact
    def __call__(self, x, train: bool):
        """[B, H, W, C] -> [B, H, W, C']."""
        del train  # no layer behaves differently in training
        for module in self.modules:
            x = module(x)
        return x


def make_networks():
    """{(comparison, "naive" or "reduced"): Network}."""
    ones, _, threes, reduce_fives, fives, _ = row = TABLE_1["3a"]
    return {
        ("5x5 convolution", "naive"): Network((ConvUnit(fives, (5, 5)),)),
        ("5x5 convolution", "reduced"): Network(
            (ConvUnit(reduce_fives, (1, 1)), ConvUnit(fives, (5, 5))),
        ),
        ("Inception module", "naive"): Network((NaiveInceptionModule(ones, threes, fives),)),
        ("Inception module", "reduced"): Network((InceptionModule(*row),)),
    }


def measure(batch_size, repeats=REPEATS):
    """Counts and measures the four networks.

    Args:
      batch_size: images per call.
      repeats: calls of each network, at least two.

    Returns:
      A dict that JSON can hold: {"date", "environment", "image_shape", "batch_size", "networks":
      [{"comparison", "kind", "output" (shape), "parameters", "multiply_adds" (per image), "seconds" (for each
      call, for the whole batch), "temporary_bytes", "output_bytes"}]}.
    """
    image = jax.random.normal(jax.random.key(0), (batch_size, *IMAGE_SHAPE), jnp.float32)
    rows, calls = [], []
    for (comparison, kind), network in make_networks().items():
        variables = jax.jit(functools.partial(network.init, train=False))(jax.random.key(1), image)
        compiled = jax.jit(functools.partial(network.apply, train=False)).lower(variables, image).compile()
        output = compiled(variables, image)  # also warms up
        sums = costs.total(costs.count(network, IMAGE_SHAPE))
        memory = compiled.memory_analysis()
        rows.append(
            {
                "comparison": comparison,
                "kind": kind,
                "output": output.shape[1:],
                "parameters": sums.parameters,
                "multiply_adds": sums.multiply_adds,
                "seconds": [],
                "temporary_bytes": memory.temp_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
            }
        )
        calls.append(functools.partial(compiled, variables, image))
    for _ in range(repeats):
        for row, call in zip(rows, calls, strict=True):
            started = time.perf_counter()
            call().block_until_ready()
            row["seconds"].append(time.perf_counter() - started)
    return provenance.stamp() | {"image_shape": IMAGE_SHAPE, "batch_size": batch_size, "networks": rows}


# What the table and the figure show of a network: {title: value}, in millions of operations, ms and MiB.
MEASURES = {
    "multiply-adds\nof one image (M)": lambda row: row["multiply_adds"] / 1e6,
    "time of a batch,\nmedian of calls (ms)": lambda row: 1e3 * statistics.median(row["seconds"]),
    "memory of a batch,\noutput and in between (MiB)": lambda row: (
        (row["temporary_bytes"] + row["output_bytes"]) / 2**20
    ),
}


def table(record):
    """The table as text; reduced networks have the ratios of the naive network's costs to theirs.

    Args:
      record: from `measure`.
    """
    measures = ["multiply-adds", "ratio", "time (ms)", "ratio", "memory (MiB)", "ratio"]
    lines = [["", "", "output", "parameters", *measures]]
    for naive, reduced in _pairs(record):
        for row in (naive, reduced):
            cells = [
                row["comparison"] if row is naive else "",
                row["kind"],
                "x".join(map(str, row["output"])),
                f"{row['parameters']:,}",
            ]
            for number, value in enumerate(MEASURES.values()):
                cells.append(f"{value(row):.2f}" if number else f"{row['multiply_adds']:,}")
                cells.append(f"{value(naive) / value(row):.2f}" if row is reduced else "")
            lines.append(cells)
    return tables.aligned(lines, words=(0, 1))


def _pairs(record):
    """[(naive, reduced)] rows of the record, one pair per comparison."""
    rows = record["networks"]
    return list(zip(rows[::2], rows[1::2], strict=True))


def draw(record):
    """Draws the figure: one panel per measure, with a pair of bars for each comparison.

    Thin lines span the middle half of the times.

    Args:
      record: from `measure`.
    """
    pairs = _pairs(record)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for axis, (title, value) in zip(axes, MEASURES.items(), strict=True):
        for place, pair in enumerate(pairs):
            for row, offset in zip(pair, (-0.2, 0.2), strict=True):
                cost = end = value(row)
                text = f"{cost:#.3g}".rstrip(".")
                if row["kind"] == "reduced":
                    ratio = value(pair[0]) / cost
                    text += f"\n{ratio:.1f} times less" if ratio > 1 else f"\n{1 / ratio:.1f} times more"
                axis.barh(place + offset, cost, height=0.36, color=COLOURS[row["kind"]])
                if "time" in title:
                    low, _, high = (1e3 * q for q in statistics.quantiles(row["seconds"], n=4))
                    axis.hlines(place + offset, low, high, color="black", linewidth=1)
                    end = max(end, high)
                axis.annotate(
                    text, (end, place + offset), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
        axis.set_title(title, fontsize=10, loc="left")
        axis.margins(x=0.3)
        axis.set_xlim(left=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False, bottom=False, labelbottom=False)
    axes[0].set_yticks(range(len(pairs)), [naive["comparison"] for naive, _ in pairs], fontsize=10)
    axes[0].invert_yaxis()
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    image = "x".join(map(str, record["image_shape"]))
    device = record["environment"]["devices"][0]
    figure.suptitle(
        f"forward pass, {record['batch_size']} inputs of {image}, float32, on {device}", fontsize=10
    )
    return figure


def write_report(record, workdir):
    """Writes record.json, table.txt and the figure (bottleneck.png, bottleneck.svg)."""
    workdir.mkdir(parents=True, exist_ok=True)
    disk.write_json(workdir / "record.json", record)
    disk.write_text(workdir / "table.txt", table(record))
    figures.save(draw(record), workdir / "bottleneck")


def main(arguments=None):
    """Runs the study; on failure ends with one message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m cnn_cases.studies.bottleneck", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--workdir", type=parsing.path, default="runs/bottleneck", help="default: %(default)s"
    )
    parser.add_argument(
        "--batch_size", type=parsing.positive_number, default=32, help="images; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    runtime.choose_cpu_flags()  # as a training run does
    with parsing.one_message():
        devices.local_devices()  # or a message that there are none
        record = measure(options.batch_size)
        write_report(record, options.workdir)
        print(table(record))
        print(f"record, table and figure: {options.workdir}")


if __name__ == "__main__":
    main()
