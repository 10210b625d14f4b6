"""What the command lines share: a user's mistake becomes one message and an exit code.

0     done
2     bad input
3     the training diverged
4     another process of the same training died, fell silent, left it or never came
130   SIGINT (Ctrl-C) came, and all is saved
140   SIGUSR2 (a scheduler's warning) came, and all is saved
143   SIGTERM came, and all is saved
"""

import os
import signal
import sys

from absl import app, flags, logging

from cnn_cases.training import devices, loop

_DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "Leave out what on a GPU gives other bits each time; see devices.make_deterministic.",
)

# Seconds to wait for the other processes of a training: where all end, for process 0 to have saved; after an
# error, which may be of one process alone, not long.
_ALL_END, _MAY_BE_ALONE = 600, 3


def run(main):
    """Parses the flags, calls `main()` and exits."""

    def guarded(arguments):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells of every save in a dozen lines
        if arguments[1:]:
            _leave(f"error: not understood: {' '.join(arguments[1:])}", 2)
        signal.signal(signal.SIGTERM, _terminated)
        if _DETERMINISTIC.value:
            devices.make_deterministic()
        try:
            main()
        except loop.DivergedError as error:
            _leave(f"error: {error}", 3, _ALL_END)
        except loop.InterruptedRun as interruption:
            _leave(str(interruption), 128 + interruption.signal_number, _ALL_END)
        except KeyboardInterrupt:
            _leave_at_once("SIGINT", 130)
        except Exception as error:
            if devices.is_loss(error):
                devices.lose(f"another process died or left: {error}")
            if not isinstance(error, ValueError | OSError):
                raise
            logging.debug("where it was raised", exc_info=True)  # shown with --verbosity=1
            _leave(f"error: {error}", 2)
        devices.leave(0, _ALL_END)

    app.run(guarded, flags_parser=_parse)


def _parse(arguments):
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, OSError) as error:
        # ml_collections puts the whole traceback of an error in a config file into its own message.
        head, traceback, tail = str(error).partition("\n\nTraceback")
        _leave(f"error: {head} {tail.splitlines()[-1]}" if traceback else f"error: {error}", 2)
    except (AttributeError, KeyError) as error:
        # ml_collections' word for a key that the config does not have: "'optimiser'\nDid you mean ...?"
        key, _, hint = str(error.args[0] if error.args else "").partition("\n")
        key = key.strip("'\"\\")
        culprit = next((one for one in arguments if f".{key}" in one.partition("=")[0]), None)
        if culprit is None or not key:
            raise  # a mistake in the config file itself
        hint = hint or "configs/common.py lists the keys"
        _leave(f"error: {culprit}: the config has no key {key!r} there. {hint}", 2)
    return None


def _terminated(*_):
    # While a run trains, the loop has a handler of its own, which saves.
    _leave_at_once("SIGTERM", 143)


def _leave_at_once(signal_name, code):
    # Nothing is under way that must end well, and where JAX's threads are busy, Python's own way out can end
    # in a segmentation fault: that is what one of 55 signals at random times led to.
    print(f"{signal_name}: stopped before or after the training; start again to go on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave(message, code, patience_seconds=_MAY_BE_ALONE):
    print(message, file=sys.stderr)
    devices.leave(code, patience_seconds)
    sys.exit(code)
