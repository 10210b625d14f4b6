"""Processes that a benchmark starts with `subprocess`, and that do not outlive it."""

import contextlib
import signal
import sys


@contextlib.contextmanager
def ended(*processes):
    """Yields the processes as a tuple; they do not outlive the block, however that ends."""
    try:
        yield processes
    finally:
        for process in processes:
            with process:  # closes its pipes and waits
                process.kill()  # ends even one that SIGSTOP has stopped; no effect on one that has ended


def end_on_sigterm():
    """Lets SIGTERM end this process by an exception, as Ctrl-C does, so that its children end before it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
