"""Optimizers and learning-rate schedules, from plain numbers."""

import fnmatch
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import optax

from cnn_cases import checks

OPTIMIZERS = ("sgd", "rmsprop", "adam", "adamw")
SCHEDULES = ("constant", "piecewise", "cosine", "polynomial")
WARMUPS = ("linear", "constant")
DECAYED = ("all", "kernels")


def make_schedule(
    learning_rate, num_steps, *, name, boundaries, factors, power, warmup, warmup_steps, warmup_factor
):
    """Returns the learning rate as a function of the step.

    Args:
      learning_rate: the rate after the warm-up.
      num_steps: length of the run.
      name: one of SCHEDULES: "constant"; "piecewise" multiplies the rate by one of `factors` at each
        boundary; "cosine" and "polynomial" decay to zero between the end of the warm-up and the last step,
        along half a cosine or as (1 - progress) ** `power`.
      boundaries: for "piecewise", increasing fractions of `num_steps`.
      factors: for "piecewise", one for each boundary.
      power: for "polynomial".
      warmup: one of WARMUPS: "linear" rises from `warmup_factor` times the rate to the rate; "constant" stays
        at `warmup_factor` times the rate (He et al. 2015, section 4.2, for 110 layers).
      warmup_steps: length of the warm-up, 0 for none.
      warmup_factor: see `warmup`.

    Returns:
      step (an int or int32 [], counted from 0) -> learning rate, float32 [].

    Raises:
      ValueError: a name is unknown or a number is out of range.
    """
    checks.one_of("schedule.name", name, SCHEDULES)
    checks.one_of("schedule.warmup", warmup, WARMUPS)
    checks.positive("optimizer.learning_rate", learning_rate)
    if not all(a < b for a, b in itertools.pairwise((0, *boundaries, 1))):
        raise ValueError(f"schedule.boundaries = {boundaries} must be increasing fractions between 0 and 1")
    if len(factors) != len(boundaries):
        raise ValueError(
            f"schedule.factors = {factors} must have one number for each of "
            f"schedule.boundaries = {boundaries}"
        )
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"schedule.warmup_steps = {warmup_steps} must be 0 or more and below num_steps = {num_steps}"
        )
    for factor in factors:
        checks.positive("schedule.factors", factor)
    checks.positive("schedule.power", power)
    checks.positive("schedule.warmup_factor", warmup_factor)

    decay_steps = num_steps - warmup_steps
    match name:
        case "constant":
            main = optax.constant_schedule(learning_rate)
        case "piecewise":
            drops = {}
            for boundary, factor in zip(boundaries, factors, strict=True):
                step = round(boundary * num_steps)
                drops[step] = drops.get(step, 1) * factor  # in a short run, two may fall on one step
            main = optax.piecewise_constant_schedule(learning_rate, drops)
        case "cosine":
            main = _after(warmup_steps, optax.cosine_decay_schedule(learning_rate, decay_steps))
        case "polynomial":
            main = _after(warmup_steps, optax.polynomial_schedule(learning_rate, 0.0, power, decay_steps))

    if not warmup_steps:
        return main

    def with_warmup(step):
        progress = step / warmup_steps if warmup == "linear" else 0.0
        warm = learning_rate * (warmup_factor + (1 - warmup_factor) * progress)
        return jnp.where(step < warmup_steps, warm, main(step))

    return with_warmup


def _after(first_step, schedule):
    return lambda step: schedule(step - first_step)


