import pathlib

import numpy as np
import pytest
from matplotlib.figure import Figure

from cnn_cases.studies import figures, ledger, records

RESULTS = pathlib.Path(__file__).parents[2] / "results"


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_curve_is_mean_least_and_greatest_in_percent(record):
    steps, mean, low, high = figures.mean_curve(record["runs"][:2], "test/error")
    assert steps == [10, 20]
    np.testing.assert_allclose([mean, low, high], [[50, 20], [50, 10], [50, 30]])


def test_a_band_is_between_the_least_and_the_greatest_seed(record):
    axis = Figure().subplots()
    figures.draw_runs(axis, record["runs"][:2], "test/error", color="k")
    band = axis.collections[0].get_datalim(axis.transData)
    np.testing.assert_allclose((band.ymin, band.ymax), (10, 50))
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [50, 20])


def test_losses_are_not_in_percent(record):
    assert figures.mean_curve(record["runs"][:1], "running/loss")[1] == [
        pytest.approx(1.51),
        pytest.approx(0.31),
    ]


def test_shades_can_be_told_apart_in_grey():
    grey = figures.shades(10)[:, :3] @ [0.299, 0.587, 0.114]
    assert np.all(np.diff(grey) < -0.02), "from light to dark"


def test_loss_on_a_logarithmic_axis_and_errors_each_with_a_unit(record):
    loss, error = figures.draw_curves(record).axes
    assert loss.get_yscale() == "log"
    assert loss.get_ylabel() == "training loss (cross-entropy, nats)"
    assert error.get_ylabel() == "error (%)"
    assert {axis.get_xlabel() for axis in (loss, error)} == {"training step"}


def test_titles_have_all_values_of_what_a_grid_changes(record):
    record["config"]["grid"] += [
        ["batch_size", [32, 128]],
        ["model.name", ["lenet5", "vgg"]],
        ["loss.name", ["cross_entropy", "rbf_map"]],
    ]
    for one in record["runs"]:
        one |= {"batch_size": 32, "model.name": "vgg", "loss.name": "rbf_map"}
    figure = figures.draw_curves(record)
    assert figure.get_suptitle().startswith("lenet5/vgg on digits, batches of 32/128: ")
    assert figure.axes[0].get_ylabel() == "training loss (cross-entropy, nats; rbf_map, no unit)"


@pytest.mark.parametrize("values", [(0.8, 1.3), (2.1, 4.9), (0.3, 40), (0.001, 1)])
def test_a_logarithmic_axis_has_numbers_whatever_its_range(values):
    axis = Figure().add_subplot()
    axis.plot(values)
    figures.set_log_scale(axis)
    low, high = axis.get_ylim()
    assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 3


def test_a_curve_of_one_value_is_a_dot(record):
    for one in record["runs"]:
        one["curves"] = {name: curve[-1:] for name, curve in one["curves"].items()}
    for axis in figures.draw_curves(record).axes:
        drawn = [line for line in axis.lines if len(line.get_xdata()) == 1 and line.get_linestyle() != ":"]
        assert drawn
        assert "None" not in {line.get_marker() for line in drawn}


@pytest.mark.parametrize("number", [1, 7, 8, 9, 15, 16, 23])
def test_a_curve_has_few_markers(number, record):
    curve = [[step, 0.5] for step in range(number)]
    axis = Figure().subplots()
    figures.draw_runs(axis, [record["runs"][0] | {"curves": {"test/error": curve}}], "test/error", color="k")
    first, every = axis.lines[0].get_markevery()
    assert 1 <= len(range(first, number, every)) <= figures.MAX_MARKERS


def test_each_point_has_a_colour_a_marker_and_a_name(record):
    figure = figures.draw_curves(record)
    handles = figure.legends[0].legend_handles
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    points = list(records.names_of_points(record).values())
    points[2] += " (1 of 2 diverged)"
    assert names == points
    assert len({str(handle.get_color()) for handle in handles}) == 4
    assert len({handle.get_marker() for handle in handles}) == 4


