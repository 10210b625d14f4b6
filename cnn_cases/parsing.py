"""Code shared by commands that use argparse; commands with a config use `command`."""

import argparse
import contextlib
import pathlib
import re
import sys


def positive_number(text):
    """Parses an option's value as a positive int."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def path(text):
    """Parses an option's value as a path; a shell does not expand the ~ of --out=~/x."""
    return pathlib.Path(text).expanduser()


@contextlib.contextmanager
def one_message():
    """Turns a user's mistake into one message and exit code 2, and Ctrl-C into one and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("SIGINT: stopped at once", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
