"""The feed's cost is the time of a step beside that of the same step on one prepared batch."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks import pipeline, record
from cnn_cases.training import programs
from configs import resnet_cifar10, resnet_digits


def test_the_overhead_is_the_extra_time_in_percent(monkeypatch):
    monkeypatch.setattr(pipeline, "_bare", lambda *_: lambda: 1.0)
    program = SimpleNamespace(steps_per_call=1)
    row = pipeline._beside_bare(lambda: 1.5, resnet_digits.get_config(), program, 3, 4)
    assert row["overhead_percent"] == {"median": 50, "lowest": 50, "highest": 50}
    assert row["seconds_a_step"]["median"] == 1.5
    assert row["fixed_seconds_a_step"]["median"] == 1.0


def test_a_call_of_several_steps_counts_as_several(monkeypatch):
    monkeypatch.setattr(pipeline, "_clock", lambda _: itertools.count(step=3.0).__next__)
    program = SimpleNamespace(init_state=lambda _: {}, devices=[], steps_per_call=2)
    calls = []

    def train(state, arrays, batch):
        del arrays
        calls.append(batch)
        return state, {}

    run = pipeline._runner(program, train, {}, itertools.repeat("batch"), 6)
    calls.clear()
    assert run() == pytest.approx(0.5)  # 3 s for 6 steps
    assert calls == ["batch"] * 3


@pytest.mark.parametrize("config", [resnet_cifar10.get_config(), resnet_digits.get_config()])
@pytest.mark.parametrize("of_turn", pipeline.STEPS_A_TURN.values(), ids=pipeline.STEPS_A_TURN)
def test_a_turn_is_of_whole_calls(of_turn, config):
    assert of_turn["cpu"] % programs.steps_per_call(config, "cpu", (32, 32, 3)) == 0
    assert of_turn["accelerator"] % programs.steps_per_call(config, "gpu", (32, 32, 3)) == 0


@pytest.mark.parametrize("measure", [pipeline.resident_feed, pipeline.whole_training])
def test_the_digits_are_those_of_the_directory_that_was_given(measure, tmp_path, monkeypatch):
    make_program = mock.Mock(side_effect=KeyboardInterrupt)  # nothing more is of interest
    monkeypatch.setattr(pipeline.programs, "make_program", make_program)
    with pytest.raises(KeyboardInterrupt):
        measure(str(tmp_path), 1, 4, "float32")
    data = make_program.call_args.args[0].data
    assert (data.name, data.data_dir) == ("digits", str(tmp_path))  # CIFAR-10 is not there


def test_the_flags_are_chosen_before_the_check_of_a_record_uses_jax(tmp_path, monkeypatch):
    path, chosen = tmp_path / "record.json", []
    command = "python -m benchmarks.pipeline --only=resident --dtype=float32 --turns=9"
    record.write_section(path, "resident", command, {}, ["another device"])
    monkeypatch.setattr(pipeline.runtime, "choose_cpu_flags", lambda: chosen.append(True))
    monkeypatch.setattr(pipeline, "devices_here", lambda: ["cpu"] if chosen else pytest.fail("too early"))
    monkeypatch.setattr("sys.argv", ["pipeline", "--only=resident", f"--out={path}"])
    monkeypatch.setattr(pipeline, "resident_feed", mock.Mock(side_effect=AssertionError))
    with pytest.raises(SystemExit):
        pipeline.main()
