import csv
import io

import matplotlib
import numpy as np
import pytest

from cnn_cases.studies import depth_curves

matplotlib.use("agg")


def run(depth, plain, seed, error, status="finished"):
    outcome = {"model.depth": depth, "model.plain": plain, "seed": seed, "status": status, "step": 20}
    if status == "finished":
        outcome["metrics"] = {"train/loss": 2 * error, "train/error": error, "test/error": error + 0.1}
    curve = [(10, 0.5), (20, error)]
    return outcome | {"curves": {"running/error": curve, "test/error": curve}}


@pytest.fixture
def record():
    runs = [
        run(8, True, 0, 0.1),
        run(8, True, 1, 0.3),
        run(8, False, 0, 0.2),
        run(8, False, 1, 0.2),
        run(20, True, 0, 0.5),
        run(20, True, 1, None, status="diverged") | {"curves": {}},
        run(20, False, 0, 0.0),
        run(20, False, 1, 0.1),
    ]
    return {"config": {"seeds": (0, 1)}, "environments": [], "runs": runs}


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


def test_the_text_table_is_aligned(record):
    assert len({len(line) for line in depth_curves.table(record, "text").splitlines()}) == 1


def test_the_curves_show_plain_left_and_residual_right(record):
    left, right = depth_curves.draw_curves(record).axes
    assert (left.get_title(), right.get_title()) == ("plain nets", "residual nets")
    thin, bold = left.lines[:2]
    np.testing.assert_allclose(thin.get_ydata(), [50, 20])
    np.testing.assert_allclose(bold.get_xdata(), [10, 20])
    assert thin.get_linewidth() < bold.get_linewidth()


def test_a_report_is_files_for_people_and_programs(record, tmp_path):
    depth_curves.write_report(record, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("record.json", "table.csv", "table.md"),
        *("curves.png", "curves.svg", "depth.png", "depth.svg"),
    }
    assert all(path.stat().st_size > 100 for path in tmp_path.iterdir())
