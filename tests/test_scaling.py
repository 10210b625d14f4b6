"""Those who share a step are measured, and end together."""

from unittest import mock

import pytest

from benchmarks import contenders, scaling, throughput
from cnn_cases.training import devices as devices_lib


def test_a_step_is_timed_by_jit_on_one_device_and_over_two_processes(monkeypatch):
    teams = scaling.teams()
    wanted = (scaling.JIT, scaling.ONE, "2 processes")
    monkeypatch.setattr(scaling, "teams", lambda: {who: teams[who] for who in wanted})
    monkeypatch.setattr(contenders, "SECONDS_A_TURN", 0.1)
    case = throughput.CASES["LeNet-5"]._replace(cpu_batch=8)
    row, devices = scaling.sharing(case, turns=2)
    assert devices == ["cpu"]
    assert tuple(row["teams"]) == wanted
    assert row["teams"][scaling.ONE]["ratio"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    head, line = scaling.sharing_cells({"LeNet-5": row})
    assert head == ["network", "batch", *wanted]
    assert line[1] == "8"
    assert line[3].endswith(" (1.00)")


def test_a_ratio_is_to_the_step_on_one_device(monkeypatch):
    contender = mock.MagicMock()
    contender.__enter__().made.result.return_value = {
        "batch_size": 8,
        "devices": ["cpu"],
        "first_step_seconds": 2.0,
    }
    seconds = {scaling.JIT: [3.0], scaling.ONE: [1.0]}
    monkeypatch.setattr(contenders, "Contender", lambda *_, **__: contender)
    monkeypatch.setattr(contenders, "race", lambda *_: seconds)
    row, _ = scaling.sharing(throughput.CASES["NIN"], turns=1)
    assert row["batch_size"] == 8  # what was trained with, not what the case has for a CPU: 32
    assert row["teams"][scaling.JIT]["ratio"]["median"] == 3


def test_each_process_of_a_job_joins_it(monkeypatch):
    calls = mock.Mock()
    for owner, name in (
        (scaling.runtime, "choose_cpu_flags"),
        (scaling.processes, "join"),
        (throughput, "ours"),
    ):
        monkeypatch.setattr(owner, name, getattr(calls, name))
    for make, _ in scaling.teams()["2 processes"]:
        make("case")
    made = mock.call.ours("case", "float32", num_devices=1, over_devices=devices_lib.pmap_train)
    address = calls.join.call_args.kwargs["coordinator_address"]
    assert calls.mock_calls == [
        mock.call.choose_cpu_flags(),
        mock.call.join(coordinator_address=address, num_processes=2, process_id=0),
        made,
        mock.call.choose_cpu_flags(),
        mock.call.join(coordinator_address=address, num_processes=2, process_id=1),
        made,
    ]


def test_the_table_of_depths_has_all_contenders():
    def found(seconds):
        spread = {"median": seconds, "lowest": seconds, "highest": seconds}
        return {"first_step_seconds": 10 * seconds, "step_seconds": spread}

    rows = {20: {"contenders": {"cnn_cases": found(0.25), "torch": found(0.125)}}}
    assert scaling.depth_cells(rows) == [
        [
            "depth",
            "cnn_cases, first step, s",
            "torch, first step, s",
            "cnn_cases, later, ms",
            "torch, later, ms",
        ],
        ["20", "2.5", "1.2", "250", "125"],
    ]


def test_a_depth_that_no_resnet_has_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling", "--only=depth", "--depths", "9"])
    with pytest.raises(SystemExit) as stop:
        scaling.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err.replace("'", "")  # Python 3.14 puts each choice in quotes
    assert "invalid choice: 9 (choose from 8, 20," in message