def test_a_diverged_run_is_in_no_mean_and_ends_with_a_cross(record):
    loss, _ = figures.draw_curves(record).axes
    ends = [line.get_xydata().tolist() for line in loss.lines if line.get_marker() == "x"]
    assert ends == [[[10, pytest.approx(2.71)]]]
    means = [
        line.get_ydata()[-1]
        for line in loss.lines
        if line.get_linestyle() == "-" and len(line.get_xdata()) == 2
    ]
    np.testing.assert_allclose(means, [0.61, 0.61, 1.51, 0.16])
    assert "diverged run" in labels(figures.draw_curves(record))


def test_a_run_that_diverged_before_its_first_row_has_a_cross_too(record):
    record["runs"][5] |= {"curves": {}, "step": 3}
    loss, _ = figures.draw_curves(record).axes
    assert [line.get_xdata()[0] for line in loss.lines if line.get_marker() == "x"] == [3]


def test_the_cross_of_a_run_without_rows_is_no_small_error(record):
    for run in record["runs"]:
        run["curves"] = {name: [[step, 0.6] for step, _ in rows] for name, rows in run["curves"].items()}
    record["runs"][0] |= {"status": "diverged", "step": 3, "curves": {}}
    _, errors = figures.draw_curves(record).axes
    assert errors.get_yscale() == "linear"


def test_a_study_of_one_run_needs_no_legend_of_points(record):
    record["config"] |= {"grid": [], "seeds": [0]}
    record["runs"] = record["runs"][:1]
    figure = figures.draw_curves(record)
    assert labels(figure) == ["training (mean since the previous row)", "test"]
    assert "one seed" in figure.get_suptitle()


def test_codes_have_panels_of_their_own(mixed):
    figure = figures.draw_curves(mixed)
    assert [axis.get_title(loc="left") for axis in figure.axes[::2]] == ["code aaaaaaa", "code bbbbbbb-dirty"]
    assert "up to 2 seeds" not in figures.describe_seeds(mixed | {"config": mixed["config"] | {"seeds": [0]}})
    assert "mean over up to 2 seeds" in figure.get_suptitle()


def test_small_errors_get_room(record):
    record["runs"][7]["curves"]["test/error"] = [[10, 0.5], [20, 0.01]]
    assert figures.draw_curves(record).axes[1].get_yscale() == "symlog"
    for run in record["runs"]:
        run["curves"] = {name: [[10, 0.5], [20, 0.4]] for name in run["curves"]}
    assert figures.draw_curves(record).axes[1].get_yscale() == "linear"


@pytest.mark.parametrize("name", ledger.read_records(RESULTS)[0])
def test_every_record_of_a_study_can_be_drawn(name, tmp_path):
    figures.save(figures.draw_curves(records.read(RESULTS / name)), tmp_path / "curves")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "curves.svg").stat().st_size > 10_000


def test_titles_tell_the_part_of_the_data_on_which_the_networks_were_trained(record):
    record["config"]["base"]["data"]["splits"]["train"] = "train[:1000]"
    figure = figures.draw_errors_by(record, "model.depth")
    assert figure.get_suptitle().startswith("digits (train[:1000]), batches of 32; ")


def test_a_key_can_have_panels_and_the_others_colours(record):
    figure = figures.draw_errors_by(record, "model.depth")
    assert [axis.get_title() for axis in figure.axes] == ["depth 8", "depth 20"]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["plain False", "plain True\ndepth 20 (1 of 2 diverged)", "diverged run"]
    bold = [line for line in figure.axes[0].lines if line.get_linewidth() == figures.BOLD]
    assert [list(line.get_ydata()) for line in bold] == [[50, pytest.approx(20)]] * 2  # plain, then residual
    assert figure.get_suptitle().startswith("digits, batches of 32; thin: training error, bold: test error; ")
    assert figures.draw_loss_by(record, "model.depth").axes[0].get_yscale() == "log"


def test_panels_have_a_row_for_each_code(mixed):
    titles = [axis.get_title() for axis in figures.draw_errors_by(mixed, "model.plain").axes]
    assert titles == [
        *("plain True, code aaaaaaa", "plain False, code aaaaaaa"),
        *("plain True, code\nbbbbbbb-dirty", "plain False, code\nbbbbbbb-dirty"),
    ]


