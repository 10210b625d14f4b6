import csv
import io

import numpy as np
import pytest

from cnn_cases.studies import depth_curves
from configs.studies import depth_digits


def test_the_table_has_means_and_deviations_in_percent(record):
    lines = depth_curves.table(record, "markdown").splitlines()
    assert lines[0].startswith(
        "| depth | plain training loss | residual training loss | plain training error %"
    )
    assert lines[2] == (
        "| 8 | 0.400 ± 0.283 | 0.400 ± 0.000 | 20.00 ± 14.14 | 20.00 ± 0.00 | 30.00 ± 14.14 | 30.00 ± 0.00 |"
    )


def test_the_table_says_which_runs_diverged_and_leaves_them_out_of_the_mean(record):
    row = depth_curves.table(record, "markdown").splitlines()[3]
    assert "| 50.00 (1 diverged) |" in row
    assert "| 5.00 ± 7.07 |" in row


def test_the_csv_reads_back(record):
    rows = list(csv.DictReader(io.StringIO(depth_curves.table(record, "csv"))))
    assert [row["depth"] for row in rows] == ["8", "20"]
    assert float(rows[0]["plain test/error mean"]) == pytest.approx(0.3)
    assert float(rows[0]["plain train/error std"]) == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert rows[1]["plain train/error seeds"] == "1"
    assert [row["plain diverged"] for row in rows] == ["0", "1"]
    assert [row["residual diverged"] for row in rows] == ["0", "0"]


def test_the_text_table_is_aligned(record):
    assert len({len(line) for line in depth_curves.table(record, "text").splitlines()}) == 1


def test_the_curves_show_plain_left_and_residual_right(record):
    left, right = depth_curves.draw_curves(record).axes
    assert (left.get_title(), right.get_title()) == ("plain nets", "residual nets")
    thin, bold = left.lines[:2]
    np.testing.assert_allclose(thin.get_ydata(), [50, 20])
    np.testing.assert_allclose(bold.get_xdata(), [10, 20])
    assert thin.get_linewidth() < bold.get_linewidth()


def test_training_is_thin_and_the_test_bold_and_the_loss_is_that_of_training(record):
    for one in record["runs"]:
        for name in ("error", "loss"):
            one["curves"][f"test/{name}"] = [
                [step, value + 0.05] for step, value in one["curves"][f"test/{name}"]
            ]
    thin, bold = depth_curves.draw_curves(record).axes[0].lines[:2]
    np.testing.assert_allclose(thin.get_ydata(), [50, 20])
    np.testing.assert_allclose(bold.get_ydata(), [55, 25])
    assert thin.get_linewidth() < bold.get_linewidth()
    np.testing.assert_allclose(depth_curves.draw_loss(record).axes[0].lines[0].get_ydata(), [1.51, 0.61])


def test_errors_against_depth_are_means_between_the_least_and_the_greatest_seed(record):
    training, test = depth_curves.draw_depth(record).axes
    for axis, means in ((training, {"--": [20, 50], "-": [20, 5]}), (test, {"--": [30, 60], "-": [30, 15]})):
        lines = [line for line in axis.lines if list(line.get_xdata()) == [8, 20]]
        found = {
            line.get_linestyle(): line.get_ydata() for line in lines if line.get_marker() in ("None", "")
        }
        assert found.keys() == means.keys()
        for style, values in means.items():
            np.testing.assert_allclose(found[style], values, atol=1e-9)
    plain, residual = (band.get_datalim(training.transData) for band in training.collections)
    np.testing.assert_allclose((plain.ymin, plain.ymax), (10, 50))
    np.testing.assert_allclose((residual.ymin, residual.ymax), (0, 20), atol=1e-9)


