"""What a harness started ends with it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# The harness starts a child that would outlive it, and says which.
HARNESS = """
import subprocess, sys
from benchmarks import damage, faults

def start(*_, **__):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    return child

faults.start = damage.Workshop.start = start
from benchmarks import {name} as harness

if __name__ == "__main__":
    sys.argv[1:] = []
    harness.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["faults", "damage", "endurance"])
def test_an_interrupted_harness_leaves_no_process(name, number, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS.format(name=name)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with harness.stdout:
        child = psutil.Process(int(harness.stdout.readline()))
    time.sleep(0.2)  # the harness waits for its child
    harness.send_signal(number)  # to it alone, as `kill` or a scheduler does
    harness.wait()
    try:
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert list(tmp_path.iterdir()) == []
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
