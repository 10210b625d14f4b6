"""Compiles the programs of a run without running them, to find out whether they fit into a TPU's memory.

    python -m cnn_cases.rehearse --config=configs/resnet_cifar10.py --topology=v5e:4x4

This needs no TPU, only the data set and the TPU compiler, which JAX for TPUs includes (see requirements.txt).
The compiler rejects programs that do not fit, as it would on the TPU. Without --topology, the programs are
compiled for the devices of this machine.
"""

import importlib.util
import math
import os
import re
import time
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from cnn_cases import command, settings, tables
from cnn_cases.models import fast
from cnn_cases.training import devices as devices_lib
from cnn_cases.training import programs


class Rehearsal(NamedTuple):
    """A compiled program; the sizes are those on one device.

    Attributes:
      program: its name.
      steps: batches per call.
      images: examples, or views, in a device's share of a batch.
      seconds: compilation time.
      arguments: bytes of the state, the data that live on the device, and the batches of a call.
      total: bytes of the arguments, the results that do not replace arguments, and temporary arrays, but not
        of the program's code.
    """

    program: str
    steps: int
    images: int
    seconds: float
    arguments: int
    total: int


def of_topology(name):
    """The devices of absent TPUs, for which programs can be compiled but not run.

    A chip is one device, except on v2, v3 and tpu7x, where it is two devices, as on the TPUs themselves.

    Args:
      name: kind (v2, v3, v4, v5e, v5p, v6e or tpu7x) and layout of the chips: "v5e:4x4", "v4:2x2x4".

    Raises:
      ValueError: libtpu, which has the compiler, is not installed, or knows no such topology.
    """
    known = re.fullmatch(r"([a-z0-9]+):(\d+)x(\d+)(?:x(\d+))?", name)
    if not known:
        raise ValueError(
            f"topology = {name!r} must be a kind of TPU and the layout of its chips, such as 'v5e:4x4' or "
            "'v4:2x2x4'"
        )
    libtpu = importlib.util.find_spec("libtpu")
    if libtpu is None or libtpu.origin is None:  # no origin: an unrelated directory of that name
        raise ValueError(
            f"topology = {name!r} needs the TPU compiler: "
            f'pip install "jax[tpu]=={jax.__version__}", on any machine with Linux on x86'
        )
    # Otherwise libtpu would ask the cloud for its TPU, and refuse to load while a run uses that TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    kind, *layout = known.groups(default="1")
    layout = [int(chips) for chips in layout]
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(layout) < 4:
        options["chips_per_host_bounds"] = layout  # libtpu's default is 2x2 chips per host
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology = {name!r} is unknown to libtpu: {error}") from error


def rehearse(config, devices):
    """Compiles the programs of a run: training steps, evaluation, and prediction for views of each size.

    Views are those of `evaluation.protocol` on a square image, unless the protocol is "single". Longer images
    have longer views, of which correspondingly fewer are predicted at once.

    Args:
      config: from `configs/`.
      devices: those of this machine, or from `of_topology`; for several processes, the devices of all.

    Yields:
      A Rehearsal of each program.

    Raises:
      ValueError: no run with this config could start on these devices.
      jax.errors.JaxRuntimeError: the devices have too little memory.
    """
    platform, num_devices = devices[0].platform, len(devices)
    with fast.written_for(platform):
        program = programs.make_program(config, devices, replicate=devices_lib.shapes)
        state = programs.check_program(program, config)
        feed, steps = program.feed, program.steps_per_call
        training = _shares(feed.train_batches(config.seed, 0), num_devices, steps)
        evaluation = _shares(feed.eval_batches(next(iter(settings.parts(config)))), num_devices)
        stages = [
            ("training", program.train, training, steps),
            ("evaluation", program.evaluate, evaluation, None),
        ]
        protocol, size = config.evaluation.protocol, config.evaluation.batch_size
        shown = protocol != "single" and set(config.evaluation.final_splits) - {"train"}
        shapes = programs.check_protocol(program, state, protocol) if shown else []
        for shape in sorted(set(shapes)):
            share = num_devices, programs.views_at_once(feed.image_shape, shape, size, num_devices)
            views = jax.ShapeDtypeStruct((*share, *shape), np.uint8)
            stages.append((f"views of {shape[0]}x{shape[1]}", program.predict, views, None))
    for stage in stages:
        with fast.written_for(platform):
            compiled = _compiled(state, program.arrays, *stage)
        yield compiled


def _shares(batches, num_devices, steps=None):
    """Shapes and types of one of a feed's batches, or of `steps` batches, after `devices.shard`."""
    batch = next(batches)
    batches.close()  # ends a stream's workers
    outer = (num_devices, steps) if steps else (num_devices,)
    return {
        key: jax.ShapeDtypeStruct((*outer, len(leaf) // num_devices, *leaf.shape[1:]), leaf.dtype)
        for key, leaf in batch.items()
    }


def _compiled(state, arrays, name, function, batch, steps):
    """Compiles a function of one device's share of a batch, or of `steps` batches, into a Rehearsal."""
    images = jax.tree.leaves(batch)[0].shape[2 if steps else 1]
    start = time.monotonic()
    memory = function.lower(state, arrays, batch).compile().memory_analysis()
    seconds = time.monotonic() - start
    arguments = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + results + memory.temp_size_in_bytes
    return Rehearsal(name, steps or 1, images, seconds, arguments, total)


def main():
    """Prints a row for each program that fits."""
    config, topology = flags.FLAGS.config, flags.FLAGS.topology
    jax.config.update("jax_enable_compilation_cache", False)  # cached programs would take no time to compile
    if topology is None:
        devices = devices_lib.local_devices()
    else:
        jax.config.update("jax_platforms", "cpu")  # not for the compiler; this machine's TPU stays free
        devices = of_topology(topology)
    print(f"{len(devices)} x {devices[0].device_kind}\n")
    rows = [["program", "batches a call", "images a device", "compilation s", "arguments MiB", "in all MiB"]]
    try:
        for one in rehearse(config, devices):
            numbers = [str(one.steps), str(one.images), f"{one.seconds:.1f}"]
            sizes = [f"{size / 2**20:,.1f}" for size in (one.arguments, one.total)]
            rows.append([one.program, *numbers, *sizes])
    finally:  # if a program does not fit, the rows before it show which one
        if rows[1:]:
            print(tables.aligned(rows, words=[0]), end="")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    flags.DEFINE_string(
        "topology",
        None,
        "Kind and layout of TPU chips, such as v5e:4x4; default: the devices of this machine.",
    )
    flags.mark_flag_as_required("config")
    command.run(main)
