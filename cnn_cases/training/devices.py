"""The one home of pmap, and of what XLA is told: how devices share the work of one training.

The state goes in and comes out as an ordinary pytree that is replicated over the devices, without a leading
device axis: `in_axes=None` and `out_axes=None`. With `out_axes=None` nothing checks that the devices agree,
so a step must reduce over the axis all that depends on its share of the batch.

Of several processes (see `processes`) each has its local devices; the pmap axis goes over the devices of all,
in the order of the processes.
"""

import importlib.util
import os

import jax
import jaxlib
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_cases.training import processes

AXIS = "batch"

# What XLA is told for CPUs, and the versions of jaxlib that know it: to give sums to YNNPACK, and to leave
# the barriers in its program that say what is computed once.
CPU_FLAGS = {
    "xla_cpu_experimental_ynn_fusion_type": "REDUCE",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
_KNOWN_BY = ("0.10.", "0.11.")
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"


def choose_cpu_flags():
    """Sets CPU_FLAGS for XLA, in this process and in those that it starts; to be called before JAX is used.

    XLA has two libraries for CPUs, YNNPACK and Eigen. Left alone it gives convolutions to the one and sums to
    neither; with the flag, Eigen has the convolutions and YNNPACK the sums. And it computes activations again
    wherever they are used, which costs more than to keep them; `models.fast.conv_general_dilated` marks
    those to be kept by barriers, which it would remove too early. What all that brings, `python -m
    benchmarks.flags` measures.

    A flag that XLA_FLAGS has already stays as it is. Nothing is set in other versions of jaxlib, which
    may not know it and abort; nor where JAX is installed for accelerators, whose compilers need no barriers
    to be left, or are those of another XLA.
    """
    for_cpus = not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    if for_cpus and jaxlib.__version__.startswith(_KNOWN_BY):
        for name, value in CPU_FLAGS.items():
            if name not in os.environ.get("XLA_FLAGS", ""):
                _add_xla_flag(f"--{name}={value}")


def make_deterministic():
    """Makes runs on GPUs the same to the bit, in this process and in those that it starts.

    To be called before JAX is used. XLA then takes no kernel whose result depends on which thread is done
    first, and chooses kernels without timing them, so that each start takes the same. That costs speed.
    Another kind of GPU, number of devices or version of a package still gives other bits. CPUs and TPUs need
    no such switch, and for them nothing changes. Neither effect nor cost has been measured on a GPU yet.
    """
    _add_xla_flag(DETERMINISTIC_FLAG)


def _add_xla_flag(flag):
    # Behind what the user says: XLA takes the last of two.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def message_for_user(error):
    """What to tell of an error that the user can mend; None for one of this project or of a package."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"a device has no memory left ({str(error).splitlines()[0]}); take a smaller batch_size or "
        "evaluation.batch_size, a larger num_microbatches, data.feed = 'stream', or fewer processes at a time"
    )


def of_all_processes(devices):
    """The devices of the pmap axis: those of the first process, then those of the second, and so on.

    Args:
      devices: the local ones that are used; with several processes, all there are.

    Raises:
      ValueError: the processes have not equally many.
    """
    if not processes.is_one_of_several():
        return list(devices)
    counts = [len(jax.local_devices(index)) for index in range(jax.process_count())]
    if set(counts) != {len(devices)}:
        raise ValueError(f"the processes of a job must have equally many devices; they have {counts}")
    return [device for index in range(jax.process_count()) for device in jax.local_devices(index)]


def local_devices():
    """`jax.local_devices()`.

    Raises:
      ValueError: JAX finds none of the kind that it was told to take, or this is one host of several of a TPU
        slice, and nobody has told the hosts of each other.
    """
    try:
        found = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        wanted = jax.config.jax_platforms
        raise ValueError(
            f"JAX_PLATFORMS = {wanted!r}: JAX finds no such device here ({str(error) or 'no reason given'}); "
            "install JAX for it (requirements.txt says how), or leave the choice to JAX"
        ) from error
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this host is one of {jax.process_count()} of a TPU slice, which work together or not at all: "
            "start train.py with --distributed=on on each of them"
        )
    return found


def check_batch_size(key, batch_size, num_devices, num_microbatches=1):
    """Raises ValueError, with the nearest sizes that work, unless the batch can be split evenly."""
    parts = num_devices * num_microbatches
    if batch_size < 1 or batch_size % parts:
        lower = max(batch_size, 0) // parts * parts
        nearest = [size for size in (lower, lower + parts) if size > 0]
        over = f"{num_devices} devices"
        if num_microbatches > 1:
            over += f" and num_microbatches = {num_microbatches}"
        raise ValueError(
            f"{key} = {batch_size} cannot be split evenly over {over}; "
            f"the nearest sizes that can: {' and '.join(map(str, nearest))}"
        )


def pmap_train(train_steps, devices):
    """`steps.make_train_steps`' function over devices; the state that goes in is donated.

    (state, arrays, batches) -> (state, metrics), batches as `shard(..., axis=1)` gives them.
    """
    return jax.pmap(
        train_steps,
        AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=of_all_processes(devices),
    )


def vmap_train(train_steps):
    """The same function on one device, which takes the shares of all devices in turn; it donates nothing.

    For `jax.debug_nans`, which loses its way in a pmap (RecursionError, JAX 0.10). What comes back has the
    leading axis of the shares.
    """
    return jax.jit(jax.vmap(train_steps, in_axes=(None, None, 0), axis_name=AXIS))


def pmap_eval(eval_step, devices):
    """`steps.make_eval_step`'s function over devices; the batch as `shard(..., axis=0)` gives it."""
    return jax.pmap(
        eval_step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=of_all_processes(devices)
    )


def pmap_predict(predict_step, devices):
    """`steps.make_predict_step`'s function over local devices; images as `shard(..., axis=0)` gives them.

    What comes back has the leading axis of the devices, too. Other processes have no part in it.
    """
    return jax.pmap(predict_step, AXIS, in_axes=(None, None, 0), out_axes=0, devices=devices)


def pmap_max(devices):
    """(number, after) -> the largest of all processes' numbers, int32 on the devices: it may be read later.

    So a signal that comes to one process stops all at the same step, and no step waits for it. It is computed
    after the arrays `after`: where those of a step fail, as another process has died, this must not meet what
    is left of the step in the network, which Gloo aborts at.
    """

    def largest(number, after):
        number, _ = lax.optimization_barrier((number, after))  # what is not used, jit would leave out
        return lax.pmax(number, AXIS)

    over_devices = jax.pmap(
        largest, AXIS, in_axes=(0, None), out_axes=None, devices=of_all_processes(devices)
    )
    return lambda number, after: over_devices(np.full(len(devices), number, np.int32), after)


def shard(batch, num_devices, axis=0):
    """Splits the leaves of a process's batch along `axis`; its devices become the leading axis.

    [..., B, ...] -> [num_devices, ..., B / num_devices, ...]; the order of the examples is kept.
    """

    def split(leaf):
        shape = (*leaf.shape[:axis], num_devices, -1, *leaf.shape[axis + 1 :])
        return np.moveaxis(leaf.reshape(shape), axis, 0)  # no copy: images that stream are large

    return jax.tree.map(split, batch)


def replicate(tree, devices):
    """Puts a whole copy of every leaf on every one of the local devices."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    return jax.device_put(tree, sharding)


def shapes(tree, devices):
    """What `replicate` is for devices that are not there: the shapes and types of the leaves."""
    del devices
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def max_in_flight(devices):
    """How many calls may be under way before the host waits for the first of them.

    Virtual CPU devices share threads: collectives of several calls at once can wait for each other for ever.
    """
    return 0 if devices[0].platform == "cpu" and len(of_all_processes(devices)) > 1 else 2
