"""The one home of pmap: how a batch is split over devices and a state is kept on all of them.

The state goes in and comes out as an ordinary pytree that is replicated over the devices, without a leading
device axis: `in_axes=None` and `out_axes=None`. With `out_axes=None` nothing checks that the devices agree,
so a step must reduce over the axis all that depends on its share of the batch.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def check_batch_size(key, batch_size, num_devices, num_microbatches=1):
    """Raises ValueError, with the nearest sizes that work, unless the batch can be split evenly."""
    parts = num_devices * num_microbatches
    if batch_size < 1 or batch_size % parts:
        lower = max(batch_size, 0) // parts * parts
        nearest = [size for size in (lower, lower + parts) if size > 0]
        over = f"{num_devices} devices" + (f" with {num_microbatches} microbatches" * (num_microbatches > 1))
        raise ValueError(
            f"{key} = {batch_size} cannot be split evenly over {over}; "
            f"the nearest sizes that can: {' and '.join(map(str, nearest))}"
        )


def pmap_train(train_steps, devices):
    """`steps.make_train_steps`' function over devices; the state that goes in is donated.

    (state, arrays, batches) -> (state, metrics), batches as `shard(..., axis=1)` gives them.
    """
    return jax.pmap(
        train_steps, AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=0, devices=devices
    )


def pmap_eval(eval_step, devices):
    """`steps.make_eval_step`'s function over devices; the batch as `shard(..., axis=0)` gives it."""
    return jax.pmap(eval_step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices)


def pmap_predict(predict_step, devices):
    """`steps.make_predict_step`'s function over devices; images as `shard(..., axis=0)` gives them.

    What comes back has the leading axis of the devices, too.
    """
    return jax.pmap(predict_step, AXIS, in_axes=(None, None, 0), out_axes=0, devices=devices)


def shard(batch, num_devices, axis=0):
    """Splits the leaves of a host batch along `axis`; the devices become the leading axis.

    [..., B, ...] -> [num_devices, ..., B / num_devices, ...]; the order of the examples is kept.
    """

    def split(leaf):
        shape = (*leaf.shape[:axis], num_devices, -1, *leaf.shape[axis + 1 :])
        return np.moveaxis(leaf.reshape(shape), axis, 0)  # no copy: images that stream are large

    return jax.tree.map(split, batch)


def replicate(tree, devices):
    """Puts a whole copy of every leaf on every device."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    return jax.device_put(tree, sharding)


def calls_ahead(devices):
    """How many calls may be under way before the host waits for the first of them.

    Virtual CPU devices share threads: collectives of several calls at once can wait for each other for ever.
    """
    return 0 if devices[0].platform == "cpu" and len(devices) > 1 else 2
