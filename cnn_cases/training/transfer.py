"""Transfer learning: runs that start from layers of another run, and layers that are not trained.

A layer's name is the first part of its parameters' names, such as `conv1` or `stage2_block1`; the first
column of `cnn_cases.analysis.costs` lists the names. Patterns are shell patterns: `conv*`, `stage[12]_*`.
"""

import contextlib
import fnmatch
import pathlib

import jax
import numpy as np

from cnn_cases.training import checkpoint


def is_any_of(patterns):
    """Returns a function layer name -> whether a pattern matches it; None if there are no patterns."""
    if not patterns:
        return None
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(key, patterns, names):
    """Raises ValueError unless each pattern of a config's key matches some layer of a network."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"{key} = {patterns}: {pattern!r} matches no layer; there are: {', '.join(names)}"
            )


def check_frozen(patterns, names):
    """Raises ValueError unless `optimizer.frozen` names layers of a network and leaves some to train."""
    check_patterns("optimizer.frozen", patterns, names)
    if all(map(is_any_of(patterns), names)):
        raise ValueError(f"optimizer.frozen = {patterns} leaves no layer to train, of {', '.join(names)}")


def identity(workdir, step):
    """Returns [step, checksum] of a checkpoint that a run starts from.

    Args:
      workdir, step: as in `trained_layers`, which also checks the checkpoint for damage.

    Raises:
      ValueError: there is no such checkpoint.
    """
    with _found(workdir, step) as (directory, number):
        return [number, checkpoint.checksum(directory, number)]


def trained_layers(like, workdir, step, layers):
    """Returns layers of another network, as it is evaluated: with its moving averages if it has any.

    Args:
      like: a state of the network that will receive the layers, or its `state.shapes_of_state`.
      workdir: of the run that trained the other network; it is only read.
      step: which of its checkpoints: "last", "best" or a number.
      layers: patterns of the names of the layers to take; these layers must have the same parameters, of the
        same shapes, in both networks.

    Returns:
      {"params", "batch_stats"}: each a dict {layer name: its values}.

    Raises:
      ValueError: there is no such run, checkpoint or layer, or a layer's shapes differ.
    """
    names = sorted(like.params)
    if not layers:
        raise ValueError(
            "start.layers = () must have patterns of layers' names; set start.workdir = '' for none"
        )
    check_patterns("start.layers", layers, names)
    with _found(workdir, step) as (directory, number):
        saved = checkpoint.read(directory, number)
    there, taken = saved["ema_params"] or saved, {"params": {}, "batch_stats": {}}
    for name in filter(is_any_of(layers), names):
        if name not in there["params"]:
            raise ValueError(
                f"start.layers = {layers}: {workdir} has no {name}; "
                f"it has {', '.join(sorted(there['params']))}"
            )
        for part, own in (("params", like.params), ("batch_stats", like.batch_stats)):
            pair = ({name: one.get(name, {})} for one in (there[part], own))
            for leaf, found, expected in checkpoint.different_shapes(*pair):
                raise ValueError(
                    f"start.layers = {layers}: {leaf} is {found} in {workdir} and {expected} in this "
                    f"network; name the layers to take, of {', '.join(names)}"
                )
            if name in own:
                taken[part][name] = there[part][name]
    return taken


def put_layers(state, taken):
    """Returns a state, before its first step, with the layers of `trained_layers` in place of its own."""
    averaged = {
        "params": state.params | taken["params"],
        "batch_stats": state.batch_stats | taken["batch_stats"],
    }
    # A copy, as in `state`: no leaf can be donated twice.
    ema_params = jax.tree.map(np.array, averaged) if state.ema_params else {}
    return state.replace(ema_params=ema_params, **averaged)


@contextlib.contextmanager
def _found(workdir, step):
    """Yields (directory of a run's checkpoints, step of one of them); makes errors name the config's keys."""
    directory = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    try:
        yield directory, checkpoint.find(directory, step)
    except (OSError, ValueError) as error:
        raise ValueError(f"start.workdir = {workdir!r}, start.step = {step!r}: {error}") from error
