"""Optimizers and learning-rate schedules, from plain numbers."""

import jax.numpy as jnp
import optax

OPTIMIZERS = ("sgd",)
SCHEDULES = ("constant", "piecewise", "cosine")
WARMUPS = ("linear", "constant")


def make_schedule(learning_rate, num_steps, *, name, boundaries, factor, warmup, warmup_steps, warmup_factor):
    """The learning rate as a function of the step.

    Args:
      learning_rate: the rate after the warm-up.
      num_steps: length of the training.
      name: one of SCHEDULES: "constant"; "piecewise" multiplies by `factor` at each boundary; "cosine" goes
        to zero along half a cosine, from the end of the warm-up to the last step.
      boundaries: of "piecewise", as fractions of `num_steps`, increasing.
      factor: of "piecewise".
      warmup: one of WARMUPS: "linear" rises from `warmup_factor` times the rate to the rate; "constant" stays
        at `warmup_factor` times the rate (He et al. 2015, section 4.2, for 110 layers).
      warmup_steps: length of the warm-up, 0 for none.
      warmup_factor: see `warmup`.

    Raises:
      ValueError: a name is unknown or a number is out of range.
    """
    _one_of("schedule.name", name, SCHEDULES)
    _one_of("schedule.warmup", warmup, WARMUPS)
    _positive("optimizer.learning_rate", learning_rate)
    if not all(0 < a < b for a, b in zip(boundaries, (*boundaries[1:], 1), strict=True)):
        raise ValueError(f"schedule.boundaries = {boundaries} must be increasing fractions between 0 and 1")
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"schedule.warmup_steps = {warmup_steps} must be 0 or more and below num_steps = {num_steps}"
        )
    _positive("schedule.factor", factor)
    _positive("schedule.warmup_factor", warmup_factor)

    if name == "constant":
        main = optax.constant_schedule(learning_rate)
    elif name == "piecewise":
        drops = {round(boundary * num_steps): factor for boundary in boundaries}
        main = optax.piecewise_constant_schedule(learning_rate, drops)
    else:
        cosine = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)

        def main(step):
            return cosine(step - warmup_steps)

    if not warmup_steps:
        return main

    def with_warmup(step):
        progress = step / warmup_steps if warmup == "linear" else 0.0
        warm = learning_rate * (warmup_factor + (1 - warmup_factor) * progress)
        return jnp.where(step < warmup_steps, warm, main(step))

    return with_warmup


def make_optimizer(schedule, *, name, momentum, nesterov, weight_decay):
    """The optimizer called `name`.

    Args:
      schedule: step -> learning rate.
      name: one of OPTIMIZERS. "sgd" is stochastic gradient descent with momentum: v <- momentum v + g,
        w <- w - rate v, where g holds the weight decay.
      momentum: in [0, 1); 0 for none.
      nesterov: Nesterov's form of the momentum.
      weight_decay: this times w is added to the gradient of every parameter w, biases and batch
        normalisation included, as the papers of the time do it.

    Raises:
      ValueError: the name is unknown or a number is out of range.
    """
    _one_of("optimizer.name", name, OPTIMIZERS)
    if not 0 <= momentum < 1:
        raise ValueError(f"optimizer.momentum = {momentum} must be in [0, 1)")
    if not weight_decay >= 0:
        raise ValueError(f"optimizer.weight_decay = {weight_decay} must be 0 or more")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov),
    )


def _one_of(key, value, known):
    if value not in known:
        raise ValueError(f"{key} = {value!r} is unknown; known: {', '.join(known)}")


def _positive(key, value):
    if not value > 0:
        raise ValueError(f"{key} = {value} must be above 0")
