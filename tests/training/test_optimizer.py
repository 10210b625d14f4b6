import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_cases.training.optimizer import OPTIMIZERS, make_optimizer, make_schedule

SCHEDULE = dict(
    name="piecewise",
    boundaries=(0.5, 0.75),
    factors=(0.1, 0.1),
    power=0.5,
    warmup="linear",
    warmup_steps=0,
    warmup_factor=0.1,
)
SGD = dict(
    name="sgd",
    momentum=0.9,
    nesterov=False,
    second_moment=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    decayed="all",
    clip_norm=0.0,
)


def rates(num_steps=100, **changes):
    schedule = make_schedule(0.1, num_steps, **SCHEDULE | changes)
    return np.array([float(schedule(step)) for step in range(num_steps)])


def test_piecewise_drops_at_the_boundaries():
    expected = [0.1] * 50 + [0.01] * 25 + [0.001] * 25
    np.testing.assert_allclose(rates(), expected, rtol=1e-5)


def test_the_schedule_of_he_et_al_drops_at_32k_and_48k_of_64k_steps():
    schedule = make_schedule(0.1, 64_000, **SCHEDULE)
    at = [float(schedule(step)) for step in (31_999, 32_000, 47_999, 48_000)]
    np.testing.assert_allclose(at, [0.1, 0.01, 0.01, 0.001], rtol=1e-5)


def test_a_constant_schedule_is_the_rate_throughout_and_after_a_warmup():
    np.testing.assert_allclose(rates(name="constant"), 0.1, rtol=1e-6)
    values = rates(name="constant", warmup_steps=20)
    np.testing.assert_allclose(values[[0, 10]], [0.01, 0.055], rtol=1e-5)
    np.testing.assert_allclose(values[20:], 0.1, rtol=1e-6)


def test_cosine_goes_from_the_rate_to_zero_after_the_warmup():
    values = rates(name="cosine", warmup_steps=20)
    np.testing.assert_allclose(values[[0, 10, 20]], [0.01, 0.055, 0.1], rtol=1e-5)
    np.testing.assert_allclose(values[60], 0.05, rtol=1e-5)
    assert (np.diff(values[20:]) < 0).all()
    assert 0 < values[-1] < 1e-3


def test_a_constant_warmup_stays_low_and_then_leaves_the_schedule_as_it_was():
    values = rates(warmup="constant", warmup_steps=30)
    np.testing.assert_allclose(values[:30], 0.01, rtol=1e-5)
    np.testing.assert_array_equal(values[30:], rates()[30:])


def test_each_boundary_has_a_factor_of_its_own():
    values = rates(factors=(0.5, 0.2))
    np.testing.assert_allclose(values[[0, 50, 75]], [0.1, 0.05, 0.01], rtol=1e-5)


def test_boundaries_that_fall_on_one_step_both_count():
    values = rates(num_steps=10, boundaries=(0.5, 0.52))
    np.testing.assert_allclose(values[[4, 5]], [0.1, 0.001], rtol=1e-5)


def test_polynomial_is_a_power_of_what_is_left():
    values = rates(name="polynomial", power=0.5)
    np.testing.assert_allclose(values, 0.1 * np.sqrt(1 - np.arange(100) / 100), rtol=1e-4)


def updates(num_steps, grad=1.0, weight=2.0, **changes):
    """The values of one weight under a constant gradient."""
    tx = make_optimizer(lambda _: 0.1, **SGD | changes)
    params = {"kernel": jnp.float32(weight)}
    state, values = tx.init(params), []
    for _ in range(num_steps):
        change, state = tx.update({"kernel": jnp.float32(grad)}, state, params)
        params = optax.apply_updates(params, change)
        values.append(float(params["kernel"]))
    return values


def test_momentum_accumulates_gradients():
    # v = 1, then 0.9 + 1, then 0.9 * 1.9 + 1.
    np.testing.assert_allclose(updates(3), [1.9, 1.71, 1.439], rtol=1e-6)


def test_nesterov_looks_one_step_ahead():
    # The update is grad + momentum * v: 1 + 0.9, then 1 + 0.9 * 1.9.
    np.testing.assert_allclose(updates(2, nesterov=True), [1.81, 1.539], rtol=1e-6)


