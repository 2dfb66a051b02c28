"""How sequence parallelism moves what devices need of each other."""

METHODS = ("gather", "ring")


def check_method(method: str) -> None:
    """Raises ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} of sequence parallelism is not one of {', '.join(METHODS)}")
