"""The training, evaluation and prediction steps, as pure functions of one device's share of the batch."""

import jax
import jax.numpy as jnp
import optax
from jax import lax


def make_train_steps(
    apply,
    tx,
    prepare,
    loss,
    axis_name,
    *,
    side_weight=0.0,
    num_microbatches=1,
    ema_decay=0.0,
    per_device_dropout=False,
    frozen=None,
    skip_nonfinite=False,
):
    """Returns a function that runs several training steps in one call.

    Args:
      apply: `model.apply`.
      tx: an optax optimizer.
      prepare: the feed's function (arrays, batch, key) -> image, label; its `arrays` live on the devices.
      loss: logits [B, K], label int [B] or target float [B, K] -> float32 [B].
      axis_name: the pmap axis over which the batch is split.
      side_weight: weight of the loss of each side branch (auxiliary classifier), if the model has any.
      num_microbatches: number of parts that a device's share is split into. They are computed one after
        another, which saves memory, and give one update. Batch statistics, dropout and the mixing of
        examples are then per part, so they depend on the number of devices. Each part also updates the
        running statistics: n parts keep the n-th power of the fraction that a whole batch keeps (0.66
        instead of 0.9 for four parts).
      ema_decay: fraction of the old average that each step keeps in `state.ema_params`; 0 for no average.
        Step n, counted from 0, keeps at most (1 + n) / (10 + n), so that the initial values fade quickly, as
        in TensorFlow's ExponentialMovingAverage with `num_updates`.
      per_device_dropout: give each device its own dropout keys, for a model that does not know the axis.
      frozen: layer name -> whether its gradient is set to zero and not computed; None: no layer's is.
      skip_nonfinite: keep the old state, except for its counters, if the loss, the gradient or any number of
        the new state is NaN or infinite.

    Returns:
      (state, arrays, batches) -> (state, metrics). The leaves of `batches` have the shape [steps, B, ...],
      those of `metrics` [steps]. "loss" (mean over the examples, without weight decay and side branches),
      "error" (fraction; a mixed example counts as the class with the larger share) and "grad_norm" describe
      the global batch before the step's update; "skipped" is whether that update was skipped.
    """

    def gradient(state, arrays, batch, batch_stats, augment_key, dropout_key):
        """Returns the gradient, new batch statistics and metrics of one microbatch."""
        if per_device_dropout:
            dropout_key = jax.random.fold_in(dropout_key, lax.axis_index(axis_name))
        image, label = prepare(arrays, batch, augment_key)

        def total_loss(params):
            if frozen:
                params = {
                    name: lax.stop_gradient(layer) if frozen(name) else layer
                    for name, layer in params.items()
                }
            variables = {"params": params, "batch_stats": batch_stats}
            rngs = {"dropout": dropout_key}
            outputs, updated = apply(variables, image, train=True, mutable=["batch_stats"], rngs=rngs)
            logits, *side_logits = outputs if isinstance(outputs, tuple) else (outputs,)
            main_loss = loss(logits, label).mean()
            side_losses = sum(loss(side, label).mean() for side in side_logits)
            metrics = {"loss": main_loss, "error": zero_one_loss(logits, label).mean()}
            return main_loss + side_weight * side_losses, (updated.get("batch_stats", {}), metrics)

        grads, (batch_stats, metrics) = jax.grad(total_loss, has_aux=True)(state.params)
        return grads, batch_stats, metrics

    def accumulated_gradient(state, arrays, batch):
        # Augmentation depends on an example's position in the global batch, so all parts share one key.
        augment_key, dropout_key = step_keys(state.seed, state.step)
        if num_microbatches == 1:
            return gradient(state, arrays, batch, state.batch_stats, augment_key, dropout_key)
        parts = jax.tree.map(lambda leaf: leaf.reshape(num_microbatches, -1, *leaf.shape[1:]), batch)
        dropout_keys = jax.random.split(dropout_key, num_microbatches)

        def add(carry, part):
            total, batch_stats = carry
            batch, dropout_key = part
            grads, batch_stats, metrics = gradient(
                state, arrays, batch, batch_stats, augment_key, dropout_key
            )
            return (jax.tree.map(jnp.add, total, (grads, metrics)), batch_stats), None

        metrics = {"loss": jnp.float32(0), "error": jnp.float32(0)}
        zeros = (jax.tree.map(jnp.zeros_like, state.params), metrics)
        (total, batch_stats), _ = lax.scan(add, (zeros, state.batch_stats), (parts, dropout_keys))
        grads, metrics = jax.tree.map(lambda leaf: leaf / num_microbatches, total)
        return grads, batch_stats, metrics

    def train_step(state, arrays, batch):
        grads, batch_stats, metrics = accumulated_gradient(state, arrays, batch)
        # Batch statistics over the global batch already agree on all devices; per-device statistics do not.
        if lax.axis_size(axis_name) > 1:  # on one device, XLA's CPU compiler would copy every gradient
            grads, batch_stats, metrics = lax.pmean((grads, batch_stats, metrics), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay:
            # The batch statistics of the latest parameters would not fit the averaged parameters.
            newest = {"params": params, "batch_stats": batch_stats}
            kept = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema_params = optax.incremental_update(newest, ema_params, 1 - kept)
        updated = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=ema_params,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        skipped = jnp.bool_(False)
        if skip_nonfinite:
            skipped = ~_all_finite((updated, metrics))
            updated = jax.tree.map(lambda new, old: _unless(skipped, new, old), updated, state)
        return updated, metrics | {"skipped": skipped}

    def train_steps(state, arrays, batches):
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            # A loop of a single step would take longer to compile.
            state, metrics = train_step(state, arrays, jax.tree.map(lambda leaf: leaf[0], batches))
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        return lax.scan(lambda state, batch: train_step(state, arrays, batch), state, batches)

    return train_steps


def _all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _unless(skipped, new, old):
    """Returns `old` if the step was skipped, else `new`. Counters still advance: schedules depend on them."""
    return jnp.where(skipped, old, new) if jnp.issubdtype(new.dtype, jnp.inexact) else new


def step_keys(seed, step):
    """Returns the keys of a training step's augmentation and dropout."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def _all_at_once(image, variables):
    del variables
    return image.shape[0]


def make_eval_step(apply, prepare, loss, axis_name, at_once=_all_at_once):
    """Returns a function that evaluates one batch, with the averaged parameters if the state has them.

    Args:
      apply, prepare, loss, axis_name: as in `make_train_steps`.
      at_once: (images [B, H, W, C] or their shape and type, variables) -> how many are computed at a time.

    Returns:
      (state, arrays, batch) -> {"loss", "error", "count"}: float32 scalars, summed over the examples of the
      global batch whose "mask" (float32 [B]) is 1.
    """

    def eval_step(state, arrays, batch):
        def each(part):
            image, label = prepare(arrays, part, None)
            logits = apply(state.variables, image, train=False)
            return {
                "loss": loss(logits, label),
                "error": zero_one_loss(logits, label),
                "count": jnp.ones_like(part["mask"]),
            }

        image, _ = jax.eval_shape(lambda: prepare(arrays, batch, None))
        values = _by_parts(each, batch, at_once(image, state.variables))
        # Multiplying by the mask would keep the NaN of a padding example.
        sums = {name: jnp.where(batch["mask"] > 0, value, 0).sum() for name, value in values.items()}
        return lax.psum(sums, axis_name)

    return eval_step


def make_predict_step(apply, normalize, at_once=_all_at_once):
    """Returns a function that computes log-probabilities, with the averaged parameters if there are any.

    Args:
      apply: `model.apply`.
      normalize: (arrays, image uint8 [B, H, W, C]) -> image float32, as `pixels.Pixels.evaluate` does it.
      at_once: as in `make_eval_step`.

    Returns:
      (state, arrays, image uint8 [B, H, W, C]) -> log-softmax of the logits, float32 [B, K].
    """

    def predict_step(state, arrays, image):
        def each(part):
            logits = apply(state.variables, normalize(arrays, part), train=False)
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        return _by_parts(each, image, at_once(image, state.variables))

    return predict_step


def _by_parts(function, batch, size):
    """Returns `function(batch)`, computed for at most `size` examples at a time; all arrays are [B, ...]."""
    count = len(jax.tree.leaves(batch)[0])
    number = -(-count // size)
    if number == 1:
        return function(batch)
    # More parts if no padding is needed then.
    number = next((more for more in range(number, 2 * number) if count % more == 0), number)
    size = -(-count // number)

    def split(leaf):
        padding = ((0, number * size - count), *((0, 0) for _ in leaf.shape[1:]))
        return jnp.pad(leaf, padding).reshape(number, size, *leaf.shape[1:])

    values = lax.map(function, jax.tree.map(split, batch))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], values)


def zero_one_loss(logits, label):
    """Returns 1 where the largest logit is not the label's, else 0, as float32 [B].

    Shapes: logits [B, K]; label int [B], or target float [B, K], of which the largest share counts.
    """
    if label.ndim == logits.ndim:
        label = label.argmax(axis=-1)
    return (logits.argmax(axis=-1) != label).astype(jnp.float32)
