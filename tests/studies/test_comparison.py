import csv
import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from cnn_cases.studies import comparison, plan
from tests.studies.conftest import run

TITLES = {"model.depth": "depth", "test/error": "test error"}


def compare(record):
    return comparison.compare(record, "model.plain", True, False, ["test/error"])


def test_the_interval_is_that_of_students_t():
    # Three values: 4.303 is the 97.5 % point of t with two degrees of freedom in any table.
    low, high = comparison.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-3)


def test_the_interval_holds_the_mean_in_95_of_100_draws():
    draws = np.random.default_rng(0).normal(5, 2, (2000, 4)).tolist()
    ends = map(comparison.interval, draws)
    assert np.mean([low < 5 < high for low, high in ends]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_of_fewer_than_two_differences_there_is_no_interval(values):
    assert comparison.interval(values) is None


def test_differences_that_are_all_equal_do_not_show_how_they_vary():
    assert comparison.interval([0.1 + 0.2, 0.3]) is None


def test_differences_are_those_of_equal_seeds(record):
    row = compare(record)[0]
    assert row["test/error"]["differences"] == pytest.approx([-0.1, 0.1])
    assert row["test/error"]["mean"] == pytest.approx(0)
    assert (row["model.depth"], row["pairs"], row["left_out"]) == (8, 2, 0)


def test_a_single_large_difference_counts_in_the_mean(record):
    record["runs"] = [
        run(8, plain, seed, 0.1 + gap * plain)
        for seed, gap in enumerate((0, 0, 0.3))
        for plain in (True, False)
    ]
    (row,) = compare(record)
    assert row["test/error"]["mean"] == pytest.approx(0.1)


def test_what_a_seed_does_to_both_partners_is_not_in_the_interval(record):
    gaps = (0.049, 0.05, 0.051)
    record["runs"] = [
        run(8, plain, s, 0.1 * s + gaps[s] * plain) for s in range(3) for plain in (True, False)
    ]
    expected = comparison.interval(gaps)
    assert compare(record)[0]["test/error"]["interval"] == pytest.approx(expected)


def test_a_pair_with_a_diverged_partner_is_left_out_and_counted(record):
    row = compare(record)[1]
    assert row["test/error"]["differences"] == pytest.approx([0.5])
    assert (row["pairs"], row["left_out"]) == (1, 1)
    assert row["test/error"]["interval"] is None


def test_a_run_without_a_partner_makes_no_pair_and_is_counted(record):
    del record["runs"][0]
    row = compare(record)[0]
    assert (row["pairs"], row["left_out"]) == (1, 1)


def test_seeds_of_further_values_alone_are_not_left_out(record):
    record["runs"] += [run(32, True, seed, 0.4) for seed in (1, 2, 3)]
    row = comparison.compare(record, "model.depth", 8, 20, ["test/error"])[0]
    assert (row["model.plain"], row["pairs"], row["left_out"]) == (True, 1, 1)


def test_runs_of_two_commits_are_no_pair(mixed):
    rows = compare(mixed)
    assert [(row["code"], row["model.depth"], row["pairs"]) for row in rows] == [
        ("aaaaaaa", 8, 1),
        ("aaaaaaa", 20, 1),
        ("bbbbbbb-dirty", 8, 1),
        ("bbbbbbb-dirty", 20, 0),
    ]


def test_the_table_has_percentage_points(record):
    head, _, first, second = comparison.table(compare(record), TITLES, "markdown").splitlines()
    assert head == "| depth | test error (points) | 95 % interval | pairs | left out |"
    reach = 100 * 12.706 * 0.1  # t of one degree of freedom, times the standard error
    assert first == f"| 8 | 0.00 | {-reach:.2f} to {reach:.2f} | 2 | 0 |"
    assert second == "| 20 | 50.00 |  | 1 | 1 |"


def test_the_csv_reads_back(mixed):
    rows = list(csv.DictReader(io.StringIO(comparison.table(compare(mixed), TITLES, "csv"))))
    assert [row["code"] for row in rows] == ["aaaaaaa"] * 2 + ["bbbbbbb-dirty"] * 2
    assert float(rows[0]["test/error mean difference"]) == pytest.approx(-0.1)
    assert rows[3]["test/error mean difference"] == rows[0]["test/error low"] == ""


def test_the_csv_has_the_lower_end_first(record):
    (row, _) = csv.DictReader(io.StringIO(comparison.table(compare(record), TITLES, "csv")))
    ends = compare(record)[0]["test/error"]["interval"]
    assert (float(row["test/error low"]), float(row["test/error high"])) == pytest.approx(ends)


# What a study asks for.


@pytest.fixture
def asking(record):
    """The record with a third depth; each depth is compared with the first."""
    record["config"]["grid"] = [["model.depth", [8, 20, 32]], ["model.plain", [True, False]]]
    record["config"]["compare"] = "model.depth"
    record["runs"] += [run(32, plain, seed, 0.4) for plain in (True, False) for seed in (0, 1)]
    return record


def test_a_study_compares_each_value_with_the_first(asking):
    rows = comparison.compare_study(asking)
    assert [(row["model.depth"], row["model.plain"], row["pairs"]) for row in rows] == [
        ("20 minus 8", True, 1),
        ("20 minus 8", False, 2),
        ("32 minus 8", True, 2),
        ("32 minus 8", False, 2),
    ]
    assert rows[1]["train/error"]["differences"] == pytest.approx([0.0 - 0.2, 0.1 - 0.2])


def test_its_table_names_what_is_compared_and_the_rest_of_the_grid(asking):
    lines = comparison.study_table(asking, "markdown").splitlines()
    assert lines[0].startswith(
        "| depth | plain | train/error (points) | 95 % interval | test/error (points) |"
    )
    assert lines[3].startswith("| 20 minus 8 | False | -15.00 | ")
    (first, *_) = csv.DictReader(io.StringIO(comparison.study_table(asking, "csv")))
    assert (first["model.depth"], first["model.plain"], first["left out"]) == ("20 minus 8", "True", "1")


def test_only_errors_that_all_runs_have_are_compared(asking):
    del asking["runs"][0]["metrics"]["test/error"]
    assert comparison.final_errors(asking) == ["train/error"]
    assert "test/error" not in comparison.compare_study(asking)[0]


def test_errors_of_all_splits_and_protocols_are_compared(asking):
    further = {"validation/error": 0.1, "validation/ten_crop/top_5_error": 0.0, "validation/loss": 0.3}
    for one in asking["runs"]:
        if one["status"] == "finished":
            one["metrics"] |= further
    expected = ["train/error", "test/error", "validation/error", "validation/ten_crop/top_5_error"]
    assert comparison.final_errors(asking) == expected


def test_of_one_value_there_is_nothing_to_compare(asking):
    asking["config"]["grid"][0] = ["model.depth", [8]]
    assert plan.compared(asking["config"]) is None


def test_a_code_has_no_row_of_values_that_it_never_ran(asking):
    asking["environments"].append(asking["environments"][0] | {"commit": "b" * 40})
    for one in asking["runs"]:
        one["environments"] = [int(one["model.depth"] == 32)]  # added later
    rows = comparison.compare_study(asking)
    assert [
        (row["code"], row["value"], row["model.plain"], row["pairs"], row["left_out"]) for row in rows
    ] == [
        ("aaaaaaa", 20, True, 1, 1),
        ("aaaaaaa", 20, False, 2, 0),
        ("aaaaaaa", 32, True, 0, 2),
        ("aaaaaaa", 32, False, 0, 2),
        ("bbbbbbb", 32, True, 0, 2),
        ("bbbbbbb", 32, False, 0, 2),
    ]
    assert labels(comparison.draw_study(asking))[-1] == "32 minus 8\nplain False\ncode bbbbbbb\n2 left out"


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_the_figure_names_each_row(asking):
    figure = comparison.draw_study(asking)
    assert [axis.get_title() for axis in figure.axes] == ["train/error", "test/error"]
    assert figure.get_suptitle().startswith("depth, on digits, batches of 32\n")
    assert labels(figure) == [
        "20 minus 8\nplain True\n1 left out",
        "20 minus 8\nplain False",
        "32 minus 8\nplain True",
        "32 minus 8\nplain False",
    ]


def test_what_all_rows_of_the_figure_compare_is_in_its_title(asking):
    asking["config"]["compare"] = "model.plain"
    figure = comparison.draw_study(asking)
    assert figure.get_suptitle().startswith("plain: False minus True, on digits, batches of 32\n")
    assert labels(figure) == ["depth 8", "depth 20\n1 left out", "depth 32"]


def test_the_figure_has_each_difference_the_mean_and_the_interval(asking):
    axis = comparison.draw_study(asking).axes[0]
    marks = {tuple(line.get_xdata()) for line in axis.lines if list(line.get_ydata())[:1] == [1]}
    low, high = (100 * end for end in comparison.compare_study(asking)[1]["train/error"]["interval"])
    assert {tuple(round(x, 6) for x in xs) for xs in marks} == {
        (-20.0, -10.0),
        (-15.0,),
        (round(low, 6), round(high, 6)),
    }


def test_long_values_leave_room_in_the_figure_and_dollars_are_no_formulas(asking):
    path = "runs/" + 20 * "long_" + "name$1$"
    asking["config"] |= {"grid": [["start.workdir", ["", path]]], "compare": "start.workdir"}
    for one in asking["runs"]:
        one["start.workdir"] = path if one.pop("model.plain") else ""
    figure = comparison.draw_study(asking)
    (line, _) = figure.get_suptitle().splitlines()
    assert line == "start.workdir: runs/long_long_lon…_long_long_name$1$ minus none, on digits, batches of 32"
    assert path in comparison.study_table(asking, "markdown")
    assert not figure._suptitle.get_parse_math()


def test_long_labels_take_no_room_from_the_panels(asking):
    rows = comparison.compare_study(asking)
    titles = {"train/error": "training", "test/error": "test"}
    figure = comparison.draw(rows, [90 * "long" for _ in rows], titles)
    figure.draw_without_rendering()
    assert min(axis.get_position().width * figure.get_figwidth() for axis in figure.axes) > 3


@pytest.mark.parametrize("num_lines", [1, 4])
def test_labels_of_several_lines_lie_apart(num_lines, asking):
    rows = comparison.compare_study(asking)
    label = "\n".join(num_lines * ["depth 20"])
    figure = comparison.draw(rows, [label for _ in rows], {"test/error": "test"})
    figure.draw_without_rendering()
    extents = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(extents))