def make_optimizer(
    schedule,
    *,
    name,
    momentum,
    nesterov,
    second_moment,
    epsilon,
    weight_decay,
    decayed,
    clip_norm,
    rate_patterns=(),
    rate_factors=(),
    frozen=None,
):
    """Returns the optimizer called `name`.

    Args:
      schedule: step -> learning rate.
      name: one of OPTIMIZERS. "sgd" is v <- momentum v + g, w <- w - rate v; "rmsprop", as in TensorFlow, is
        v <- momentum v + rate g / root of g's mean square, which starts from 1, w <- w - v (Tieleman and
        Hinton 2012); "adam" (Kingma and Ba 2014); "adamw" (Loshchilov and Hutter 2017).
      momentum: in [0, 1), 0 for none; Adam's beta1.
      nesterov: use Nesterov momentum.
      second_moment: fraction of the mean squared gradient that each step keeps: rmsprop's decay, Adam's
        beta2.
      epsilon: added to the mean square in "rmsprop", and to its root in Adam.
      weight_decay: weight_decay * w is added to the gradient of each parameter w, as in the papers of the
        time; with "adamw" it is decoupled: rate * weight_decay * w is subtracted from w.
      decayed: one of DECAYED: "all" parameters, or only "kernels", without biases and normalisation.
      clip_norm: maximum norm of the whole gradient, weight decay included; 0 for no limit.
      rate_patterns: shell patterns, such as "*/bias" or "conv1/*", for the names of parameters whose learning
        rate is multiplied.
      rate_factors: one for each pattern; a parameter that matches several patterns gets all their factors.
      frozen: layer name -> whether it stays unchanged; it gets no weight decay, and the caller must make its
        gradient zero. None: no layer is frozen.

    Raises:
      ValueError: a name is unknown or a number is out of range. The optimizer's `init` also raises it if a
        pattern matches no parameter.
    """
    checks.one_of("optimizer.name", name, OPTIMIZERS)
    checks.one_of("optimizer.decayed", decayed, DECAYED)
    for key, value in (("momentum", momentum), ("second_moment", second_moment)):
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{key} = {value} must be in [0, 1)")
    checks.not_negative("optimizer.weight_decay", weight_decay)
    checks.not_negative("optimizer.clip_norm", clip_norm)
    checks.positive("optimizer.epsilon", epsilon)
    if len(rate_factors) != len(rate_patterns):
        raise ValueError(
            f"optimizer.rate_factors = {rate_factors} must have one number for each of "
            f"optimizer.rate_patterns = {rate_patterns}"
        )
    for factor in rate_factors:
        checks.positive("optimizer.rate_factors", factor)

    def is_decayed(path, _):
        if frozen and frozen(path[0].key):
            return False
        # Not by the number of axes: `scan_blocks` stacks the scales of a stage's blocks, too.
        return decayed == "all" or path[-1].key == "kernel"

    mask = None
    if frozen or decayed == "kernels":
        mask = functools.partial(jax.tree.map_with_path, is_decayed)
    chain = []
    if name != "adamw":
        chain.append(optax.add_decayed_weights(weight_decay, mask))
    if clip_norm:
        chain.append(optax.clip_by_global_norm(clip_norm))
    match name:
        case "sgd":
            update = optax.sgd(schedule, momentum or None, nesterov)
        case "rmsprop":
            update = optax.rmsprop(
                schedule, second_moment, epsilon, 1.0, momentum=momentum or None, nesterov=nesterov
            )
        case "adam" | "adamw":
            decay = weight_decay if name == "adamw" else 0.0
            update = optax.adamw(
                schedule, momentum, second_moment, epsilon, weight_decay=decay, mask=mask, nesterov=nesterov
            )
    chain.append(update)
    if rate_patterns:
        chain.append(_multiply_rates(rate_patterns, rate_factors))
    return optax.chain(*chain)


def _multiply_rates(patterns, factors):
    """Multiplies each parameter's update by the factors of all patterns that match its name."""

    def init(params):
        names = [_name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                some = ", ".join([*names[:6], "..."] if names[6:] else names)
                raise ValueError(
                    f"optimizer.rate_patterns = {patterns}: {pattern!r} matches no parameter; "
                    f"there are: {some}"
                )
        return optax.EmptyState()

    def multiply(path, change):
        name = _name_of(path)
        pairs = zip(patterns, factors, strict=True)
        return change * math.prod(factor for pattern, factor in pairs if fnmatch.fnmatchcase(name, pattern))

    _, update = optax.stateless(lambda updates, _: jax.tree.map_with_path(multiply, updates))
    return optax.GradientTransformation(init, update)


_name_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
