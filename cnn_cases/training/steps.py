"""The training step and the evaluation step, as pure functions of one device's share of the batch."""

import jax
import jax.numpy as jnp
import optax
from jax import lax


def make_train_steps(apply, tx, prepare, axis_name, *, own_dropout=False):
    """A function that does several training steps in one call.

    Args:
      apply: `model.apply`.
      tx: an optax optimizer.
      prepare: (arrays, batch, key) -> image, label; the feed's.
      axis_name: the pmap axis over which the batch is split.
      own_dropout: give each device dropout keys of its own, for a model that does not know the axis.

    Returns:
      (state, arrays, batches) -> (state, metrics). The leaves of `batches` have the shape [steps, B, ...];
      those of `metrics` [steps]: "loss" (mean cross-entropy, without the weight decay), "error" (fraction)
      and "grad_norm", of the global batch and before the step's update.
    """

    def train_step(state, arrays, batch):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        if own_dropout:
            dropout_key = jax.random.fold_in(dropout_key, lax.axis_index(axis_name))
        image, label = prepare(arrays, batch, augment_key)

        def mean_loss(params):
            logits, updated = apply(
                {"params": params, "batch_stats": state.batch_stats},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            return cross_entropy(logits, label).mean(), (logits, updated.get("batch_stats", {}))

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        # Statistics of the global batch are equal on all devices already; those of each device's own are not.
        grads, batch_stats = lax.pmean((grads, batch_stats), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss, "error": is_wrong(logits, label).mean()}
        metrics = lax.pmean(metrics, axis_name) | {"grad_norm": optax.tree.norm(grads)}
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, metrics

    def train_steps(state, arrays, batches):
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            # Not a loop of one round: on the CPU, XLA's convolutions have one thread inside a loop.
            state, metrics = train_step(state, arrays, jax.tree.map(lambda leaf: leaf[0], batches))
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        return lax.scan(lambda state, batch: train_step(state, arrays, batch), state, batches)

    return train_steps


def make_eval_step(apply, prepare, axis_name):
    """A function that evaluates one batch.

    Returns:
      (state, arrays, batch) -> sums over the examples of the global batch whose "mask" is 1: "loss",
      "error" and "count".
    """

    def eval_step(state, arrays, batch):
        image, label = prepare(arrays, batch, None)
        logits = apply({"params": state.params, "batch_stats": state.batch_stats}, image, train=False)
        each = {
            "loss": cross_entropy(logits, label),
            "error": is_wrong(logits, label),
            "count": jnp.ones_like(batch["mask"]),
        }
        # A product with the mask would keep the NaN of a padded example.
        sums = {name: jnp.where(batch["mask"] > 0, value, 0).sum() for name, value in each.items()}
        return lax.psum(sums, axis_name)

    return eval_step


def cross_entropy(logits, label):
    """Softmax cross-entropy of each example, in float32. logits [B, K], label int [B] -> [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)


def is_wrong(logits, label):
    """1 where the largest logit is not the label's, else 0. logits [B, K], label int [B] -> float32 [B]."""
    return (logits.argmax(axis=-1) != label).astype(jnp.float32)