def test_small_differences_have_room_beside_large_ones(asking):
    left, right = comparison.draw_study(asking).axes
    assert left.get_xscale() == right.get_xscale() == "symlog"  # one difference is of 50 points
    for one in asking["runs"]:
        if one["status"] == "finished":
            one["metrics"] = {name: value / 10 for name, value in one["metrics"].items()}
    left, right = comparison.draw_study(asking).axes
    assert left.get_xscale() == "linear"
    assert left.get_xlim() == right.get_xlim()


def test_the_figure_has_room_for_every_difference(asking):
    # Of six differences that are alike and one that is not, the interval does not reach the last one.
    asking["config"] |= {"grid": [["model.plain", [False, True]]], "compare": "model.plain"}
    errors = [0.1] * 6 + [0.4]
    asking["runs"] = [run(8, True, seed, error) for seed, error in enumerate(errors)]
    asking["runs"] += [run(8, False, seed, 0.1) for seed in range(7)]
    for upright in (False, True):
        figure = Figure()
        axis = figure.subplots()
        (row,) = comparison.compare_study(asking)
        comparison.draw_marks(axis, 0, row["train/error"], upright=upright)
        low, high = axis.get_ylim() if upright else axis.get_xlim()
        assert row["train/error"]["interval"][1] < 0.3
        assert low < 0
        assert high > 30
