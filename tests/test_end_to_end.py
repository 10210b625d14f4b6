"""The peer in PyTorch is told to do what the config says, and does it."""

import itertools
import json

import pytest

from benchmarks import end_to_end
from cnn_cases.studies import plan
from cnn_cases.training import provenance
from configs import resnet_digits
from configs.studies import depth_digits


def test_the_peer_is_told_what_the_config_says(tmp_path):
    settings = end_to_end.settings_of(end_to_end.CASES["ResNet-20, digits"], tmp_path / "data.npz")
    config = resnet_digits.get_config()
    assert settings["networks"] == [("cifar_resnet", dict(depth=20, plain=False, channels=1), 0)]
    assert settings["batch_size"] == config.batch_size
    assert settings["every_steps"] == config.evaluation.every_steps
    rate = config.optimizer.learning_rate
    assert len(settings["rates"]) == config.num_steps
    assert settings["rates"][0] == pytest.approx(rate)
    assert settings["rates"][-1] == pytest.approx(rate / 100)


def test_the_peer_of_a_study_trains_each_of_its_networks(tmp_path):
    settings = end_to_end.settings_of(end_to_end.CASES["depth study, digits"], tmp_path / "data.npz")
    runs = plan.expand(depth_digits.get_config())
    told = [(arguments["depth"], arguments["plain"], seed) for _, arguments, seed in settings["networks"]]
    assert told == [(run.config.model.depth, run.config.model.plain, run.config.seed) for run in runs]


def test_the_peer_learns(tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    from benchmarks import torch_training

    settings = end_to_end.settings_of(end_to_end.CASES["ResNet-20, digits"], tmp_path / "data.npz")
    settings["networks"] = [("cifar_resnet", dict(depth=8, channels=1), 0)]
    settings["rates"] = settings["rates"][:60]
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings | {"compiled": False}))
    torch_training.main(path)
    errors = json.loads(capsys.readouterr().out)
    assert errors.keys() == {"platform", "train", "validation", "test"}
    assert errors["test"][0] < 0.3  # chance is 0.9


def test_a_process_that_fails_is_told_with_its_words():
    with pytest.raises(RuntimeError, match=r"exit code 1: (.|\n)*No such file"):
        end_to_end._timed([["-c", "print(1)"], ["-c", "open('nowhere')"]], {})


def test_seconds_and_cpu_seconds_are_those_of_the_processes():
    commands = [["-c", f"import time; time.sleep(2); print({number})"] for number in (1, 2)]
    (seconds, cpu), outputs = end_to_end._timed(commands, {})
    assert 4 > seconds > 2 > cpu  # the two slept at the same time
    assert outputs == ["1\n", "2\n"]


def test_two_processes_train_all_networks_between_them(tmp_path, monkeypatch):
    told = []

    def timed(commands, environment):
        assert environment["OMP_NUM_THREADS"] == str(provenance.cpu_threads() // 2)
        for *_, path in commands:
            told.append(json.loads(path.read_text())["networks"])
        found = [{"platform": "cpu", "test": [0.1] * len(networks)} for networks in told]
        return (1.0, 2.0), [json.dumps(one) for one in found]

    monkeypatch.setattr(end_to_end, "_timed", timed)
    settings = {"networks": [["cifar_resnet", {"depth": depth}, 0] for depth in (8, 20, 32)]}
    assert end_to_end._run_theirs(settings, tmp_path, tmp_path, 2) == (1.0, 2.0, 0.1, "cpu")
    assert [one for pair in itertools.zip_longest(*told) for one in pair if one] == settings["networks"]
    assert len(told) == 2


def test_a_gpu_is_not_compared_with_a_cpu(monkeypatch):
    monkeypatch.setattr(end_to_end, "_run_ours", lambda *_: end_to_end.Outcome(1.0, 2.0, 0.1, "gpu"))
    monkeypatch.setattr(end_to_end, "_run_theirs", lambda *_: end_to_end.Outcome(1.0, 2.0, 0.1, "cpu"))
    with pytest.raises(ValueError, match="first start and torch compute on different devices; install both"):
        end_to_end.measure("ResNet-20, digits", 1, ["torch"])
