"""The peers are the same networks, and the table says what was measured."""

import concurrent.futures
import functools
import json
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks import contenders, throughput


@pytest.mark.parametrize("name", throughput.CASES)
def test_a_peer_has_as_many_parameters_and_multiply_adds(name):
    pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    make_network, origin = throughput.peer(throughput.CASES[name])  # raises where it has not
    assert origin in ("torchvision", "benchmarks.peers")
    # Weights are drawn: memory as it comes may hold denormal numbers, with which a CPU takes far longer.
    assert all(0.001 < weight.std() < 1 for weight in make_network().parameters() if weight.ndim > 1)


def test_side_branches_are_counted_too():
    # Szegedy et al. 2015 with two auxiliary classifiers; torch.utils.flop_counter finds the same.
    counted = throughput.counts(throughput.CASES["GoogLeNet"])
    assert counted == {"parameters": 13_378_280, "multiply_adds": 1_591_044_096}


@pytest.fixture
def train(monkeypatch):
    """A step of training, for `over_devices` of `throughput.ours`; it and inference compute nothing."""
    train = mock.Mock(side_effect=lambda state, *_: (state, {}))
    train.lower().compile().cost_analysis.return_value = {"flops": 16.0, "bytes accessed": 4.0}
    monkeypatch.setattr(throughput.devices_lib, "pmap_predict", lambda *_: lambda *_: "log probabilities")
    return train


SMALL = throughput.CASES["LeNet-5"]._replace(cpu_batch=8)


def test_our_step_weighs_side_branches_as_the_peer_does_and_is_counted_by_xla(train, monkeypatch):
    make_train_steps = mock.Mock()
    monkeypatch.setattr(throughput.steps, "make_train_steps", make_train_steps)
    facts = throughput.ours(SMALL, "float32", over_devices=lambda *_: train).facts
    assert make_train_steps.call_args.kwargs["side_weight"] == 0.3
    assert (facts["xla_flops_a_step"], facts["xla_bytes_a_step"]) == (16, 4)


def test_a_device_gets_its_share_of_the_batch(train, monkeypatch):
    batch = mock.Mock(wraps=throughput._batch)
    monkeypatch.setattr(throughput, "_batch", batch)
    network = throughput.ours(SMALL, "float32", num_devices=2, over_devices=lambda *_: train)
    assert network.facts["batch_size"] == 8
    batch.assert_called_once_with(SMALL, 4)


def test_on_a_cpu_a_call_does_as_many_steps_as_in_a_training_run(train):
    def shapes(case):
        """Those of the batches in a call that trains, and in the program whose operations are counted."""
        train.reset_mock()
        network = throughput.ours(case, "float32", over_devices=lambda *_: train)
        assert network.facts["steps_per_call"] == network.steps_per_call
        return [one.call_args.args[2].shape for one in (train, train.lower)]

    assert shapes(SMALL) == [(1, 10, 1), (1, 1, 1)]
    assert shapes(SMALL._replace(image_shape=(224, 224, 1))) == [(1, 3, 1), (1, 1, 1)]
    assert throughput._steps_per_call(SMALL, "gpu") == 1


def test_inference_is_waited_for(train, monkeypatch):
    network = throughput.ours(SMALL, "float32", over_devices=lambda *_: train)
    waited_for = []
    network.infer()
    monkeypatch.setattr(throughput.jax, "block_until_ready", lambda last: waited_for.extend(last))
    network.wait()
    assert waited_for[1:] == ["log probabilities"]


def test_each_kind_of_contender_is_made_as_it_says(monkeypatch):
    calls = mock.Mock()
    for owner, name in (
        (throughput.runtime, "choose_cpu_flags"),
        (throughput, "ours"),
        (throughput, "theirs"),
    ):
        monkeypatch.setattr(owner, name, getattr(calls, name))
    for kind in (throughput.OURS, "torch", "torch.compile"):
        throughput.make(SMALL, "float32", kind)
    assert calls.mock_calls == [
        mock.call.choose_cpu_flags(),
        mock.call.ours(SMALL, "float32"),
        mock.call.theirs(SMALL, "float32", compiled=False),
        mock.call.theirs(SMALL, "float32", compiled=True),
    ]


def test_the_ceilings_are_of_a_product_and_of_a_copy_that_reads_and_writes(monkeypatch):
    monkeypatch.setattr(throughput, "_best", lambda _: 1.0)
    assert throughput.ceilings("float32") == (2 * 2048**3, 2 * 2**26)


