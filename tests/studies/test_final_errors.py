import numpy as np
import pytest

from cnn_cases.studies import final_errors
from tests.studies.conftest import run


@pytest.fixture
def asking(record):
    record["config"]["against"] = "model.depth"
    return record


def lines_of(axis):
    """The points of each line of means."""
    lines = [line for line in axis.lines if line.get_linestyle() == "-" and line.get_marker() == "None"]
    return [line.get_xydata() for line in lines]


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_line_has_the_means_of_a_point_over_its_seeds(asking):
    figure = final_errors.draw_study(asking)
    training, test = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["train/error", "test/error"]
    assert (training.get_xlabel(), training.get_ylabel()[:30]) == ("depth", "error after the last step (%),")
    for axis, means in ((training, ([20, 50], [20, 5])), (test, ([30, 60], [30, 15]))):
        for found, expected in zip(lines_of(axis), means, strict=True):
            np.testing.assert_allclose(found, np.transpose([[8, 20], expected]), atol=1e-9)
    assert legend_of(figure) == ["plain True", "plain True, diverged", "plain False"]
    assert [text.get_text() for text in training.texts] == ["1 of 2"]


def test_the_order_of_the_grid_is_not_that_of_the_axis(asking):
    before = lines_of(final_errors.draw_study(asking).axes[0])
    asking["config"]["grid"][0][1].reverse()
    asking["runs"].sort(key=lambda one: -one["model.depth"])
    after = lines_of(final_errors.draw_study(asking).axes[0])
    np.testing.assert_allclose(after, before)


def test_the_numbers_of_diverged_runs_have_room(asking):
    for one in asking["runs"]:
        one["metrics"] = dict.fromkeys(["train/error", "test/error"], 0.2)
    axis, _ = final_errors.draw_study(asking).axes
    assert axis.get_ylim() == pytest.approx((0, 42))
    for one in asking["runs"]:
        one["status"] = "finished"
    axis, _ = final_errors.draw_study(asking).axes
    assert axis.get_ylim() == pytest.approx((0, 21))


def test_a_grid_of_numbers_alone_has_one_line_and_no_legend(asking):
    asking["config"]["grid"] = [["model.depth", [8, 20]]]
    asking["runs"] = [one for one in asking["runs"] if not one["model.plain"]]
    figure = final_errors.draw_study(asking)
    assert len(lines_of(figure.axes[0])) == 1
    assert legend_of(figure) == []


@pytest.mark.parametrize(
    ("rates", "scale"), [((0.001, 0.01, 0.1), "log"), ((0.01, 0.02), "linear"), ((0, 0.001, 0.1), "linear")]
)
def test_numbers_of_several_magnitudes_have_a_logarithmic_axis(rates, scale, asking):
    key = "optimizer.learning_rate"
    asking["config"] |= {"grid": [[key, list(rates)]], "against": key}
    asking["runs"] = [run(8, False, 0, 0.1) | {key: rate} for rate in rates]
    axis = final_errors.draw_study(asking).axes[0]
    assert axis.get_xscale() == scale
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(rate) for rate in rates]
    low, high = axis.get_xlim()
    assert low < rates[0]
    assert rates[-1] < high


def test_codes_have_rows_of_their_own(mixed):
    mixed["config"]["against"] = "model.depth"
    figure = final_errors.draw_study(mixed)
    codes = [axis.get_title().partition(", code ")[2] for axis in figure.axes]
    assert codes == ["aaaaaaa", "aaaaaaa", "bbbbbbb-dirty", "bbbbbbb-dirty"]


def test_many_lines_have_no_bands(asking):
    momenta = [0.1, 0.2, 0.3, 0.4, 0.5]
    asking["config"]["grid"] = [["model.depth", [8, 20]], ["optimizer.momentum", momenta]]
    asking["runs"] = [
        run(depth, False, 0, 0.1) | {"optimizer.momentum": momentum}
        for depth in (8, 20)
        for momentum in momenta
    ]
    figure = final_errors.draw_study(asking)
    assert len(lines_of(figure.axes[0])) == 5
    assert len(figure.axes[0].collections) == 0
