"""Averages over views: every example once, with all of its views, whatever the batches."""

import numpy as np
import pytest

from cnn_cases.training import predictions


def log_probabilities(images):
    """Of three classes, from an image's first and last value alone; zero images are the padding."""
    values = np.stack([images[:, 0, 0, 0], images[:, -1, -1, 0]], axis=1).astype(np.float64)
    logits = np.concatenate([values, np.ones((len(images), 1))], axis=1) / 50
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def ragged(number):
    """Images of three shapes."""
    rng = np.random.default_rng(number)
    return rng.integers(1, 256, (2 + number % 3, 4, 1), np.uint8), number % 3


def three_views(image):
    return [image, image[:, ::-1], np.ascontiguousarray(image[:2])]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("ahead", [0, 2])
def test_every_example_is_averaged_over_all_of_its_views_whatever_the_batches(batch_size, ahead):
    examples = [ragged(number) for number in range(11)]
    sizes = set()

    def run(images):
        sizes.add(len(images))
        return log_probabilities(images)

    probabilities, label = predictions.average_views(
        iter(examples), three_views, run, batch_size=lambda shape: batch_size + shape[0], ahead=ahead
    )
    expected = [
        np.mean([np.exp(log_probabilities(view[None])[0]) for view in three_views(image)], axis=0)
        for image, _ in examples
    ]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    np.testing.assert_array_equal(label, [label for _, label in examples])
    assert sizes <= {batch_size + height for height in (2, 3, 4)}, "the last batches are padded"


def test_what_comes_back_may_have_an_axis_of_devices():
    examples = [ragged(number) for number in range(7)]

    def sharded(images):
        return log_probabilities(images).reshape(2, len(images) // 2, 3)

    by_two, _ = predictions.average_views(examples, three_views, sharded, batch_size=lambda _: 4)
    plain, _ = predictions.average_views(examples, three_views, log_probabilities, batch_size=lambda _: 4)
    np.testing.assert_array_equal(by_two, plain)


def test_an_example_that_lacks_a_view_is_noticed():
    with pytest.raises(AssertionError, match="every example has all of its views"):
        predictions.average_views(
            [ragged(0), ragged(1)],
            lambda image: [image] * image.shape[0],
            log_probabilities,
            batch_size=lambda _: 2,
        )


def test_no_examples_have_no_predictions():
    probabilities, label = predictions.average_views(
        [], three_views, log_probabilities, batch_size=lambda _: 2
    )
    assert (probabilities.shape, label.shape) == ((0, 0), (0,))


def test_what_is_no_number_is_wrong():
    probabilities = np.full((2, 10), 0.1)
    probabilities[0] = np.nan
    scores = predictions.scores(probabilities, np.array([0, 0]))
    assert (scores["error"], scores["top_5_error"]) == (0.5, 0.5)


def test_scores_of_known_predictions():
    probabilities = np.array(
        [[0.3, 0.2, 0.2, 0.1, 0.1, 0.1], [0.3, 0.2, 0.2, 0.1, 0.05, 0.15], [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]]
    )
    scores = predictions.scores(probabilities, np.array([0, 4, 4]))
    assert scores["loss"] == pytest.approx(-np.log([0.3, 0.05, 0.1]).mean())
    # The third: 0.5 and four equal ones of lower classes stand before it.
    assert (scores["error"], scores["top_5_error"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_five_classes_have_no_top_5_and_a_vanished_probability_has_a_loss():
    scores = predictions.scores(np.array([[0.0, 1, 0, 0, 0]]), np.array([0]))
    assert set(scores) == {"loss", "error"}
    assert 700 < scores["loss"] < 710


def test_the_loss_of_certain_and_right_predictions_is_zero_without_a_sign():
    scores = predictions.scores(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 0]))
    assert str(scores["loss"]) == "0.0"
