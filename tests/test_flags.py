"""Sets of XLA's flags are compared with the defaults."""

import concurrent.futures.process

import pytest

from benchmarks import contenders, flags, throughput
from cnn_cases.models import fast

UNKNOWN = "no command buffers"


class Sham:
    """A contender that is made at once, except where XLA does not know a flag."""

    def __init__(self, *_, environment):
        self.made = concurrent.futures.Future()
        if environment["XLA_FLAGS"] == flags.FLAGS["gpu"][UNKNOWN]:
            self.made.set_exception(concurrent.futures.process.BrokenProcessPool())
        else:
            self.made.set_result({"batch_size": 8, "devices": ["NVIDIA H200"], "first_step_seconds": 2.0})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_ratio_is_to_the_defaults_and_unknown_flags_are_told(monkeypatch):
    def race(groups, *_):
        return {one: [2.0 if one == flags.DEFAULTS else 3.0] for one in groups}

    monkeypatch.setattr(contenders, "Contender", Sham)
    monkeypatch.setattr(contenders, "race", race)
    row, devices = flags.measure("ResNet-20", 1, "gpu")
    assert (row["batch_size"], devices) == (8, ["NVIDIA H200"])
    rows = row["flags"]
    assert rows.keys() == flags.FLAGS["gpu"].keys()
    assert rows.pop(UNKNOWN) == "its process died, as where XLA does not know a flag"
    assert {one: found["ratio"] for one, found in rows.items()} == {
        flags.DEFAULTS: 1.0,
        "deterministic": 1.5,
        "deterministic, timed": 1.5,
        "kernels chosen without timing": 1.5,
    }


@pytest.mark.parametrize(
    ("name", "for_cpu", "steps_per_call"),
    [(flags.FLAX, False, 1), (flags.ONE_STEP, True, 1), ("chosen", True, 0)],
)
def test_layers_and_steps_per_call_are_those_of_the_set(name, for_cpu, steps_per_call, monkeypatch):
    monkeypatch.setattr(throughput, "ours", lambda *_, steps_per_call: (fast.is_for_cpu(), steps_per_call))
    assert flags.ours(flags.CASES["ResNet-20"], "float32", name) == (for_cpu, steps_per_call)
