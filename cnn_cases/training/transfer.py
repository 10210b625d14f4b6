"""Transfer learning: a training that begins with layers of another one, and layers that are not trained.

A layer is known by the first part of its parameters' names, `conv1` or `stage2_block1`; the first column of
`cnn_cases.analysis.costs` lists them. Patterns are those of a shell: `conv*`, `stage[12]_*`.
"""

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
    if patterns and all(map(is_any_of(patterns), names)):
        raise ValueError(f"optimizer.frozen = {patterns} leaves no layer to train, of {', '.join(names)}")


def take_layers(state, workdir, step, layers):
    """A state before its first step, with layers of a trained network in the place of its own.

    They are those with which that network is evaluated, the averages where it has any, and bring the running
    statistics of their batch normalisation along.

    Args:
      state: of `state.init_state`.
      workdir: of the run that has trained the other network; it is only read.
      step: which of its checkpoints, "last", "best" or a number.
      layers: patterns of the names of those to take, each of which both networks must have alike.

    Raises:
      ValueError: there is no such run, checkpoint or layer, or a layer has another shape there.
    """
    there = _trained(workdir, step)
    names = sorted(state.params)
    if not layers:
        raise ValueError(
            "start.layers = () must have patterns of layers' names; set start.workdir = '' for none"
        )
    check_patterns("start.layers", layers, names)
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    for name in filter(is_any_of(layers), names):
        if name not in there["params"]:
            raise ValueError(
                f"start.layers = {layers}: {workdir} has no {name}, but {', '.join(sorted(there['params']))}"
            )
        for part, own in (("params", params), ("batch_stats", batch_stats)):
            found, expected = (_shapes(layer.get(name, {})) for layer in (there[part], own))
            for leaf in sorted(found.keys() | expected.keys()):
                if found.get(leaf) != expected.get(leaf):
                    raise ValueError(
                        f"start.layers = {layers}: {name}{leaf} is {found.get(leaf, 'not there')} in "
                        f"{workdir} and {expected.get(leaf, 'not there')} here; name the layers to take, of "
                        f"{', '.join(names)}"
                    )
            if name in own:
                own[name] = there[part][name]
    averaged = {"params": params, "batch_stats": batch_stats}
    # A copy, as in `state`: no leaf can be donated twice.
    ema_params = jax.tree.map(np.array, averaged) if state.ema_params else {}
    return state.replace(ema_params=ema_params, **averaged)


def _trained(workdir, step):
    """{"params", "batch_stats"} of the network of a run."""
    directory = pathlib.Path(workdir) / "checkpoints"
    try:
        saved = checkpoint.read(directory, checkpoint.find(directory, step))
    except (OSError, ValueError) as error:
        raise ValueError(f"start.workdir = {workdir!r}, start.step = {step!r}: {error}") from error
    return saved["ema_params"] or saved


def _shapes(layer):
    """{path of a leaf, such as "/conv1/kernel": its shape}."""
    leaves, _ = jax.tree.flatten_with_path(layer)
    return {
        "".join(f"/{part.key}" for part in path): "x".join(map(str, leaf.shape)) or "a scalar"
        for path, leaf in leaves
    }
