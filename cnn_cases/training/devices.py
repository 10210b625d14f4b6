"""pmap: how devices share the work of one run.

The state goes in and comes out as an ordinary pytree that is replicated over the devices, without a leading
device axis: `in_axes=None` and `out_axes=None`. With `out_axes=None` nothing checks that the devices agree,
so a step must reduce over the axis everything that depends on its share of the batch.

With several processes (see `processes`), each has its local devices; the pmap axis spans the devices of all
processes, in the order of the processes.
"""

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_cases.training import processes

AXIS = "batch"


def message_for_user(error):
    """Returns the message for an error that the user can fix; None for a bug in this project or a package."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"a device ran out of memory ({str(error).splitlines()[0]}); use a smaller batch_size or "
        "evaluation.batch_size, a larger num_microbatches, data.feed = 'stream', or fewer processes at a time"
    )


def of_all_processes(devices):
    """Returns the devices of the pmap axis: those of process 0, then those of process 1, and so on.

    Args:
      devices: the local devices in use; with several processes, all local devices.

    Raises:
      ValueError: the processes have different numbers of devices.
    """
    if not processes.is_one_of_several():
        return list(devices)
    counts = [len(jax.local_devices(index)) for index in range(jax.process_count())]
    if set(counts) != {len(devices)}:
        raise ValueError(f"the processes of a job must have the same number of devices; they have {counts}")
    return [device for index in range(jax.process_count()) for device in jax.local_devices(index)]


def local_devices():
    """Returns `jax.local_devices()`.

    Raises:
      ValueError: JAX finds no device of the requested platform, or this is one of several hosts of a TPU
        slice and jax.distributed has not been initialised.
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


def check_batch_size(batch_size, num_devices, num_microbatches=1):
    """Raises ValueError, naming the nearest sizes that work, unless the batch can be split evenly."""
    parts = num_devices * num_microbatches
    if batch_size < 1 or batch_size % parts:
        lower = max(batch_size, 0) // parts * parts
        nearest = [size for size in (lower, lower + parts) if size > 0]
        over = f"{num_devices} devices"
        if num_microbatches > 1:
            over += f" and num_microbatches = {num_microbatches}"
        raise ValueError(
            f"batch_size = {batch_size} cannot be split evenly over {over}; "
            f"the nearest sizes that can: {' and '.join(map(str, nearest))}"
        )


def pmap_train(train_steps, devices):
    """Maps the function of `steps.make_train_steps` over devices; it donates its input state.

    (state, arrays, batches) -> (state, metrics), with batches as `shard(..., axis=1)` returns them.
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
    """Maps the same function over the shares of all devices, but on one device; it donates nothing.

    For `jax.debug_nans`, which fails in a pmap (RecursionError, JAX 0.10). The results have a leading axis
    over the shares.
    """
    return jax.jit(jax.vmap(train_steps, in_axes=(None, None, 0), axis_name=AXIS))


def pmap_eval(eval_step, devices):
    """Maps the function of `steps.make_eval_step` over devices; `shard(..., axis=0)` makes its batch."""
    return jax.pmap(
        eval_step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=of_all_processes(devices)
    )


def pmap_predict(predict_step, devices):
    """Maps `steps.make_predict_step`'s function over local devices; `shard(..., axis=0)` makes its images.

    The result has a leading axis over the devices, too. Other processes are not involved.
    """
    return jax.pmap(predict_step, AXIS, in_axes=(None, None, 0), out_axes=0, devices=devices)


def pmap_max(devices):
    """Returns (number, after) -> the largest number of all processes, int32 on the devices, to read later.

    It lets a signal to one process stop all processes at the same step, without any step waiting for it. It
    is computed after the arrays `after`: if a step fails because another process has died, this collective
    must not meet the remains of the step on the network, at which Gloo aborts.
    """

    def largest(number, after):
        number, _ = lax.optimization_barrier((number, after))  # jit would drop an unused `after`
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
        return np.moveaxis(leaf.reshape(shape), axis, 0)  # no copy: streamed images are large

    return jax.tree.map(split, batch)


def replicate(tree, devices):
    """Puts a full copy of every leaf on each of the local devices."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    return jax.device_put(tree, sharding)


def shapes(tree, devices):
    """Replaces `replicate` where the devices do not exist: returns the shapes and types of the leaves."""
    del devices
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def max_in_flight(devices):
    """Returns how many calls may be in flight before the host waits for the oldest.

    Virtual CPU devices share threads, so the collectives of several calls at once can deadlock.
    """
    return 0 if devices[0].platform == "cpu" and len(of_all_processes(devices)) > 1 else 2
