"""Transfer learning: a training that begins with layers of another one, and layers that are not trained.

A layer is known by the first part of its parameters' names, `conv1` or `stage2_block1`; the first column of
`cnn_cases.analysis.costs` lists them. Patterns are those of a shell: `conv*`, `stage[12]_*`.
"""

import contextlib
import fnmatch
import pathlib

import jax
import numpy as np

from cnn_cases.training import checkpoint


def is_any_of(patterns):
    """name of a layer -> whether one of the patterns fits it; None where there are no patterns."""
    if not patterns:
        return None
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(key, patterns, names):
    """Raises ValueError unless each pattern, of the key of a config, fits some of the layers of a network."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{key} = {patterns}: {pattern!r} fits no layer; there are {', '.join(names)}")


def check_frozen(patterns, names):
    """Raises ValueError unless `optimizer.frozen` names layers of a network and leaves some to train."""
    check_patterns("optimizer.frozen", patterns, names)
    if all(map(is_any_of(patterns), names)):
        raise ValueError(f"optimizer.frozen = {patterns} leaves no layer to train, of {', '.join(names)}")


def identity(workdir, step):
    """[step, checksum] of a checkpoint that a training starts from.

    Args:
      workdir, step: as in `trained_layers`, which finds out whether it is damaged.

    Raises:
      ValueError: there is no such checkpoint.
    """
    with _found(workdir, step) as (directory, number):
        return [number, checkpoint.checksum(directory, number)]


def trained_layers(like, workdir, step, layers):
    """Layers of another network, as it is evaluated: the averages where it has any.

    Args:
      like: a state of the network that is to have them, or its `state.shapes_of_state`.
      workdir: of the run that has trained the other network; it is only read.
      step: which of its checkpoints, "last", "best" or a number.
      layers: patterns of the names of those to take, which have passed `check_patterns`; both networks must
        have each of them alike.

    Returns:
      {"params", "batch_stats"}: of both a dict {name of a layer: what it has}.

    Raises:
      ValueError: there is no such run, checkpoint or layer, or a layer has another shape there.
    """
    names = sorted(like.params)
    if not layers:
        raise ValueError(
            "start.layers = () must have patterns of layers' names; set start.workdir = '' for none"
        )
    with _found(workdir, step) as (directory, number):
        saved = checkpoint.read(directory, number)
    there, taken = saved["ema_params"] or saved, {"params": {}, "batch_stats": {}}
    for name in filter(is_any_of(layers), names):
        if name not in there["params"]:
            raise ValueError(
                f"start.layers = {layers}: {workdir} has no {name}, but {', '.join(sorted(there['params']))}"
            )
        for part, own in (("params", like.params), ("batch_stats", like.batch_stats)):
            found, expected = (checkpoint.shapes({name: one.get(name, {})}) for one in (there[part], own))
            for leaf in sorted(found.keys() | expected.keys()):
                if found.get(leaf) != expected.get(leaf):
                    raise ValueError(
                        f"start.layers = {layers}: {leaf} is {found.get(leaf, 'not there')} in "
                        f"{workdir} and {expected.get(leaf, 'not there')} here; name the layers to take, of "
                        f"{', '.join(names)}"
                    )
            if name in own:
                taken[part][name] = there[part][name]
    return taken


def put_layers(state, taken):
    """A state before its first step, with the layers of `trained_layers` in the place of its own."""
    averaged = {
        "params": state.params | taken["params"],
        "batch_stats": state.batch_stats | taken["batch_stats"],
    }
    # A copy, as in `state`: no leaf can be donated twice.
    ema_params = jax.tree.map(np.array, averaged) if state.ema_params else {}
    return state.replace(ema_params=ema_params, **averaged)


@contextlib.contextmanager
def _found(workdir, step):
    """Gives (the directory of a run's checkpoints, step of one); errors then name the keys of the config."""
    directory = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    try:
        yield directory, checkpoint.find(directory, step)
    except (OSError, ValueError) as error:
        raise ValueError(f"start.workdir = {workdir!r}, start.step = {step!r}: {error}") from error
