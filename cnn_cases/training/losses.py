"""Per-example losses: logits [B, K], label int [B] -> float32 [B].

Instead of a label, `cross_entropy` also accepts a target float [B, K]: shares of the classes that sum to 1.
"""

import functools

import jax
import jax.numpy as jnp

from cnn_cases import checks

LOSSES = ("cross_entropy", "rbf_mean_squared", "rbf_map")


def make_loss(*, name, label_smoothing, map_constant):
    """Returns the loss called `name`.

    Args:
      name: one of LOSSES. The two RBF losses, of LeNet-5 (1998), expect its negated penalties as logits.
      label_smoothing: for "cross_entropy", share of the target that is spread over all classes, in [0, 1).
      map_constant: the j of "rbf_map", above 0.

    Returns:
      logits [B, K], label int32 [B] -> float32 [B]; "cross_entropy" takes targets float32 [B, K] as well.

    Raises:
      ValueError: the name is unknown or a number is out of range.
    """
    checks.one_of("loss.name", name, LOSSES)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"loss.label_smoothing = {label_smoothing} must be in [0, 1)")
    if label_smoothing and name != "cross_entropy":
        raise ValueError(
            f"loss.label_smoothing = {label_smoothing} is for loss.name = 'cross_entropy', not {name!r}"
        )
    checks.positive("loss.map_constant", map_constant)
    return {
        "cross_entropy": functools.partial(cross_entropy, smoothing=label_smoothing),
        "rbf_mean_squared": rbf_mean_squared,
        "rbf_map": functools.partial(rbf_map, j=map_constant),
    }[name]


def of_classes(loss, num_classes):
    """Wraps a loss so that it rejects logits of another length, which it would silently accept.

    Raises:
      ValueError: by the wrapped loss, when it is called with such logits, or with no array.
    """

    @functools.wraps(loss)
    def checked(logits, label):
        if not hasattr(logits, "shape"):
            raise ValueError(
                f"the network returns a {type(logits).__name__}, not logits; only in training may it return "
                "a tuple, (logits, *side_logits)"
            )
        if logits.shape[1:] != (num_classes,):
            raise ValueError(
                f"the network returns logits of shape {list(logits.shape)}; data with {num_classes} classes "
                f"need [batch, {num_classes}]"
            )
        return loss(logits, label)

    return checked


def cross_entropy(logits, label, smoothing=0.0):
    """Softmax cross-entropy, by default without label smoothing (Szegedy et al. 2015b, section 7)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    is_target = label.ndim == logits.ndim
    of_label = (label * log_probs).sum(axis=-1) if is_target else _pick(log_probs, label)
    return -(1 - smoothing) * of_label - smoothing * log_probs.mean(axis=-1)


def rbf_mean_squared(logits, label):
    """The penalty of the correct class (LeCun et al. 1998, equation 8).

    This loss does not push the other classes away: trainable codes could bring it to zero by becoming all
    equal, which is one reason why LeNet-5's codes are fixed.
    """
    return -_pick(logits.astype(jnp.float32), label)


def rbf_map(logits, label, j):
    """The penalty of the correct class against those of all classes (LeCun et al. 1998, equation 9).

    y_right + log(exp(-j) + sum_i exp(-y_i)), where `j` keeps classes that are already far off from being
    pushed further away.
    """
    logits = logits.astype(jnp.float32)
    rubbish = jnp.full((*logits.shape[:-1], 1), -j, jnp.float32)
    return jax.nn.logsumexp(jnp.concatenate([logits, rubbish], -1), axis=-1) - _pick(logits, label)


def _pick(values, label):
    return jnp.take_along_axis(values, label[..., None], axis=-1)[..., 0]
