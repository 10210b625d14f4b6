"""The training state: everything that changes from one step to the next."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class TrainState(struct.PyTreeNode):
    """The training state, an ordinary pytree, replicated over the devices without a leading device axis.

    Attributes:
      step: int32, the number of steps done; the only clock.
      seed: int32, the seed of data order, augmentation and dropout. It is a leaf, not a constant, so that
        runs that differ in nothing else share one compiled step.
      params: the model's parameters, float32.
      ema_params: the exponential moving average of {"params", "batch_stats"}, with which the model is
        evaluated; {} for none.
      batch_stats: the running statistics of batch normalisation; empty if there is none.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    ema_params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self):
        """What `model.apply` takes in an evaluation: the average where there is one."""
        return self.ema_params or {"params": self.params, "batch_stats": self.batch_stats}


def init_state(model, tx, image_shape, seed, *, with_ema=False):
    """Returns the state before the first step.

    Args:
      model: a Linen module.
      tx: an optax optimizer.
      image_shape: (H, W, C) of one image.
      seed: of the initial parameters and of everything drawn later.
      with_ema: keep a moving average of the parameters and the running statistics.

    Raises:
      ValueError: the model rejects its settings or the image size.
    """
    # One program, since many small ones take longer to compile and load; it is compiled with few
    # optimisations, since it runs once.
    return _jitted(model, tx, tuple(image_shape), with_ema)(seed)


def shapes_of_state(model, tx, image_shape, *, with_ema=False):
    """Returns the shapes and types of `init_state`'s result; computes nothing."""
    return jax.eval_shape(_maker(model, tx, image_shape, with_ema), 0)


@functools.lru_cache(maxsize=8)  # all seeds of a network share the compiled program
def _jitted(*arguments):
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quickly if jax.default_backend() == "cpu" else None
    return jax.jit(_maker(*arguments), compiler_options=options)


def _maker(model, tx, image_shape, with_ema):
    """Returns the function seed -> state before the first step."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def make(seed):
        # `lazy_init` draws the parameters without running the network.
        variables = model.lazy_init(jax.random.key(seed), image, train=False)
        averaged = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        return TrainState(
            step=jnp.int32(0),
            seed=jnp.int32(seed),
            params=variables["params"],
            # A copy: the step donates every leaf of the state, and none can be donated twice.
            ema_params=jax.tree.map(jnp.copy, averaged) if with_ema else {},
            batch_stats=averaged["batch_stats"],
            opt_state=tx.init(variables["params"]),
        )

    return make
