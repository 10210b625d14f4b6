import json
from unittest import mock

import jax
import pytest

from cnn_cases.studies import bottleneck


@pytest.fixture(scope="module")
def record():
    return bottleneck.measure(batch_size=1, repeats=2)


def test_the_counts_are_the_lecture_s(record):
    counts = {(row["comparison"], row["kind"]): row["multiply_adds"] for row in record["networks"]}
    assert counts["5x5 convolution", "naive"] == 120_422_400
    assert counts["5x5 convolution", "reduced"] == 2_408_448 + 10_035_200
    pixels = 28 * 28
    assert counts["Inception module", "naive"] == pixels * 192 * (64 + 9 * 128 + 25 * 32)
    assert counts["Inception module", "reduced"] == pixels * (
        192 * (64 + 96 + 16 + 32) + 9 * 96 * 128 + 25 * 16 * 32
    )


def test_the_modules_have_the_channels_of_the_lecture(record):
    outputs = [row["output"] for row in record["networks"]]
    assert outputs == [(28, 28, 32), (28, 28, 32), (28, 28, 64 + 128 + 32 + 192), (28, 28, 256)]


def test_time_and_memory_are_measured(record):
    for row in record["networks"]:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        height, width, channels = row["output"]
        assert row["output_bytes"] == 4 * height * width * channels
        assert row["temporary_bytes"] >= 0


def test_the_table_holds_counts_and_ratios(record):
    head, naive, reduced, *_ = bottleneck.table(record).splitlines()
    assert [head.find(word) > 0 for word in ("multiply-adds", "time (ms)", "memory (MiB)")] == [True] * 3
    assert naive.split()[:5] == ["5x5", "convolution", "naive", "28x28x32", "153,632"]
    assert reduced.split()[:5] == ["reduced", "28x28x32", "15,920", "12,443,648", "9.68"]


def test_the_figure_has_a_panel_a_measure_and_says_what_is_saved(record):
    counts, times, memory = bottleneck.draw(record).axes
    assert [round(bar.get_width(), 6) for bar in counts.patches] == [
        120.4224,
        12.443648,
        303.464448,
        128.049152,
    ]
    assert counts.texts[1].get_text() == "12.4\n9.7 times less"
    assert len(times.patches) == len(memory.patches) == 4


def test_a_study_leaves_a_record_a_table_and_a_figure(record, tmp_path):
    bottleneck.write_report(record, tmp_path / "study")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "study").iterdir()}
    assert set(sizes) == {"record.json", "table.txt", "bottleneck.png", "bottleneck.svg"}
    assert min(sizes.values()) > 200
    read = json.loads((tmp_path / "study" / "record.json").read_text())
    assert read["networks"][0]["multiply_adds"] == 120_422_400
    assert bottleneck.table(read) == bottleneck.table(record)


def test_the_command_runs(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bottleneck, "measure", lambda batch_size: record | {"batch_size": batch_size})
    bottleneck.main([f"--workdir={tmp_path}", "--batch_size=4"])
    assert "12,443,648" in capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["batch_size"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size=0"], "'0' is not a positive integer"),
        (["--workdir=/proc/nowhere"], "error: "),
    ],
)
def test_bad_input_is_answered_by_one_message(options, message, record, monkeypatch, capsys):
    monkeypatch.setattr(bottleneck, "measure", lambda _: record)
    with pytest.raises(SystemExit) as stop:
        bottleneck.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_told_in_one_message(monkeypatch, capsys):
    missing = RuntimeError("Unable to initialize backend 'cuda'")
    monkeypatch.setattr(jax, "local_devices", mock.Mock(side_effect=missing))
    monkeypatch.setattr(bottleneck, "measure", mock.Mock(side_effect=missing))
    with pytest.raises(SystemExit) as stop:
        bottleneck.main([])
    assert stop.value.code == 2
    assert "JAX finds no such device here" in capsys.readouterr().err


def test_ctrl_c_ends_the_measurement_with_one_message(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bottleneck, "measure", interrupted)
    with pytest.raises(SystemExit) as stop:
        bottleneck.main([])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "SIGINT: stopped at once\n"


def test_a_measure_is_the_median_time_and_all_memory_but_parameters_and_input():
    row = {
        "multiply_adds": 3_000_000,
        "seconds": [0.002, 0.001, 0.030],
        "temporary_bytes": 2**20,
        "output_bytes": 2**22,
    }
    assert [value(row) for value in bottleneck.MEASURES.values()] == pytest.approx([3, 2, 5])
