"""Contenders: processes that do the same work in turns, for `throughput`, `flags` and `scaling`."""

import concurrent.futures
import ctypes
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import time
from typing import Any, NamedTuple
from unittest import mock

from cnn_cases import stopping

SECONDS_A_TURN = 1.0
ACCELERATORS_SHARE = 0.3  # of that, on accelerators: their steps are short and their time is expensive
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the other contenders need GPU memory too
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}
_made = None  # the Network, in a Contender's process


class Network(NamedTuple):
    """A network in a Contender's process: functions that start a step or a pass, and one that waits for it.

    Attributes:
      train: () -> None, starts a call that does `steps_per_call` training steps.
      infer: () -> None, starts an inference pass.
      wait: () -> None, returns when all started work is done.
      peak_bytes: () -> peak memory of the device; None where it is not counted.
      facts: a dict that JSON can hold: "first_step_seconds", until the first call is done, including
        compilation, and more.
      steps_per_call: see `train`.
    """

    train: Any
    infer: Any
    wait: Any
    peak_bytes: Any
    facts: dict
    steps_per_call: int = 1

    def seconds(self, work, count):
        """The seconds of `count` steps or passes; `work` is "train" or "infer".

        If that is not a whole number of calls, it is measured on the next larger one.
        """
        a_call = self.steps_per_call if work == "train" else 1
        calls = -(-count // a_call)
        began = time.perf_counter()
        for _ in range(calls):
            getattr(self, work)()
        self.wait()
        return (time.perf_counter() - began) * count / (calls * a_call)

    def peak(self):
        """Peak bytes of the device or, where it does not count them, of this process during some steps.

        For the process, without `facts["resident_bytes"]`, which it had before the network.
        """
        bytes_of_device = self.peak_bytes()
        if bytes_of_device is not None:
            return bytes_of_device
        # glibc and Linux: returns what compiling took, and resets the peak resident size.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.seconds("train", 3)
        return _status("VmHWM") - self.facts["resident_bytes"]


def resident_bytes():
    """Resident memory of this process (Linux)."""
    return _status("VmRSS")


def _status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Contender:
    """A separate process in which `make(*arguments)` makes a Network, and a context manager that ends it.

    The process compiles everything anew, and ends if this one is killed. `made` is the future of the
    Network's facts; it fails with BrokenProcessPool if the process died.
    """

    def __init__(self, make, *arguments, environment=None):
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, initializer=stopping.end_with_parent
        )
        with mock.patch.dict(os.environ, _ENVIRONMENT | (environment or {})):  # which the process inherits
            self.made = self._pool.submit(_make, make, arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown()

    def seconds(self, work, count):
        """A future of the seconds of `count` steps or passes; `work` is "train" or "infer"."""
        return self._pool.submit(_call, "seconds", work, count)

    def peak(self):
        """A future of `Network.peak`."""
        return self._pool.submit(_call, "peak")

    def also(self, function, *arguments):
        """A future of what a function returns in that process."""
        return self._pool.submit(function, *arguments)


def check_installed(parser, peers):
    """Ends the command of an argparse parser if it is to measure PyTorch and PyTorch is not installed."""
    if peers and not importlib.util.find_spec("torch"):
        parser.error("--peers needs PyTorch (pip install torch); without a value, no peer is measured")


def check_same_platform(platforms):
    """Raises ValueError unless the contenders of {name: "cpu" or "gpu"} all compute on the same platform."""
    first = next(iter(platforms))
    for name, platform in platforms.items():
        if platform != platforms[first]:
            raise ValueError(
                f"{first} and {name} compute on different devices; install both for the same kind of device"
            )


def _make(make, arguments):
    global _made
    _made = make(*arguments)
    return _made.facts


def _call(method, *arguments):
    return getattr(_made, method)(*arguments)


def race(groups, work, turns, platform="cpu"):
    """The seconds of a step or a pass, {name: [one for each turn]}.

    Args:
      groups: {name: Contenders}. The contenders of a group work at the same time; the slowest one counts.
      work: "train" or "infer".
      turns: turns per group, each of SECONDS_A_TURN (a share of it on an accelerator) or at least one step,
        after a step that is not timed: others had the caches, and a virtual machine's host may have taken
        memory that the last turn had freed.
      platform: "cpu", "gpu" or "tpu".
    """

    def seconds(group, count):
        return max(future.result() for future in [one.seconds(work, count) for one in group])

    turn = SECONDS_A_TURN * (1 if platform == "cpu" else ACCELERATORS_SHARE)
    counts = {}
    for name, group in groups.items():
        seconds(group, 2)  # warms up
        counts[name] = max(1, round(2 * turn / seconds(group, 2)))
    found = {name: [] for name in groups}
    for _ in range(turns):
        for name, group in groups.items():
            seconds(group, 1)
            found[name].append(seconds(group, counts[name]) / counts[name])
    return found


def ratios(values, others):
    """Summary of the ratios of `values` to `others`, turn by turn."""
    return summary([value / other for value, other in zip(values, others, strict=True)])


def summary(values):
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
