import csv
import io
import math

import numpy as np
import pytest

from cnn_cases.studies import comparison
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


def test_differences_are_those_of_equal_seeds(record):
    row = compare(record)[0]
    assert row["test/error"]["differences"] == pytest.approx([-0.1, 0.1])
    assert row["test/error"]["mean"] == pytest.approx(0)
    assert (row["model.depth"], row["pairs"], row["left_out"]) == (8, 2, 0)


def test_what_a_seed_does_to_both_partners_is_not_in_the_interval(record):
    record["runs"] = [run(8, plain, s, 0.1 * s + 0.05 * plain) for s in range(5) for plain in (True, False)]
    assert compare(record)[0]["test/error"]["interval"] == pytest.approx((0.05, 0.05))


def test_a_pair_with_a_diverged_partner_is_left_out_and_counted(record):
    row = compare(record)[1]
    assert row["test/error"]["differences"] == pytest.approx([0.5])
    assert (row["pairs"], row["left_out"]) == (1, 1)
    assert row["test/error"]["interval"] is None


def test_a_run_without_a_partner_makes_no_pair_and_is_counted(record):
    del record["runs"][0]
    row = compare(record)[0]
    assert (row["pairs"], row["left_out"]) == (1, 1)


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
