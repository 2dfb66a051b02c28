"""The one place that knows what the program runs on."""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

_LOG = logging.getLogger(__name__)
_ANNOUNCED: set[tuple[str, str]] = set()
_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the `target` if one is set, else where jit places computation by default."""
    if (target_name := _TARGET.get()) is not None:
        return target_name
    backend = jax.default_backend()
    return "gpu" if backend in ("cuda", "rocm") else backend


def interpret() -> bool:
    """Whether kernels are interpreted here: they compile for accelerators only."""
    return platform() == "cpu"


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Makes `platform()` answer `name` inside: for compiling ahead of time for hardware that this host lacks.

    It is read while a function is traced, and jit keeps traces: a jitted function that was traced outside keeps
    what it chose there. Wrap a function of its own with `jax.jit` inside.
    """
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)


def compiler_options() -> dict[str, str]:
    """For `jax.jit` of large programs on this platform.

    The CPU scheduler by default lets all that is independent live at once. In program order a training step needs
    half the temporaries, which the system would have to hand over page by page, anew in each call. Elementwise loops
    use half the width of AVX-512 unless told. On TPU a ragged all-to-all by default stops everything else, and the
    default scheduler sends it long before or behind the products that would hide it; what waits for those products
    meanwhile takes memory.
    """
    if platform() == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_cpu_prefer_vector_width": "512"}
    if platform() == "tpu":
        return {"xla_tpu_enable_async_ragged_all_to_all": "true", "xla_tpu_use_aggressive_scheduling": "true"}
    return {}


def announce(op: str, implementation: str, reason: str) -> None:
    """Logs once per process which implementation `implementation="auto"` stands for."""
    if (op, implementation) not in _ANNOUNCED:
        _ANNOUNCED.add((op, implementation))
        _LOG.info("%s runs on %s (%s)", op, implementation, reason)


def divided() -> bool:
    """Whether the compiler divides arrays over several devices here."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in set(mesh.axis_names) - set(mesh.manual_axes))


def why_not(check: Callable[[], object]) -> str | None:
    """Why a kernel cannot be the default here, or None: what its `check` says, or that the compiler divides arrays.

    Args:
      check: a call that raises NotImplementedError where the kernel cannot serve.
    """
    if divided():
        return "the mesh has several devices, and a kernel is divided among them by jax.shard_map only"
    try:
        check()
    except NotImplementedError as error:
        return str(error)
    return None


def cdiv(a: Any, b: Any) -> Any:
    """Quotient of two integers, or integer arrays, rounded up."""
    return -(-a // b)
