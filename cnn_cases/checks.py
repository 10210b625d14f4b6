"""A check that all packages share: a name must be one of a list."""


def one_of(key, value, known):
    """Raises ValueError, which lists the known values, unless a config key has one of them."""
    if value not in known:
        raise ValueError(f"{key} = {value!r} is unknown; known: {', '.join(map(str, known))}")
