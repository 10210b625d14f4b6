"""What tests of networks ask of one without computing anything."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


def count(params):
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def image_shape(size, channels=3):
    return jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)


def trace_initialisation(model, size, channels=3):
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), image_shape(size, channels))


variable_shapes = functools.cache(trace_initialisation)


def apply(model, variables, x, train):
    rngs = {"dropout": jax.random.key(1)}
    return model.apply(variables, x, train, rngs=rngs, mutable=["batch_stats"])[0]


def output_shapes(model, variables, size, train):
    return jax.eval_shape(lambda v, x: apply(model, v, x, train), variables, image_shape(size))


def convolutions(function, *arguments):
    """Every convolution of `lax` in the program of a function, as an equation of its jaxpr."""
    equations = jax.make_jaxpr(function)(*arguments).eqns
    return [one for one in equations if one.primitive.name == "conv_general_dilated"]


def recorded(call):
    """Every module that `call` runs, the whole at "": path -> (module, arguments, output)."""
    found = {}

    def note(function, args, kwargs, context):
        y = function(*args, **kwargs)
        if context.method_name == "__call__":
            found["/".join(context.module.path)] = context.module, args, y
        return y

    with nn.intercept_methods(note):
        call()
    return found


def visited(call):
    """Every module that `call` runs: path -> (module, shape of its output)."""
    return {path: (module, y.shape) for path, (module, _, y) in recorded(call).items() if hasattr(y, "shape")}


def inputs_and_outputs(call):
    """Every module that `call` runs: path -> (input, output)."""
    return {path: (arguments[0], y) for path, (_, arguments, y) in recorded(call).items()}


def sources(call):
    """Where the modules that `call` runs have their inputs from.

    Returns:
      {path: path of the module that gave the input, "" for that of the whole}. Modules inside of others are
      left out, and so is the path of an input that comes from something else, as a pooling.
    """
    seen = {path: values for path, values in inputs_and_outputs(call).items() if path.count("/") == 0}
    image, _ = seen.pop("")
    givers = {id(image): ""} | {id(y): path for path, (_, y) in seen.items()}
    return {path: givers[id(x)] for path, (x, _) in seen.items() if id(x) in givers}


def recorded_training(model, size):
    """`recorded` of a training call; nothing is computed."""
    variables = variable_shapes(model, size)
    return recorded(lambda: output_shapes(model, variables, size, train=True))


@functools.cache
def modules_of_initialisation(model, size):
    return visited(lambda: trace_initialisation(model, size))
