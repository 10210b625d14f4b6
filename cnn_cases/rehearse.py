"""Compiles a training without running it: for how much memory it asks, and whether a TPU has as much.

    python -m cnn_cases.rehearse --config=configs/resnet_cifar10.py --topology=v5e:4x4

No TPU is needed, only its compiler, which JAX for TPUs brings along (see requirements.txt), and the data set.
What does not fit is refused, as it would be there. Without --topology, the programs are those of this
machine's devices.
"""

import importlib.util
import itertools
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
    """A compiled program; memory is that of one device.

    Attributes:
      program: its name.
      steps: batches that one call takes.
      images: examples in a device's share of a batch, or views.
      seconds: that the compiler took.
      arguments: bytes of the state, the data that live on the device, and the batches of a call.
      total: bytes of these, of the results that do not take their place, and of what is in between. The code
        of the program comes on top.
    """

    program: str
    steps: int
    images: int
    seconds: float
    arguments: int
    total: int


def of_topology(name):
    """The devices of TPUs that are not there, for which programs can be compiled and not run.

    A chip is one device, and two where TPUs themselves have it so: of v2, v3 and tpu7x.

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
    if libtpu is None or libtpu.origin is None:  # of a directory that only has the name, there is no origin
        raise ValueError(
            f"topology = {name!r} needs the TPU compiler: "
            f'pip install "jax[tpu]=={jax.__version__}", on any machine with Linux on x86'
        )
    # libtpu would ask the cloud which TPU it is on, and not share it with a training that is under way.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    kind, *layout = known.groups(default="1")
    layout = [int(chips) for chips in layout]
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if math.prod(layout) < 4:
        options["chips_per_host_bounds"] = layout  # libtpu would have 2x2 chips for each host
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology = {name!r} is none that libtpu knows: {error}") from error


def rehearse(config, devices):
    """Compiles the programs of a training: its steps, its evaluation, and what answers views of each size.

    Views are those of `evaluation.protocol` on a square image, where it has more than a single one. Of longer
    images they are longer, and as many fewer at once.

    Args:
      config: of `configs/`.
      devices: those of this machine, or of `of_topology`; of several processes, all.

    Yields:
      A Rehearsal of each.

    Raises:
      ValueError: no training of this config could begin there.
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
            share = num_devices, programs.views_on_device(program, shape, size)
            views = jax.ShapeDtypeStruct((*share, *shape), np.uint8)
            stages.append((f"views of {shape[0]}x{shape[1]}", program.predict, views, None))
    for stage in stages:
        with fast.written_for(platform):
            compiled = _compiled(state, program.arrays, *stage)
        yield compiled


def _shares(batches, num_devices, steps=None):
    """Shapes and types of what `devices.shard` makes of one of a feed's batches, or of `steps` of them."""
    (batch,) = itertools.islice(batches, 1)
    batches.close()  # ends the processes of a stream
    outer = (num_devices, steps) if steps else (num_devices,)
    return {
        key: jax.ShapeDtypeStruct((*outer, len(leaf) // num_devices, *leaf.shape[1:]), leaf.dtype)
        for key, leaf in batch.items()
    }


def _compiled(state, arrays, name, function, batch, steps):
    """The Rehearsal of a function of one device's share of a batch, or of `steps` batches."""
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
    jax.config.update("jax_enable_compilation_cache", False)  # what lies there takes no time to compile
    if topology is None:
        devices = devices_lib.local_devices()
    else:
        jax.config.update("jax_platforms", "cpu")  # all but the compiler; a TPU of this machine stays free
        devices = of_topology(topology)
    print(f"{len(devices)} x {devices[0].device_kind}\n")
    rows = [["program", "batches a call", "images a device", "compilation s", "arguments MiB", "in all MiB"]]
    try:
        for one in rehearse(config, devices):
            numbers = [str(one.steps), str(one.images), f"{one.seconds:.1f}"]
            sizes = [f"{size / 2**20:,.1f}" for size in (one.arguments, one.total)]
            rows.append([one.program, *numbers, *sizes])
    finally:  # where one does not fit, the rows before it say which
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
