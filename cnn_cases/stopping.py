"""What ends a process: the signals that end a run after it has been saved, and the end of its parent."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import types

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR2  # the last is a scheduler's warning
SAME_SIGNAL_SECONDS = 2  # see stop_signals


class InterruptedRun(BaseException):
    """One of SIGNALS arrived and the run was saved; `signal_number` says which.

    Like KeyboardInterrupt, it is not an error, and `except Exception` does not catch it.
    """

    def __init__(self, message, signal_number):
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def blocked(*signals):
    """Blocks signals: those that arrive wait until the end. Processes started inside keep them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def stop_signals():
    """Records one of SIGNALS instead of ending the process.

    A later signal acts as usual, unless it arrives within SAME_SIGNAL_SECONDS of the first: a scheduler may
    signal a process and its parent, which then passes the signal on.

    Yields:
      An object whose `number` is 0 until a signal arrives, then the signal's number.
    """
    stop, before = types.SimpleNamespace(number=0, since=0.0), {}

    def note(number, _):
        if not stop.number:
            stop.number, stop.since = number, time.monotonic()
        elif time.monotonic() - stop.since >= SAME_SIGNAL_SECONDS:
            for one, handler in before.items():
                signal.signal(one, handler)
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(*_, by=lambda: os._exit(1)):
    """Lets this process end, `by` a function, once the one that started it has ended, even if it was killed.

    The processes are those of multiprocessing; what a pool passes to its initializer is ignored.
    """

    def watch():
        multiprocessing.parent_process().join()
        by()

    threading.Thread(target=watch, daemon=True).start()
