"""The one place that knows what the program runs on."""

import logging

import jax

_LOG = logging.getLogger(__name__)
_ANNOUNCED: set[tuple[str, str]] = set()


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where jit places computation by default."""
    backend = jax.default_backend()
    return "gpu" if backend in ("cuda", "rocm") else backend


def compiler_options() -> dict[str, str]:
    """For `jax.jit` of large programs on this platform.

    The CPU scheduler by default lets all that is independent live at once. In program order a training step needs
    half the temporaries, which the system would have to hand over page by page, anew in each call.
    """
    if platform() == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return {}


def announce(op: str, implementation: str, reason: str):
    """Logs once per process which implementation `implementation="auto"` stands for."""
    if (op, implementation) not in _ANNOUNCED:
        _ANNOUNCED.add((op, implementation))
        _LOG.info("%s runs on %s (%s)", op, implementation, reason)


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)
