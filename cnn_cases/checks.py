"""The check that every room makes: of a name that must be one of a list."""


def one_of(key, value, known):
    """Raises ValueError, with what is known, unless the value of a key of the config is."""
    if value not in known:
        raise ValueError(f"{key} = {value!r} is unknown; known: {', '.join(map(str, known))}")
