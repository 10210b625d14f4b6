"""The peer in PyTorch is told to do what the config says, and does it."""

import itertools
import json

import numpy as np
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


def test_the_peer_gets_the_images_of_the_config(tmp_path):
    overrides = {"data.data_dir": str(tmp_path / "sets"), "data.image_size": 16, "data.border": 1}
    case = end_to_end.Case("resnet_digits", overrides, end_to_end._resnet)
    end_to_end.settings_of(case, tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as arrays:
        assert arrays["train_image"].shape == (1257, 18, 18, 1)
    assert (tmp_path / "sets/digits").is_dir()


@pytest.mark.parametrize(
    ("key", "value", "section"),
    [
        ("data.normalization", "pixel_mean", "data.normalization"),
        ("data.augment.flip", True, "data.augment"),
        ("loss.label_smoothing", 0.1, "loss"),
        ("optimizer.nesterov", True, "optimizer.nesterov"),
    ],
)
def test_a_config_that_the_peer_does_not_follow_is_refused(key, value, section, tmp_path):
    case = end_to_end.Case("resnet_digits", {key: value}, end_to_end._resnet)
    with pytest.raises(ValueError, match=f"^{section} = .*, which the script in PyTorch does not do"):
        end_to_end.settings_of(case, tmp_path / "data.npz")


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
    work = "import time\nwhile time.process_time() < 0.2: sum(range(100_000))\ntime.sleep(2)\n"
    commands = [["-c", f"{work}print({number})"] for number in (1, 2)]
    (seconds, cpu), outputs = end_to_end._timed(commands, {})
    assert 4 > seconds > 2 > cpu > 0.3  # the two slept at the same time
    assert outputs == ["1\n", "2\n"]


def test_two_processes_train_all_networks_between_them(tmp_path, monkeypatch):
    told = []

    def timed(commands, environment):
        assert environment["OMP_NUM_THREADS"] == str(provenance.cpu_threads() // 2)
        assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache")
        for *_, path in commands:
            told.append(json.loads(path.read_text())["networks"])
        found = [{"platform": "cpu", "test": [0.1] * len(networks)} for networks in told]
        return (1.0, 2.0), [json.dumps(one) for one in found]

    monkeypatch.setattr(end_to_end, "_timed", timed)
    settings = {"networks": [["cifar_resnet", {"depth": depth}, 0] for depth in (8, 20, 32)]}
    outcome = end_to_end._run_theirs(settings, tmp_path, tmp_path / "cache", 2)
    assert outcome == (1.0, 2.0, 0.1, "cpu")
    assert [one for pair in itertools.zip_longest(*told) for one in pair if one] == settings["networks"]
    assert len(told) == 2


def test_our_run_compiles_into_the_cache_that_it_is_given(tmp_path, monkeypatch):
    def timed(commands, environment):
        assert len(commands) == 1
        assert environment == {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
        }
        return (1.0, 2.0), [""]

    result = {"status": "finished", "step": 200, "seconds": 1.0, "metrics": {"test/error": 0.1}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "environment.json").write_text('[{"devices": ["cpu"]}]')
    monkeypatch.setattr(end_to_end, "_timed", timed)
    outcome = end_to_end._run_ours(end_to_end.CASES["ResNet-20, digits"], tmp_path, tmp_path / "cache")
    assert outcome == (1.0, 2.0, 0.1, "cpu")


def test_a_turn_begins_with_nothing_compiled_and_a_ratio_is_to_ours(monkeypatch):
    caches = []

    def run(seconds):
        def note(_case_or_settings, _directory, cache, _processes=1):
            caches.append(cache)
            return end_to_end.Outcome(seconds, 2.0, 0.1, "cpu")

        return note

    monkeypatch.setattr(end_to_end, "_run_ours", run(1.0))
    monkeypatch.setattr(end_to_end, "_run_theirs", run(2.0))
    peers = ["torch.compile, first start", "torch.compile, later start"]
    rows = end_to_end.measure("ResNet-20, digits", 2, peers)["contenders"]
    assert rows["torch.compile, first start"]["ratio"] == {"first start": 2.0, "later start": 2.0}
    first, later = caches[::2], caches[1::2]
    assert first == later
    assert len(set(first)) == 4  # of ours and of theirs, in each turn


def test_a_gpu_is_not_compared_with_a_cpu(monkeypatch):
    monkeypatch.setattr(end_to_end, "_run_ours", lambda *_: end_to_end.Outcome(1.0, 2.0, 0.1, "gpu"))
    monkeypatch.setattr(end_to_end, "_run_theirs", lambda *_: end_to_end.Outcome(1.0, 2.0, 0.1, "cpu"))
    with pytest.raises(ValueError, match="first start and torch compute on different devices; install both"):
        end_to_end.measure("ResNet-20, digits", 1, ["torch"])