def test_the_best_of_the_repeats_counts(monkeypatch):
    times = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert throughput._best(lambda: None, repeats=3) == 1.0


def test_the_tables_have_a_ratio_and_the_costs_of_each_peer():
    def figures(rate, ratio):
        spread = {"median": rate, "lowest": rate - 1, "highest": rate + 1}
        return {"images_a_second": spread, "ratio": {"median": ratio, "lowest": ratio, "highest": ratio}}

    row = {
        "batch_size": 8,
        "image_shape": (32, 32, 3),
        "train": {"cnn_cases": figures(1000, 1), "torch": figures(500, 2)},
        "infer": {"cnn_cases": figures(30.5, 1), "torch": figures(6000, 0.5)},
        "first_step_seconds": {"cnn_cases": 2.5, "torch": 0.1},
        "peak_bytes": {"cnn_cases": 2_000_000_000, "torch": 3_000_000},
        "flops_a_second": 12.3e9,
        "share_of_ceiling": 0.25,
        "share_of_bound": 0.5,
    }
    assert throughput.cells({"ResNet-20": row}) == [
        [
            "network",
            "batch",
            "pixels",
            "training, images/s",
            "by torch's",
            "inference, images/s",
            "by torch's",
        ],
        ["ResNet-20", "8", "32x32", "1,000 (999 to 1,001)", "2.00", "30.5 (29.5 to 31.5)", "0.50"],
    ]
    head, line = throughput.cost_cells({"ResNet-20": row})
    assert dict(zip(head, line, strict=True)) == {
        "network": "ResNet-20",
        "first step, s: cnn_cases": "2.5",
        "first step, s: torch": "0.1",
        "memory, MB: cnn_cases": "2,000",
        "memory, MB: torch": "3",
        "GFLOP/s": "12.3",
        "share of ceiling": "25%",
        "share of bound": "50%",
    }
    del row["share_of_bound"]  # as on a TPU
    assert throughput.cost_cells({"ResNet-20": row}) == [head[:-1], line[:-1]]


class Sham:
    """A contender that notes what is asked of it; its step takes a millisecond, and twice that for a peer."""

    log = None  # of what is asked of all of them: a list, by each test

    def __init__(self, _make, case, _dtype, kind, platform="gpu"):
        self.case, self.kind = case, kind
        facts = {"platform": platform, "batch_size": 8, "steps_per_call": 1, "first_step_seconds": 1.0}
        self.made = self.done("made", facts)
        if kind != throughput.OURS:
            self.made.result().update(peer="benchmarks.peers", torch="2.0")
        elif platform == "cpu":
            self.made.result().update(xla_flops_a_step=16, xla_bytes_a_step=4)
        elif platform == "gpu":
            self.made.result().update(kernels_a_step=3, bytes_a_step=200)

    def done(self, what, value):
        self.log.append((what, self.kind, self.case.model["name"]))
        future = concurrent.futures.Future()
        future.set_result(value)
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append(("ended", self.kind, self.case.model["name"]))

    def seconds(self, work, count):
        return self.done(work, count * (1e-3 if self.kind == throughput.OURS else 2e-3))

    def peak(self):
        return self.done("peak", 1)

    def also(self, function, *_):
        wanted = {throughput.counts: {"multiply_adds": 5}, throughput.ceilings: (1e6, 5e5)}
        return self.done(function.__name__, wanted[function])


def test_cases_that_are_made_at_once_are_measured_one_after_another(monkeypatch):
    monkeypatch.setattr(contenders, "Contender", Sham)
    monkeypatch.setattr(Sham, "log", [])
    rows = dict(throughput.measure(["LeNet-5", "NIN"], "bfloat16", 3, ["torch"]))
    assert [what for what, *_ in Sham.log[:4]] == ["made"] * 4
    assert [name for what, _, name in Sham.log if what == "ended"] == ["lenet5", "lenet5", "nin", "nin"]
    assert Sham.log.index(("ended", "torch", "lenet5")) < Sham.log.index(("peak", throughput.OURS, "nin"))
    assert list(rows) == ["LeNet-5", "NIN"]
    for row in rows.values():
        assert row["cases_compiled_at_once"] == 2
        assert row["train"]["torch"]["ratio"]["median"] == pytest.approx(2)
        assert row["train"][throughput.OURS]["images_a_second"]["median"] == pytest.approx(8_000)
        assert row["share_of_ceiling"] == pytest.approx(6 * 5 * 8_000 / 1e6)
        assert row["torch"] == "2.0"
    assert ("infer", throughput.OURS, "nin") in Sham.log


