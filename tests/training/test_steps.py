import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_cases.training import steps
from cnn_cases.training.losses import cross_entropy
from cnn_cases.training.state import TrainState

AXIS = "batch"


def linear(variables, image, train, **_):
    """A stand-in for `model.apply`: logits linear in the image, no statistics."""
    logits = image @ variables["params"]["w"]
    return (logits, {}) if train else logits


def prepare(arrays, batch, key):
    del key
    return arrays["image"][batch["index"]], arrays["label"][batch["index"]]


def problem():
    rng = np.random.default_rng(0)
    arrays = {"image": rng.normal(size=(12, 3)).astype(np.float32), "label": rng.integers(0, 4, 12)}
    tx = optax.sgd(0.1)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    return arrays, tx, TrainState(jnp.int32(0), jnp.int32(0), params, {}, {}, tx.init(params))


def on_one_device(function):
    mapped = jax.pmap(function, AXIS, in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:1])
    return lambda state, arrays, batch: mapped(state, arrays, jax.tree.map(lambda leaf: leaf[None], batch))


def test_a_step_is_gradient_descent_on_the_mean_loss():
    arrays, tx, state = problem()
    train = on_one_device(steps.make_train_steps(linear, tx, prepare, cross_entropy, AXIS))
    index = np.array([[3, 1, 7]])
    after, metrics = train(state, arrays, {"index": index})

    image, label = arrays["image"][index[0]], arrays["label"][index[0]]
    logits = image @ np.asarray(state.params["w"])
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = image.T @ (chances - np.eye(4)[label]) / 3
    np.testing.assert_allclose(after.params["w"], state.params["w"] - 0.1 * gradient, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], [-np.log(chances[range(3), label]).mean()], rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], [(logits.argmax(axis=1) != label).mean()], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], [np.sqrt((gradient**2).sum())], rtol=1e-5)
    assert int(after.step) == 1


def test_several_steps_in_one_call_are_the_same_steps():
    arrays, tx, state = problem()
    train = on_one_device(steps.make_train_steps(linear, tx, prepare, cross_entropy, AXIS))
    index = np.arange(12).reshape(4, 3)
    at_once, metrics = train(state, arrays, {"index": index})
    losses = []
    for one in index:
        state, each = train(state, arrays, {"index": one[None]})
        losses.append(each["loss"][0])
    np.testing.assert_allclose(at_once.params["w"], state.params["w"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    assert int(at_once.step) == 4


def test_a_batch_on_several_devices_has_the_step_and_the_metrics_of_the_whole():
    arrays, tx, state = problem()
    train_steps = steps.make_train_steps(linear, tx, prepare, cross_entropy, AXIS)
    results = []
    for count in (1, 4):
        settings = dict(in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:count])
        batches = {"index": np.arange(12).reshape(count, 1, -1)}
        results.append(jax.pmap(train_steps, AXIS, **settings)(state, arrays, batches))
    (one, metrics), (other, other_metrics) = results
    np.testing.assert_allclose(one.params["w"], other.params["w"], atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, other_metrics[name], rtol=1e-5, err_msg=name)


def test_every_seed_and_step_has_a_key_for_augmentation_and_another_for_dropout():
    keys = [steps.step_keys(seed, step) for seed in (0, 1) for step in (0, 1, 2)]
    assert len({key.tobytes() for pair in keys for key in np.asarray(jax.random.key_data(pair))}) == 12


def adam_problem():
    """The problem with an optimizer that keeps counters, floats and a schedule."""
    arrays, _, state = problem()
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    average = {"params": state.params, "batch_stats": {}}
    return arrays, tx, state.replace(opt_state=tx.init(state.params), ema_params=average)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])  # the last is finite itself, but not its square
def test_a_step_whose_numbers_go_wrong_changes_nothing_but_the_counters(value):
    arrays, tx, before = adam_problem()
    arrays["image"][1] = value
    train = on_one_device(
        steps.make_train_steps(linear, tx, prepare, cross_entropy, AXIS, ema_decay=0.9, skip_nonfinite=True)
    )
    after, metrics = train(before, arrays, {"index": np.array([[0, 1, 2]])})
    assert metrics["skipped"].tolist() == [True]
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            np.testing.assert_array_equal(new, old)
    assert int(after.step) == 1
    assert after.opt_state[1].count == 1  # the schedule's


