"""The one place that knows what the program runs on."""

import logging

import jax

_LOG = logging.getLogger(__name__)
_ANNOUNCED: set[tuple[str, str]] = set()


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where jit places computation by default."""
    backend = jax.default_backend()
    return "gpu" if backend in ("cuda", "rocm") else backend


def announce(op: str, implementation: str, reason: str):
    """Logs once per process which implementation `implementation="auto"` stands for."""
    if (op, implementation) not in _ANNOUNCED:
        _ANNOUNCED.add((op, implementation))
        _LOG.info("%s runs on %s (%s)", op, implementation, reason)


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)
