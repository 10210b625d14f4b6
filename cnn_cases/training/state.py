"""The training state: everything that changes from one step to the next."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval


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
    draw, structure = _initialisation(model, tx, tuple(image_shape), with_ema)
    return jax.tree.unflatten(structure, draw(np.int32(seed)))


def shapes_of_state(model, tx, image_shape, *, with_ema=False):
    """Returns the shapes and types of `init_state`'s result; computes nothing."""
    return jax.eval_shape(_maker(model, tx, image_shape, with_ema), 0)


@functools.lru_cache(maxsize=8)  # all seeds of a network share the tracing and the compiled programs
def _initialisation(*arguments):
    """Returns the function seed -> leaves of the state, and the structure of the state.

    To XLA, each layer of a program is a new one, and drawing its kernel takes as much to compile as its
    gradient. So if most layers have a twin, the function runs operation by operation: then each kind of layer
    is compiled once, for all networks that have it. Otherwise, a single program compiles sooner.
    """
    made, state = jax.make_jaxpr(_maker(*arguments), return_shape=True)(np.int32(0))
    outputs, constants = made.jaxpr.outvars, made.jaxpr.constvars
    needed, _ = partial_eval.dce_jaxpr(made.jaxpr, [True] * len(outputs), instantiate=True)
    draw = jaxpr_as_fun(ClosedJaxpr(needed, made.consts))
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    alike = len(shapes) > 2 * len({*shapes})
    # The step donates every leaf, and none can be donated twice: only a program copies those that are equal.
    apart = len({*map(id, [*outputs, *constants])}) == len([*outputs, *constants])
    return draw if alike and apart else jax.jit(draw), jax.tree.structure(state)


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