def test_weight_decay_goes_through_the_momentum():
    # g = 0 + 0.5 * 2; then v = 0.9 * 1 + 0.5 * 1.9.
    np.testing.assert_allclose(updates(2, grad=0.0, weight_decay=0.5), [1.9, 1.715], rtol=1e-6)


def test_no_momentum_is_plain_gradient_descent():
    np.testing.assert_allclose(updates(2, momentum=0.0), [1.9, 1.8], rtol=1e-6)


def test_rmsprop_divides_by_the_root_of_the_mean_square():
    # Mean squares 0.9 * 1 + 0.1 * 4 and 0.9 * 1.3 + 0.1 * 4.
    settings = dict(name="rmsprop", momentum=0.0, second_moment=0.9, epsilon=1.0, grad=2.0)
    first = 2 - 0.1 * 2 / np.sqrt(1.3 + 1)
    np.testing.assert_allclose(
        updates(2, **settings), [first, first - 0.1 * 2 / np.sqrt(1.57 + 1)], rtol=1e-5
    )


def test_adam_goes_by_the_rate_whatever_the_size_of_the_gradient():
    np.testing.assert_allclose(updates(3, name="adam", grad=1e-3), [1.9, 1.8, 1.7], rtol=1e-4)


def test_adamw_decays_apart_from_the_gradient():
    # 2 - rate * (1 + 0.5 * 2).
    np.testing.assert_allclose(updates(1, name="adamw", weight_decay=0.5), [1.8], rtol=1e-4)
    np.testing.assert_allclose(updates(1, name="adam", weight_decay=0.5), [1.9], rtol=1e-4)


def test_clipping_limits_the_gradient_with_its_weight_decay():
    values = updates(1, grad=3.0, weight_decay=0.5, clip_norm=0.25, momentum=0.0)
    np.testing.assert_allclose(values, [2 - 0.1 * 0.25], rtol=1e-5)