def test_the_errors_have_room_for_the_last_steps(record):
    def edges(record):
        curves, depth = depth_curves.draw_curves(record), depth_curves.draw_depth(record)
        return [axis.get_ylim()[1] for figure in (curves, depth) for axis in figure.axes]

    for run in record["runs"]:
        for name in run.get("metrics", {}):
            run["metrics"][name] /= 10
    assert edges(record) == [100] * 4  # for the cross of the run that diverged
    record["runs"] = [run for run in record["runs"] if run["status"] == "finished"]
    assert edges(record) == pytest.approx([12, 12, 7.2, 7.2])  # the greatest is 6 %, on the test set


def test_the_loss_is_on_a_logarithmic_axis_with_its_unit(record):
    left, right = depth_curves.draw_loss(record).axes
    assert left.get_yscale() == right.get_yscale() == "log"
    assert left.get_ylabel() == "training loss (cross-entropy, nats)"


def test_diverged_runs_are_crosses_and_counted(record):
    left, right = depth_curves.draw_curves(record).axes
    assert [line.get_marker() for line in left.lines].count("x") == 1
    assert [line.get_marker() for line in right.lines].count("x") == 0
    legend = [text.get_text() for text in depth_curves.draw_curves(record).legends[0].get_texts()]
    assert legend == ["20 layers\nplain nets (1 of 2 diverged)", "8 layers", "diverged run"]
    training, _ = depth_curves.draw_depth(record).axes
    crosses = {
        line.get_label(): list(line.get_xdata()) for line in training.lines if line.get_marker() == "x"
    }
    assert crosses == {"plain, diverged": [20]}
    assert [text.get_text() for text in training.texts] == ["1 of 2"]


