"""Checks of a config's values that all packages share."""

import math


def one_of(key, value, known):
    """Raises ValueError, which lists the known values, unless a config key has one of them."""
    if value not in known:
        raise ValueError(f"{key} = {value!r} is unknown; known: {', '.join(map(str, known))}")


def positive(key, value):
    """Raises ValueError unless a config key has a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{key} = {value} must be above 0, and finite")


def not_negative(key, value):
    """Raises ValueError unless a config key has a finite number of 0 or more."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{key} = {value} must be 0 or more, and finite")