def test_on_a_cpu_the_bound_is_what_takes_longer_of_arithmetic_and_memory(monkeypatch):
    monkeypatch.setattr(contenders, "Contender", functools.partial(Sham, platform="cpu"))
    monkeypatch.setattr(Sham, "log", [])
    ((_, row),) = throughput.measure(["NIN"], "float32", 1, [])
    # 8 images take 16 operations, at 1e6 a second, and 4 bytes, at 5e5 a second.
    assert row["bound_images_a_second"] == pytest.approx(500_000)
    assert row["share_of_bound"] == pytest.approx(8_000 / 500_000)


def test_on_a_gpu_the_bound_has_the_networks_multiply_adds_and_the_traffic_of_its_kernels(monkeypatch):
    monkeypatch.setattr(contenders, "Contender", Sham)
    monkeypatch.setattr(Sham, "log", [])
    ((_, row),) = throughput.measure(["NIN"], "float32", 1, [])
    # 8 images take 8 * 5 multiply-adds, thrice, at 1e6 operations a second, and 200 bytes, at 5e5 a second.
    assert row["bound_images_a_second"] == pytest.approx(8 / (200 / 5e5))
    assert row["share_of_bound"] == pytest.approx(8_000 / 20_000)
    assert row["kernels_a_step"] == 3


def test_a_case_alone_is_made_one_contender_after_another_and_none_on_another_device(monkeypatch):
    monkeypatch.setattr(Sham, "log", [])
    monkeypatch.setattr(
        contenders,
        "Contender",
        lambda *of_all: Sham(*of_all, platform="gpu" if of_all[-1] == throughput.OURS else "cpu"),
    )
    with pytest.raises(ValueError, match="cnn_cases and torch compute on different devices"):
        next(throughput.measure(["NIN"], "float32", 3, ["torch", "torch.compile"]))
    assert [kind for what, kind, _ in Sham.log if what == "made"] == [throughput.OURS, "torch"]


class ShamWithoutMemory(Sham):
    """One whose VGG-16 of torch finds the memory of the device full."""

    def __init__(self, make, case, dtype, kind):
        super().__init__(make, case, dtype, kind)
        if (case.model["name"], kind) == ("vgg", "torch"):
            self.made = concurrent.futures.Future()
            self.made.set_exception(MemoryError("no 3 GB left"))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_case_that_fails_is_told_and_the_others_are_measured(at_once, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(contenders, "Contender", ShamWithoutMemory)
    monkeypatch.setattr(Sham, "log", [])
    out = tmp_path / "figures.json"
    command = f"throughput --cases LeNet-5 VGG-16 NIN --at_once={at_once} --turns=1 --out={out}"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr(contenders, "check_installed", mock.Mock())
    with pytest.raises(SystemExit, match=r"VGG-16 was not measured: MemoryError\('no 3 GB left'\)"):
        throughput.main()
    assert set(json.loads(out.read_text())) == {"LeNet-5", "NIN"}
    assert "| NIN " in capsys.readouterr().out
    assert ("train", throughput.OURS, "vgg") not in Sham.log
    assert ("ended", throughput.OURS, "vgg") in Sham.log


@pytest.mark.parametrize("number", ["0", "-1"])
def test_at_least_one_case_is_made(number, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["throughput", f"--at_once={number}"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert f"--at_once: '{number}' is not a positive integer" in capsys.readouterr().err


def test_what_quick_chooses_can_be_chosen_otherwise(monkeypatch):
    told = []
    monkeypatch.setattr(throughput, "measure", lambda *arguments: told.append(arguments) or ())
    monkeypatch.setattr("sys.argv", ["throughput", "--quick", "--cases", "AlexNet", "--peers"])
    throughput.main()
    assert told == [(["AlexNet"], "float32", 3, [])]


def test_without_pytorch_its_steps_are_not_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", mock.Mock(return_value=None))
    monkeypatch.setattr("sys.argv", ["throughput", "--quick"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert "--peers needs PyTorch (pip install torch)" in capsys.readouterr().err