def test_clipping_keeps_the_direction_of_the_whole_gradient():
    params = {"kernel": jnp.float32(2), "bias": jnp.float32(1)}
    tx = make_optimizer(lambda _: 0.1, **SGD | dict(momentum=0.0, clip_norm=1.0))
    change, _ = tx.update({"kernel": jnp.float32(3), "bias": jnp.float32(4)}, tx.init(params), params)
    np.testing.assert_allclose([change["kernel"], change["bias"]], [-0.06, -0.08], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_of_every_optimizer_has_its_own_learning_rate(name):
    def changes(schedule):
        tx, params = make_optimizer(schedule, **SGD | dict(name=name, momentum=0.0)), {"kernel": jnp.ones(1)}
        state, found = tx.init(params), []
        for _ in range(3):
            change, state = tx.update({"kernel": jnp.ones(1)}, state, params)
            found.append(change["kernel"].item())
        return np.array(found)

    falling = changes(lambda step: 0.1 / (1 + step))
    np.testing.assert_allclose(falling, changes(lambda _: 0.1) / (1 + np.arange(3)), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("grad", [3.0, 30.0])
def test_every_optimizer_sees_no_more_of_a_gradient_than_the_limit(name, grad):
    settings = dict(name=name, epsilon=1.0)  # with a small one, Adam hardly sees a gradient's size
    limited = updates(2, grad=grad, clip_norm=1.0, **settings)
    np.testing.assert_allclose(limited, updates(2, grad=1.0, **settings), rtol=1e-6)


def test_biases_and_normalisation_can_be_left_out_of_the_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones((3, 2))}  # of three blocks
    grads = {name: jnp.zeros_like(value) for name, value in params.items()}
    for decayed, bias in (("all", -0.05), ("kernels", 0.0)):
        tx = make_optimizer(lambda _: 0.1, **SGD | dict(weight_decay=0.5, decayed=decayed))
        change, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(change["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_allclose(change["bias"], bias, rtol=1e-6)
        np.testing.assert_allclose(change["scale"], bias, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "step"},
            "schedule.name = 'step' is unknown; known: constant, piecewise, cosine, polynomial",
        ),
        ({"warmup": "exponential"}, "schedule.warmup = 'exponential' is unknown; known: linear, constant"),
        (
            {"boundaries": (0.75, 0.5)},
            "schedule.boundaries = .* must be increasing fractions between 0 and 1",
        ),
        ({"boundaries": (50, 75)}, "schedule.boundaries = .* must be increasing fractions"),
        ({"boundaries": (0.0, 0.5)}, "schedule.boundaries = .* must be increasing fractions"),
        ({"boundaries": (0.5, 0.5)}, "schedule.boundaries = .* must be increasing fractions"),
        ({"boundaries": (0.5, 1.0)}, "schedule.boundaries = .* must be increasing fractions"),
        ({"warmup_steps": 100}, "schedule.warmup_steps = 100 must be 0 or more and below num_steps = 100"),
        ({"warmup_steps": -5}, "schedule.warmup_steps = -5 must be 0 or more"),
        ({"factors": (0.1, 0.0)}, "schedule.factors = 0.0 must be above 0"),
        ({"factors": (0.1,)}, r"schedule.factors = \(0.1,\) must have one number for each"),
        ({"power": 0.0}, "schedule.power = 0.0 must be above 0"),
        ({"warmup_factor": -1.0}, "schedule.warmup_factor = -1.0 must be above 0"),
    ],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rates(**changes)


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
def test_an_impossible_learning_rate_is_refused(rate):
    with pytest.raises(ValueError, match=r"optimizer.learning_rate = .* must be above 0"):
        make_schedule(rate, 100, **SCHEDULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lion"}, "optimizer.name = 'lion' is unknown; known: sgd, rmsprop, adam, adamw"),
        ({"momentum": 1.0}, r"optimizer.momentum = 1.0 must be in \[0, 1\)"),
        ({"momentum": -0.1}, r"optimizer.momentum = -0.1 must be in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "optimizer.weight_decay = -0.0001 must be 0 or more"),
        ({"weight_decay": float("inf")}, "optimizer.weight_decay = inf must be 0 or more, and finite"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm = -1.0 must be 0 or more"),
        ({"second_moment": 1.5}, r"optimizer.second_moment = 1.5 must be in \[0, 1\)"),
        ({"epsilon": 0.0}, "optimizer.epsilon = 0.0 must be above 0"),
        (
            {"rate_patterns": ("*/bias",)},
            r"optimizer.rate_factors = \(\) must have one number for each of optimizer.rate_patterns = \('",
        ),
        (
            {"rate_patterns": ("a", "b"), "rate_factors": (2.0, 0.0)},
            "optimizer.rate_factors = 0.0 must be above 0, and finite",
        ),
        ({"decayed": "biases"}, "optimizer.decayed = 'biases' is unknown; known: all, kernels"),
    ],
)
def test_impossible_optimizers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(lambda _: 0.1, **SGD | changes)


def test_polynomial_goes_from_the_rate_to_zero_after_the_warmup():
    values = rates(name="polynomial", power=2.0, warmup_steps=20)
    np.testing.assert_allclose(values[20:], 0.1 * (1 - np.arange(80) / 80) ** 2, rtol=1e-4, atol=1e-9)


def test_a_boundary_is_the_nearest_step():
    values = rates(boundaries=(0.29, 0.75))  # 0.29 * 100 is a little less than 29
    np.testing.assert_allclose(values[[28, 29]], [0.1, 0.01], rtol=1e-5)


def test_rmsprop_has_momentum():
    # Of what the rate and the mean square make of the gradient: v, then v * 0.9 + w.
    settings = dict(name="rmsprop", second_moment=0.9, epsilon=1.0, grad=2.0)
    v, w = 0.1 * 2 / np.sqrt(1.3 + 1), 0.1 * 2 / np.sqrt(1.57 + 1)
    np.testing.assert_allclose(updates(2, **settings), [2 - v, 2 - v - 0.9 * v - w], rtol=1e-5)


def test_nesterovs_rmsprop_looks_one_step_ahead():
    # Each change is w + 0.9 times the new v, which is w + 0.9 times the old one.
    settings = dict(name="rmsprop", nesterov=True, second_moment=0.9, epsilon=1.0, grad=2.0)
    v, w = 0.1 * 2 / np.sqrt(1.3 + 1), 0.1 * 2 / np.sqrt(1.57 + 1)
    first = 2 - (v + 0.9 * v)
    second = first - (w + 0.9 * (w + 0.9 * v))
    np.testing.assert_allclose(updates(2, **settings), [first, second], rtol=1e-5)


def test_adam_is_its_formula():
    settings = dict(SGD, name="adam", momentum=0.8, second_moment=0.95, epsilon=0.1)
    tx, params = make_optimizer(lambda _: 0.1, **settings), {"kernel": jnp.float32(2)}
    state, mean, square = tx.init(params), 0.0, 0.0
    for step, grad in enumerate((3.0, -1.0, 0.5), start=1):
        change, state = tx.update({"kernel": jnp.float32(grad)}, state, params)
        mean, square = 0.8 * mean + 0.2 * grad, 0.95 * square + 0.05 * grad**2
        root = np.sqrt(square / (1 - 0.95**step))
        np.testing.assert_allclose(change["kernel"], -0.1 * mean / (1 - 0.8**step) / (root + 0.1), rtol=1e-5)


def test_nesterovs_adam_takes_the_momentum_of_the_next_step():
    # Dozat 2016: of a first gradient g the mean is (b1 (1 - b1) / (1 - b1^2) + 1) g, its root as ever.
    change = 2 - updates(1, name="adam", nesterov=True)[0]
    np.testing.assert_allclose(change, 0.1 * (0.9 * 0.1 / (1 - 0.9**2) + 1), rtol=1e-4)


def test_adamw_leaves_biases_out_of_the_decay_too():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    grads = {name: jnp.zeros(2) for name in params}
    for decayed, bias in (("all", -0.05), ("kernels", 0.0)):
        tx = make_optimizer(lambda _: 0.1, **SGD | dict(name="adamw", weight_decay=0.5, decayed=decayed))
        change, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(change["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_allclose(change["bias"], bias, rtol=1e-6)


LAYERS = {"conv1": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "dense": {"kernel": jnp.full(2, 2.0)}}


def train_layers(rate, num_steps=3, **changes):
    """The layers after some steps, whose gradient is the step's number times the parameter."""
    tx, params = make_optimizer(lambda _: rate, **SGD | dict(weight_decay=0.1) | changes), LAYERS
    state = tx.init(params)
    for step in range(num_steps):
        grads = jax.tree.map(lambda value, step=step: step * value, params)
        change, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, change)
    return params


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_each_parameter_has_the_rate_that_the_patterns_which_fit_it_make(name):
    layers = train_layers(0.1, name=name, rate_patterns=("*/bias", "conv1/*"), rate_factors=(2.0, 0.3))
    for rate, layer, leaf in ((0.06, "conv1", "bias"), (0.03, "conv1", "kernel"), (0.1, "dense", "kernel")):
        expected = train_layers(rate, name=name)[layer][leaf]
        np.testing.assert_allclose(layers[layer][leaf], expected, rtol=1e-6)
        assert (layers[layer][leaf] != LAYERS[layer][leaf]).all()


def test_a_pattern_of_rates_fits_whole_names():
    params = {"conv1": {"kernel": jnp.ones(2)}, "block": {"conv1": {"kernel": jnp.ones(2)}}}
    settings = SGD | dict(momentum=0.0)
    tx = make_optimizer(lambda _: 0.1, **settings, rate_patterns=("conv1/*",), rate_factors=(2.0,))
    change, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(change["conv1"]["kernel"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(change["block"]["conv1"]["kernel"], -0.1, rtol=1e-6)


def test_a_pattern_of_rates_that_fits_no_parameter_is_refused_with_those_that_there_are():
    tx = make_optimizer(lambda _: 0.1, **SGD, rate_patterns=("*/bias", "conv2/*"), rate_factors=(2.0, 2.0))
    with pytest.raises(
        ValueError, match=r"optimizer.rate_patterns = .*: 'conv2/\*' matches no parameter; there "
    ):
        jax.eval_shape(tx.init, LAYERS)