def test_the_difference_has_its_interval_where_there_is_one(record):
    training, test = depth_curves.draw_difference(record).axes
    label = "plain minus residual (percentage points),\nlinear up to 1, then logarithmic"
    assert training.get_ylabel() == label
    bars = [line.get_xydata() for line in test.lines if line.get_marker() == "_"]
    reach = 100 * 12.706 * 0.1
    np.testing.assert_allclose(bars, [[(8, -reach), (8, reach)]], rtol=1e-4)
    means = [tuple(line.get_xydata()[0]) for line in test.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(means, [(8, 0), (20, 50)], atol=1e-9)


@pytest.mark.parametrize(("largest", "scale"), [(0.15, "linear"), (0.5, "symlog")])
def test_where_differences_are_large_small_ones_have_room_too(record, largest, scale):
    record["runs"] = [run for run in record["runs"] if run["seed"] == 0]  # whose differences have no interval
    for run in record["runs"]:
        errors = {"train/error": 0.0, "test/error": largest * run["model.plain"]}
        run |= {"status": "finished", "metrics": (run.get("metrics") or {}) | errors}
    figure = depth_curves.draw_difference(record)
    for axis in figure.axes:
        assert axis.get_yscale() == scale
        assert axis.get_ylim()[0] < 0 < 100 * largest < axis.get_ylim()[1]
    assert ("linear up to 1" in figure.axes[0].get_ylabel()) == (scale == "symlog")


def test_pairs_that_two_codes_were_to_make_are_left_out_once(mixed):
    for one in mixed["runs"]:
        one["environments"] = [int(one["model.plain"])]
    assert depth_curves.draw_difference(mixed).get_suptitle().endswith("; 4 pairs left out")


def test_all_codes_share_the_axes_on_which_their_differences_are(mixed):
    (*_, last) = mixed["runs"]
    large = last | {"seed": 0, "environments": [1], "model.plain": True}
    large["metrics"] = dict.fromkeys(last["metrics"], 1.0)
    mixed["runs"] = [one for one in mixed["runs"] if one["model.depth"] == 8]
    mixed["runs"] += [large, last | {"seed": 0, "environments": [1]}]
    figure = depth_curves.draw_difference(mixed)
    assert len(figure.axes) == 4
    limits = [(axis.get_xlim(), axis.get_ylim(), axis.get_yscale()) for axis in figure.axes]
    assert limits == limits[:1] * 4
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert low <= axis.dataLim.y0
        assert high >= axis.dataLim.y1


def test_codes_have_rows_and_panels_of_their_own(mixed):
    rows = list(csv.DictReader(io.StringIO(depth_curves.table(mixed, "csv"))))
    assert [(row["depth"], row["code"]) for row in rows] == [
        ("8", "aaaaaaa"),
        ("8", "bbbbbbb-dirty"),
        ("20", "aaaaaaa"),
        ("20", "bbbbbbb-dirty"),
    ]
    assert rows[0]["plain test/error std"] == "", "one seed of this code"
    for draw in (depth_curves.draw_curves, depth_curves.draw_depth, depth_curves.draw_difference):
        assert [axis.get_title().endswith("code aaaaaaa") for axis in draw(mixed).axes] == [
            True,
            True,
            False,
            False,
        ]


def test_one_seed_has_no_interval_and_draws(record):
    record["config"]["seeds"] = [0]
    record["runs"] = [run for run in record["runs"] if run["seed"] == 0]
    assert depth_curves.comparison_table(record, "markdown").splitlines()[2] == (
        "| 8 | -10.00 |  | -10.00 |  | 1 | 0 |"
    )
    depth_curves.draw_difference(record)


def test_the_test_is_that_of_the_protocol(record):
    record["config"]["base"]["evaluation"] = {"protocol": "ten_crop"}
    for one in record["runs"]:
        if one["status"] == "finished":
            one["metrics"]["test/ten_crop/error"] = one["metrics"]["test/error"] / 2
    head, _, first, *_ = depth_curves.table(record, "markdown").splitlines()
    assert "plain test error (ten_crop) %" in head
    assert "| 15.00 ± 7.07 |" in first
    assert "test error (ten_crop), plain minus residual (points)" in depth_curves.comparison_table(
        record, "markdown"
    )
    assert depth_curves.draw_depth(record).axes[1].get_title() == "test error (ten_crop)"
    dots = [line for line in depth_curves.draw_difference(record).axes[1].lines if line.get_marker() == "D"]
    assert dots[1].get_ydata() == pytest.approx([25])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "grid",
            (("model.depth", (8, 20)),),
            "grid = .*: a depth study needs values of model.depth, and True",
        ),
        ("grid", (("model.depth", (8,)), ("model.plain", (True,))), "True and False for model.plain; cnn_ca"),
        ("base.evaluation.final_splits", ("test",), r"final_splits = \('test',\) must have train and test"),
        (
            "adjust",
            ((("model.depth", 20), (("evaluation.final_splits", ("test",)),)),),
            r"depth-20_plain-True_seed-0: evaluation.final_splits = \('test',\) must have train and test",
        ),
        (
            "adjust",
            ((("model.plain", False), (("evaluation.protocol", "flip"),)),),
            "depth-8_plain-False_seed-0: evaluation.protocol = 'flip' must be 'single', as in base",
        ),
        ("seeds", (), r"seeds = \(\) must have values"),
        ("compare", "model.depth", "compare = 'model.depth': a depth study compares plain and residual nets"),
        ("against", "model.depth", "against = 'model.depth': a depth study compares plain and residual nets"),
    ],
)
def test_a_study_that_cannot_be_drawn_is_refused(key, value, message):
    study = depth_digits.get_config()
    depth_curves.check(study)
    with study.unlocked():
        study.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        depth_curves.check(study)


def test_a_report_is_files_for_people_and_programs(record, tmp_path):
    depth_curves.write_report(record, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("record.json", "table.csv", "table.md", "comparison.csv", "comparison.md", "curves.html"),
        *("curves.csv", "curves.png", "curves.svg", "depth.png", "depth.svg"),
        *("difference.png", "difference.svg", "loss.png", "loss.svg"),
    }
    assert all(path.stat().st_size > 100 for path in tmp_path.iterdir())


def test_a_depth_without_pairs_is_not_at_the_edge(record):
    for one in record["runs"]:
        if one["model.depth"] == 20:
            one["status"] = "diverged"
    for axis in depth_curves.draw_difference(record).axes:
        low, high = axis.get_xlim()
        assert low < 8
        assert high > 20
