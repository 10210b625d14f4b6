"""What commands that parse their options by argparse share; those with a config have `command`."""

import argparse
import contextlib
import pathlib
import re
import sys


def positive_number(text):
    """An option's value as an int from 1 up."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def path(text):
    """An option's value as a path, for a shell leaves the ~ of --out=~/x as it is."""
    return pathlib.Path(text).expanduser()


@contextlib.contextmanager
def one_message():
    """Makes of a user's mistake one message, and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
