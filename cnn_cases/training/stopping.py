"""The signals that end a training, once it is saved."""

import contextlib
import signal
import threading
import time
import types

SAME_SIGNAL_SECONDS = 2  # see stop_signals


class InterruptedRun(BaseException):
    """SIGTERM, SIGINT or SIGUSR2 came and the run was saved; `signal_number` says which.

    It is no error, as KeyboardInterrupt is none, and passes by those who handle every Exception.
    """

    def __init__(self, message, signal_number):
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def stop_signals():
    """Notes SIGTERM, SIGINT and SIGUSR2, a scheduler's warning, and lives on; a later one acts as ever.

    One that comes within SAME_SIGNAL_SECONDS does not: a scheduler may signal a process and its parent, which
    then passes it on.

    Yields an object whose `number` is 0 until a signal comes, then the signal's.
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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
