"""Coordination of the processes of one run: joining, exchanging small values, and ending when one is lost.

Every process must make these calls in the same order. With a single process they return at once.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

_JOIN_SECONDS = 300
_LOST_SECONDS = 60  # without a heartbeat for this long a process is lost, and the run ends
_SHUTDOWN_SECONDS = 5
_CHUNK_BYTES = 4096  # texts are padded to a multiple, so that few sizes are compiled


class LostProcessError(RuntimeError):
    """Another process of the run has ended, and this one cannot go on; the message says how to continue."""


def join(address: str) -> None:
    """Joins the processes of one run. Call it before anything asks jax for devices.

    Args:
      address: "auto", or "HOST:PORT,COUNT,INDEX".

    Raises:
      RuntimeError: process 0 cannot be reached, or the environment does not describe the processes.
    """
    settings: dict[str, Any] = {}
    if address != "auto":
        coordinator, count, index = address.rsplit(",", 2)
        if int(index) > 0:
            _wait_for_coordinator(coordinator)
        settings = dict(coordinator_address=coordinator, num_processes=int(count), process_id=int(index))
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_LOST_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"--distributed={address}: {str(error).splitlines()[0]} If the environment does not describe the "
            "processes of the run, give HOST:PORT,COUNT,INDEX"
        ) from error


def _wait_for_coordinator(coordinator):
    """Returns once process 0 listens. When jax itself waits in vain, it ends the process with only a stack trace."""
    host, port = coordinator.rsplit(":", 1)
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"--distributed: process 0 does not answer at {coordinator} after {_JOIN_SECONDS} s ({error}); "
                    "start it too, at an address that this host can reach"
                ) from error
            time.sleep(0.5)


@contextlib.contextmanager
def together(remedy: Callable[[], str]) -> Iterator[None]:
    """Runs the block so that the loss of another process ends this one with a message that says what to do.

    When the other side of a collective has died, the collective raises on some platforms and waits forever on others.
    In the second case jax misses the heartbeat and ends all processes within `_LOST_SECONDS`. It calls abort() in its
    own thread, so only a handler of SIGABRT can still print. The exit status remains that of an abort.

    Args:
      remedy: returns the end of the message; called only when a process is lost.

    Raises:
      LostProcessError: instead of the error of a collective.
    """
    if jax.process_count() == 1:
        yield
        return
    lost = f"another process of this run has ended or was silent for {_LOST_SECONDS} s (see jax's lines above)"
    with _message_on_abort(lambda: f"{lost}; this process stops too: {remedy()}\n"):
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not _COLLECTIVE_FAILED.search(str(error)):
                raise
            cause = str(error).splitlines()[0]
            raise LostProcessError(
                f"another process of this run has ended or is out of reach ({cause[:300]}): {remedy()}"
            ) from error


# Errors of gloo, of NCCL, and of jax's coordination service.
_COLLECTIVE_FAILED = re.compile(r"gloo|nccl|coordination service|^unavailable|^deadline_exceeded", re.IGNORECASE)


@contextlib.contextmanager
def _message_on_abort(text: Callable[[], str]) -> Iterator[None]:
    """Writes `text()` to standard error if the process aborts while the block runs.

    Handlers of the signal module run in the main thread, and an abort does not wait for it. So ctypes installs the
    handler. It needs the GIL, which threads that wait for devices or for other processes have released.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number):
        libc.signal(number, None)  # SIG_DFL: the process ends once this returns
        os.write(2, text().encode())

    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)


def exit_with_error(message: str, *, lost: bool) -> NoReturn:
    """Prints `message` and ends this process with status 1, without waiting for processes that wait for it.

    Processes that fail for the same reason arrive here within seconds, and shut down in order.

    Args:
      lost: another process is lost, so there is no orderly shutdown.
    """
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # os._exit, because unfinished reads and writes of orbax would print their tracebacks after the message.
    if jax.distributed.is_initialized() and not lost:
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(_SHUTDOWN_SECONDS)
    os._exit(1)


def is_first() -> bool:
    """Whether this process writes the files that a run has only once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Runs the block in process 0, then in all others, which find the files that it wrote; also if process 0 raised."""
    several = jax.process_count() > 1
    if several and not is_first():
        multihost_utils.sync_global_devices(name)
    try:
        yield
    finally:
        if several and is_first():
            multihost_utils.sync_global_devices(name)


def largest(number: int) -> int:
    """The largest number over all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def gather(value: Any) -> list[Any]:
    """The values of all processes, by process index. A value is anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded_bytes = -(-largest(len(text)) // _CHUNK_BYTES) * _CHUNK_BYTES
    padded = np.full(padded_bytes, ord(" "), np.uint8)  # JSON ignores spaces
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