def test_a_sound_step_is_the_same_where_others_would_be_skipped():
    arrays, tx, before = adam_problem()
    batch = {"index": np.array([[0, 1, 2]])}
    states = []
    for skip in (False, True):
        train = on_one_device(
            steps.make_train_steps(
                linear, tx, prepare, cross_entropy, AXIS, ema_decay=0.9, skip_nonfinite=skip
            )
        )
        after, metrics = train(before, arrays, batch)
        assert metrics["skipped"].tolist() == [False]
        states.append(after)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_masked_examples_do_not_count_not_even_as_nan():
    arrays, _, state = problem()
    arrays["image"][5] = np.nan
    evaluate = on_one_device(steps.make_eval_step(linear, prepare, cross_entropy, AXIS))
    batch = {"index": np.array([0, 1, 5]), "mask": np.float32([1, 1, 0])}
    sums = evaluate(state, arrays, batch)
    expected = cross_entropy(arrays["image"][:2] @ state.params["w"], arrays["label"][:2])
    np.testing.assert_allclose(sums["loss"], expected.sum(), rtol=1e-6)
    assert float(sums["count"]) == 2


@pytest.mark.parametrize(
    ("count", "size", "parts"), [(12, 12, [12]), (12, 4, [4]), (12, 5, [4]), (11, 5, [4]), (11, 1, [1])]
)
def test_an_evaluation_in_parts_is_that_of_the_whole_batch(count, size, parts):
    arrays, _, state = problem()
    seen = []

    def apply(variables, image, train):
        seen.append(len(image))
        return linear(variables, image, train)

    def at_once(image, variables):
        assert image.shape == (count, 3)
        assert variables["params"].keys() == {"w"}
        return size

    batch = {"index": np.arange(count), "mask": np.float32([1] * (count - 1) + [0])}
    whole = on_one_device(steps.make_eval_step(linear, prepare, cross_entropy, AXIS))
    partly = on_one_device(steps.make_eval_step(apply, prepare, cross_entropy, AXIS, at_once))
    jax.tree.map(np.testing.assert_allclose, partly(state, arrays, batch), whole(state, arrays, batch))
    assert seen == parts
    image = arrays["image"][:count]
    predict = jax.jit(steps.make_predict_step(apply, lambda _, image: image, at_once))
    expected = jax.nn.log_softmax(image @ state.params["w"])
    np.testing.assert_allclose(predict(state, arrays, image), expected, rtol=1e-5)
    assert seen == parts * 2


def test_microbatches_give_the_same_step():
    arrays, tx, state = problem()
    batch = {"index": np.arange(12)[None]}
    whole, metrics = on_one_device(steps.make_train_steps(linear, tx, prepare, cross_entropy, AXIS))(
        state, arrays, batch
    )
    parts, part_metrics = on_one_device(
        steps.make_train_steps(linear, tx, prepare, cross_entropy, AXIS, num_microbatches=3)
    )(state, arrays, batch)
    np.testing.assert_allclose(whole.params["w"], parts.params["w"], atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, part_metrics[name], rtol=1e-5)


def test_side_branches_add_their_weighted_loss_to_the_gradient_and_not_to_the_metric():
    arrays, tx, state = problem()

    def with_sides(variables, image, train, **_):
        logits, updated = linear(variables, image, train)
        return (logits, logits, 2 * logits), updated

    batch = {"index": np.arange(12)[None]}
    train = on_one_device(
        steps.make_train_steps(with_sides, tx, prepare, cross_entropy, AXIS, side_weight=0.3)
    )
    after, metrics = train(state, arrays, batch)

    def total(w):
        logits = arrays["image"] @ w
        losses = [cross_entropy(scale * logits, arrays["label"]).mean() for scale in (1, 1, 2)]
        return losses[0] + 0.3 * (losses[1] + losses[2])

    gradient = jax.grad(total)(state.params["w"])
    np.testing.assert_allclose(after.params["w"], state.params["w"] - 0.1 * gradient, atol=1e-6)
    main = cross_entropy(arrays["image"] @ state.params["w"], arrays["label"]).mean()
    np.testing.assert_allclose(metrics["loss"], [main], rtol=1e-5)


def shifting(variables, image, train, **_):
    """`linear`, with a running statistic: the number of steps, which in evaluation shifts the first logit."""
    shift = variables["batch_stats"]["shift"]
    logits = image @ variables["params"]["w"]
    return (logits, {"batch_stats": {"shift": shift + 1}}) if train else logits.at[:, 0].add(shift)


