import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.training import losses

SETTINGS = dict(name="cross_entropy", label_smoothing=0.0, map_constant=1.0)
LOGITS = np.float32([[2, 0, -1], [0, 0, 0]])
LABEL = np.int32([0, 2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_is_computed_in_float32(dtype):
    loss = losses.cross_entropy(jnp.asarray([[100.0, 0.0], [0.0, 0.0]], dtype), jnp.array([0, 1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [0, np.log(2)], rtol=1e-6)


def test_label_smoothing_is_the_cross_entropy_against_the_smoothed_target():
    target = 0.9 * np.eye(3)[LABEL] + 0.1 / 3
    log_probs = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
    smooth = losses.make_loss(**SETTINGS | {"label_smoothing": 0.1})
    np.testing.assert_allclose(smooth(LOGITS, LABEL), -(target * log_probs).sum(axis=1), rtol=1e-5)


def test_a_target_of_one_class_is_its_label_and_one_of_two_a_blend_of_both_losses():
    one_hot = np.eye(3, dtype=np.float32)
    for smoothing in (0.0, 0.1):
        loss = losses.make_loss(**SETTINGS | {"label_smoothing": smoothing})
        np.testing.assert_allclose(loss(LOGITS, one_hot[LABEL]), loss(LOGITS, LABEL), rtol=1e-6)
        other = np.int32([1, 1])
        target = 0.7 * one_hot[LABEL] + 0.3 * one_hot[other]
        expected = 0.7 * loss(LOGITS, LABEL) + 0.3 * loss(LOGITS, other)
        np.testing.assert_allclose(loss(LOGITS, target), expected, rtol=1e-6)


def test_logits_of_other_classes_are_refused():
    loss = losses.of_classes(losses.make_loss(**SETTINGS), 3)
    np.testing.assert_array_equal(loss(LOGITS, LABEL), losses.cross_entropy(LOGITS, LABEL))
    for shape in ((2, 2), (2, 4), (2, 1, 3)):
        with pytest.raises(ValueError, match=r"logits of shape \[2, .* with 3 classes need \[batch, 3\]"):
            loss(jnp.zeros(shape), LABEL)
    with pytest.raises(ValueError, match="the network returns a tuple, not logits; only in training"):
        loss((LOGITS, LOGITS), LABEL)  # side branches in an evaluation


def test_the_mean_squared_loss_is_the_penalty_of_the_right_class():
    loss = losses.make_loss(**SETTINGS | {"name": "rbf_mean_squared"})
    np.testing.assert_allclose(loss(-np.float32([[3, 5], [7, 2]]), np.int32([0, 1])), [3, 2])


def test_the_map_loss_is_equation_9():
    penalties = np.float32([[3, 5], [7, 2]])
    loss = losses.make_loss(**SETTINGS | {"name": "rbf_map", "map_constant": 0.5})
    expected = [
        3 + np.log(np.exp(-0.5) + np.exp(-3) + np.exp(-5)),
        2 + np.log(np.exp(-0.5) + np.exp(-7) + np.exp(-2)),
    ]
    np.testing.assert_allclose(loss(-penalties, np.int32([0, 1])), expected, rtol=1e-5)


def test_the_map_loss_pushes_near_wrong_classes_away_and_leaves_far_ones():
    def loss(penalties):
        return losses.rbf_map(-penalties, jnp.array([0]), j=5.0)[0]

    right, near, far = jax.grad(loss)(jnp.array([[1.0, 2.0, 50.0]]))[0]
    assert right > 0 > near
    assert abs(far) < 1e-6


def test_the_map_loss_survives_penalties_whose_exponentials_vanish():
    loss = losses.rbf_map(jnp.full((1, 10), -1e4), jnp.array([3]), j=1e3)
    np.testing.assert_allclose(loss, 1e4 - 1e3, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "hinge"},
            "loss.name = 'hinge' is unknown; known: cross_entropy, rbf_mean_squared, rbf_map",
        ),
        ({"label_smoothing": 1.0}, r"loss.label_smoothing = 1.0 must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"loss.label_smoothing = -0.1 must be in \[0, 1\)"),
        (
            {"name": "rbf_map", "label_smoothing": 0.1},
            r"0.1 is for loss.name = 'cross_entropy', not 'rbf_map'",
        ),
        ({"map_constant": 0.0}, "loss.map_constant = 0.0 must be above 0"),
        ({"map_constant": float("inf")}, "loss.map_constant = inf must be above 0, and finite"),
    ],
)
def test_impossible_losses_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        losses.make_loss(**SETTINGS | changes)
