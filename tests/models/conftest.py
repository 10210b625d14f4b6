import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn


class Call(NamedTuple):
    """One call of a module; shapes are without the batch."""

    module: Any
    input: tuple[int, ...]
    output: tuple[int, ...]
    flags: tuple  # what was given beside the input

    @property
    def shapes(self):
        return self.input, self.output


@functools.cache
def trace_model(model, height, width=None, channels=3, train=False):
    """Initialises `model` without computing anything.

    Returns:
      (shapes of the variables, [Call] in the order in which they end).
    """
    calls = []

    def record(method, args, kwargs, context):
        y = method(*args, **kwargs)
        calls.append(Call(context.module, args[0].shape[1:], y.shape[1:], args[1:]))
        return y

    def init(image):
        key = jax.random.key(0)
        return model.init({"params": key, "dropout": key}, image, train)

    image = jax.ShapeDtypeStruct((2, height, width or height, channels), jnp.float32)
    with nn.intercept_methods(record):
        return jax.eval_shape(init, image), calls


@pytest.fixture(scope="session")
def trace():
    return trace_model