def test_panels_have_room_for_the_longest_run_and_the_greatest_error(mixed):
    for one in mixed["runs"]:
        # The second code's errors are small, and its runs long.
        scale, longer = (0.01, 10) if one["seed"] else (1, 1)
        for name, curve in one["curves"].items():
            one["curves"][name] = [[step * longer, value * scale] for step, value in curve]
    for axis in figures.draw_errors_by(mixed, "model.plain").axes:
        assert axis.get_ylim()[1] > 50
        assert axis.get_xlim()[0] == 0
        assert axis.get_xlim()[1] >= 200


def test_without_evaluations_panels_have_the_training_error(record):
    for one in record["runs"]:
        one["curves"] = {"running/error": one["curves"]["running/error"]}
    figure = figures.draw_errors_by(record, "model.plain")
    assert figure.get_suptitle().startswith("digits, batches of 32; training error; mean over")
    assert figure.axes[0].lines


def sizes(figure):
    """The width and height of each panel, in inches."""
    figure.draw_without_rendering()
    return [tuple(axis.get_position().size * figure.get_size_inches()) for axis in figure.axes]


def test_a_legend_takes_no_room_from_the_panels(record):
    names = {(8,): 90 * "long", (20,): 30 * "high\n"}
    for width, height in sizes(figures.draw_errors_by(record, "model.plain", names=names)):
        assert width > 3
        assert height > 4
    text = 90 * "long"
    record["config"]["grid"][0] = ("model.depth", (text, 20))
    for one in record["runs"]:
        one["model.depth"] = text if one["model.depth"] == 8 else 20
    assert min(width for width, _ in sizes(figures.draw_curves(record))) > 3


def test_long_texts_are_shortened_where_that_leaves_them_apart():
    one, two, three = "a" * 50, *(f"/runs/{'x' * 50}/{number}/checkpoints_of_the_run" for number in (1, 2))
    texts = figures.shortened((8, one, two, three))
    assert texts[8] == "8"
    assert texts[one] == "a" * 18 + "…" + "a" * 18
    assert (texts[two], texts[three]) == ("…1/checkpoints_of_the_run", "…2/checkpoints_of_the_run")
    threefold = [
        f"{'x' * 40}{begin}{'y' * 40}" for begin in ("1", "2" + "z" * 40 + "1", "2" + "z" * 40 + "2")
    ]
    assert figures.shortened(threefold) == {text: text for text in threefold}


@pytest.mark.parametrize(
    "draw", [figures.draw_curves, lambda record: figures.draw_errors_by(record, "model.plain")]
)
def test_there_is_no_half_of_a_step(record, draw):
    for one in record["runs"]:
        one["curves"] = {name: [[1, 0.5], [3, 0.4]] for name in one["curves"]}
    for axis in draw(record).axes:
        assert all(tick == round(tick) for tick in axis.get_xticks())


def test_where_all_errors_are_zero_the_axis_has_room(record):
    for one in record["runs"]:
        one["curves"] |= {name: [[10, 0.0], [20, 0.0]] for name in ("running/error", "test/error")}
    _, error = figures.draw_curves(record).axes
    assert error.get_ylim() == (0, 1)


@pytest.mark.parametrize(
    "draw", [figures.draw_curves, lambda record: figures.draw_loss_by(record, "start.workdir")]
)
def test_a_dollar_in_a_value_is_no_formula(record, draw, tmp_path):
    frozen, starts = (("[$c{]onv1", "[$d]ense"), ("conv1",)), ("$x{$", "y")
    record["config"]["grid"] = [["optimizer.frozen", frozen], ["start.workdir", starts]]
    record["runs"] = record["runs"][:4]
    for number, one in enumerate(record["runs"]):
        one |= {"optimizer.frozen": frozen[number // 2], "start.workdir": starts[number % 2]}
    figures.save(draw(record), tmp_path / "figure")


def test_each_row_of_codes_says_where_its_axis_is_logarithmic(mixed):
    figure = figures.draw_errors_by(mixed, "model.plain")
    told = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert len(told) == 2
    assert all("then logarithmic" in label for label in told)
