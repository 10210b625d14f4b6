"""Contenders work in processes of their own and take turns."""

import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import contenders

ROOT = pathlib.Path(__file__).parent.parent


def _make(log):
    """A "network" that writes down who does what."""

    def note(work):
        with open(log, "a") as file:
            file.write(f"{work} {os.environ['PART']}\n")

    b"x" * 2**27  # as compilation takes memory, and returns it
    held = []
    facts = {"process": os.getpid(), "resident_bytes": contenders.resident_bytes()}
    return contenders.Network(
        lambda: note("train"), lambda: note("infer"), lambda: held.append(b"x" * 2**24), lambda: None, facts
    )


def test_steps_are_measured_in_whole_calls(monkeypatch):
    times, calls = iter([0.0, 8.0] * 3), []
    monkeypatch.setattr(contenders, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    network = contenders.Network(
        lambda: calls.append("train"), lambda: calls.append("infer"), lambda: None, None, {}, 4
    )
    assert network.seconds("train", 8) == 8
    assert network.seconds("train", 5) == 5  # of 8 s for 8 steps
    assert network.seconds("infer", 2) == 8
    assert calls == ["train"] * 4 + ["infer"] * 2


def _refuse():
    raise ValueError("no such network")


def test_each_has_a_process_and_an_environment_of_its_own(tmp_path):
    log = tmp_path / "log"
    with contenders.Contender(_make, log, environment={"PART": "first"}) as one:
        assert one.made.result()["process"] not in (os.getpid(), None)
        assert "PART" not in os.environ
        assert one.seconds("infer", 2).result() > 0
        assert log.read_text() == "infer first\n" * 2
        # No device counts here: the process does three steps and one wait, which keeps 16 MiB.
        assert 2**24 <= one.peak().result() < 2**26
        assert log.read_text() == "infer first\n" * 2 + "train first\n" * 3
        # It finds nothing that an earlier benchmark compiled.
        assert one.also(os.getenv, "JAX_ENABLE_COMPILATION_CACHE").result() == "false"
        assert one.also(os.getenv, "TORCHINDUCTOR_FORCE_DISABLE_CACHES").result() == "1"
        assert one.also(os.getpid).result() == one.made.result()["process"]


def test_what_goes_wrong_in_the_process_is_told():
    with contenders.Contender(_refuse) as one, pytest.raises(ValueError, match="no such network"):
        one.made.result()
    with (
        contenders.Contender(os._exit, 3) as one,
        pytest.raises(concurrent.futures.process.BrokenProcessPool),
    ):
        one.made.result()


def test_a_contender_ends_if_the_benchmark_is_killed(tmp_path):
    code = """
import os, time, types
from benchmarks import contenders

def make():
    return types.SimpleNamespace(facts=os.getpid())

if __name__ == "__main__":
    contender = contenders.Contender(make)
    print(contender.made.result(), flush=True)
    time.sleep(60)
"""
    script = tmp_path / "benchmark.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    with parent.stdout:
        contender = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        deadline = time.monotonic() + 10
        while contender.status() != psutil.STATUS_ZOMBIE:  # which waits for whoever adopted it
            assert time.monotonic() < deadline, "the contender is still there"
            time.sleep(0.05)


class Fake:
    """A contender whose steps take `seconds` each, and which writes its name down."""

    def __init__(self, name, seconds, log):
        self._name, self._seconds, self._log = name, seconds, log

    def seconds(self, work, count):
        self._log.append((self._name, work, count))
        future = concurrent.futures.Future()
        future.set_result(self._seconds * count)
        return future


def test_they_take_turns_and_the_slowest_of_a_group_counts():
    log = []
    groups = {
        "alone": [Fake("alone", 0.25, log)],
        "both": [Fake("one", 0.1, log), Fake("other", 0.5, log)],
    }
    assert contenders.race(groups, "train", 2) == {"alone": [0.25, 0.25], "both": [0.5, 0.5]}
    alone = [("alone", "train", 1), ("alone", "train", 4)]
    both = [("one", "train", 1), ("other", "train", 1), ("one", "train", 2), ("other", "train", 2)]
    assert log[-12:] == (alone + both) * 2  # a second each, after a step


def test_a_ratio_is_that_of_a_turn():
    assert contenders.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {
        "median": 2.0,
        "lowest": 1.0,
        "highest": 3.0,
    }