def test_the_average_net_follows_fast_at_first_and_is_what_is_evaluated():
    arrays, tx, state = problem()
    average = {"params": {"w": state.params["w"]}, "batch_stats": {"shift": jnp.float32(0)}}
    state = state.replace(batch_stats={"shift": jnp.float32(0)}, ema_params=average)
    train = on_one_device(steps.make_train_steps(shifting, tx, prepare, cross_entropy, AXIS, ema_decay=0.2))
    w, shift = np.asarray(state.params["w"]), 0.0
    for number, kept in enumerate((1 / 10, 2 / 11, 0.2), start=1):
        state, _ = train(state, arrays, {"index": np.arange(12)[None]})
        w = kept * w + (1 - kept) * np.asarray(state.params["w"])
        shift = kept * shift + (1 - kept) * number
    np.testing.assert_allclose(state.ema_params["params"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema_params["batch_stats"]["shift"], shift, rtol=1e-5)
    logits = (arrays["image"] @ w).astype(np.float32) + np.float32([shift, 0, 0, 0])
    evaluate = on_one_device(steps.make_eval_step(shifting, prepare, cross_entropy, AXIS))
    batch = {"index": np.arange(12), "mask": np.ones(12, np.float32)}
    expected = cross_entropy(logits, arrays["label"]).sum()
    np.testing.assert_allclose(evaluate(state, arrays, batch)["loss"], expected, rtol=1e-5)
    predict = steps.make_predict_step(shifting, lambda _, image: image)
    log_probs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(predict(state, arrays, jnp.asarray(arrays["image"])), log_probs, rtol=1e-4)


def test_an_example_is_wrong_where_the_largest_logit_is_not_the_labels():
    logits = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_array_equal(steps.zero_one_loss(logits, jnp.array([1, 1])), [0, 1])
    target = jnp.array([[0.4, 0.6], [0.3, 0.7]])
    np.testing.assert_array_equal(steps.zero_one_loss(logits, target), [0, 1])


def remembering(variables, image, train, rngs, **_):
    """`linear`, with running statistics that number its calls and hold a draw of each one's dropout key."""
    assert train
    number, draws = (variables["batch_stats"][name] for name in ("number", "draws"))
    draws = draws.at[number.astype(int)].set(jax.random.uniform(rngs["dropout"]))
    return image @ variables["params"]["w"], {"batch_stats": {"number": number + 1, "draws": draws}}


def remembered(num_devices, **settings):
    arrays, tx, state = problem()
    state = state.replace(batch_stats={"number": jnp.float32(0), "draws": jnp.zeros(3)})
    train = jax.pmap(
        steps.make_train_steps(remembering, tx, prepare, cross_entropy, AXIS, **settings),
        AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=jax.devices()[:num_devices],
    )
    after, _ = train(state, arrays, {"index": np.arange(12).reshape(num_devices, 1, -1)})
    return int(after.batch_stats["number"]), np.asarray(after.batch_stats["draws"])


def test_microbatches_hand_on_their_statistics_and_have_dropout_keys_of_their_own():
    number, draws = remembered(1, num_microbatches=3)
    assert number == 3
    assert len({*draws.tolist(), 0.0}) == 4


def test_devices_have_dropout_keys_of_their_own_where_asked_for_and_the_mean_of_their_statistics():
    _, key = steps.step_keys(0, 0)
    own = [jax.random.uniform(jax.random.fold_in(key, device)) for device in range(2)]
    for per_device_dropout, expected in ((False, jax.random.uniform(key)), (True, np.mean(own))):
        _, draws = remembered(2, per_device_dropout=per_device_dropout)
        np.testing.assert_allclose(draws[0], expected, rtol=1e-6)


def after_a_step_that_must_be_skipped(model, tx, arrays, before):
    """The state after a step whose gradient is finite; it is asserted to be skipped."""
    train = on_one_device(
        steps.make_train_steps(model, tx, prepare, cross_entropy, AXIS, skip_nonfinite=True)
    )
    after, metrics = train(before, arrays, {"index": np.array([[0, 1, 2]])})
    assert np.isfinite(metrics["grad_norm"]).all()
    assert metrics["skipped"].tolist() == [True]
    np.testing.assert_array_equal(after.params["w"], before.params["w"])
    return after


def test_a_step_whose_update_alone_overflows_is_skipped():
    arrays, _, before = problem()
    tx = optax.chain(optax.scale(1e30), optax.scale(1e30))
    before = before.replace(opt_state=tx.init(before.params))
    after_a_step_that_must_be_skipped(linear, tx, arrays, before)


def test_a_step_whose_batch_statistics_alone_overflow_is_skipped():
    def overflowing(variables, image, train, **_):
        logits, _ = linear(variables, image, train)
        return logits, {"batch_stats": {"var": 2 * variables["batch_stats"]["var"]}}

    arrays, tx, before = problem()
    before = before.replace(batch_stats={"var": jnp.float32(3e38)})
    after = after_a_step_that_must_be_skipped(overflowing, tx, arrays, before)
    np.testing.assert_array_equal(after.batch_stats["var"], before.batch_stats["var"])


def test_log_probabilities_are_computed_in_float32_even_from_bfloat16_logits():
    logits = jnp.asarray([[5.0, 1.3, -0.7], [0.1, 0.2, 0.3]], jnp.bfloat16)
    predict = steps.make_predict_step(lambda *_, **__: logits, lambda _, image: image)
    _, _, state = problem()
    log_probs = predict(state, {}, jnp.zeros((2, 1)))
    assert log_probs.dtype == jnp.float32
    exact = np.asarray(logits, np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probs, exact, rtol=1e-5)
