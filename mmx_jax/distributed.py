"""What the processes of one run settle among themselves; all of it is nothing where there is but one process.

Every process must come to each of these calls, in the same order.
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
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_JOIN_SECONDS = 300
_LOST_SECONDS = 60  # a process that gives no sign of life for so long is lost, and the run with it
_PARTING_SECONDS = 5
_CHUNK_BYTES = 4096  # texts are padded to a multiple, so that few sizes are compiled


class LostProcessError(RuntimeError):
    """Another process of the run is gone, and this one cannot go on; the message says how to continue."""


def join(address: str):
    """Joins the processes of one run, before anything else asks jax for devices.

    Args:
      address: "auto", or "HOST:PORT,COUNT,INDEX".

    Raises:
      RuntimeError: process 0 is not reached, or nothing says how many processes there are.
    """
    settings: dict[str, Any] = {}
    if address != "auto":
        coordinator, count, index = address.rsplit(",", 2)
        if int(index) > 0:
            _await(coordinator)
        settings = dict(coordinator_address=coordinator, num_processes=int(count), process_id=int(index))
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_LOST_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"--distributed={address}: {str(error).splitlines()[0]} Nothing on this machine says which processes "
            "make up the run? Give HOST:PORT,COUNT,INDEX"
        ) from error


def _await(coordinator):
    """Returns once process 0 listens: jax itself ends a process that waits in vain with no more than a stack."""
    host, port = coordinator.rsplit(":", 1)
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"--distributed: process 0 does not answer at {coordinator} after {_JOIN_SECONDS} s ({error}); "
                    "start it too, at an address that this machine reaches"
                ) from error
            time.sleep(0.5)


@contextlib.contextmanager
def together(remedy: Callable[[], str]):
    """While the block runs, a process that must end because another is lost says so, and what to do.

    A collective whose other side has died raises, on some platforms, and waits for ever on others. Then jax, whose
    processes give each other signs of life, ends all of them within `_LOST_SECONDS`: by abort() in a thread of its own,
    where a handler of SIGABRT is the one place left to speak. Its status stays that of an abort.

    Args:
      remedy: called when it has come to that; the end of the message.

    Raises:
      LostProcessError: in place of the error of a collective.
    """
    if jax.process_count() == 1:
        yield
        return
    lost = f"another process of this run has ended or was silent for {_LOST_SECONDS} s (see jax's lines above)"
    with _last_words(lambda: f"{lost}, and so ends this: {remedy()}\n"):
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not _COLLECTIVE_FAILED.search(str(error)):
                raise
            cause = str(error).splitlines()[0]
            raise LostProcessError(
                f"another process of this run has ended or is out of reach ({cause[:300]}): {remedy()}"
            ) from error


# The words of gloo, of NCCL, and of jax's own service between processes.
_COLLECTIVE_FAILED = re.compile(r"gloo|nccl|coordination service|^unavailable|^deadline_exceeded", re.IGNORECASE)


@contextlib.contextmanager
def _last_words(text: Callable[[], str]):
    """Writes to standard error, should the process be aborted while the block runs.

    By ctypes, for handlers of the signal module run in the main thread, which an abort does not wait for. It needs the
    GIL, which a thread that waits for devices or for other processes has given up.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def speak(number):
        libc.signal(number, None)  # SIG_DFL, which ends the process once this returns
        os.write(2, text().encode())

    previous = libc.signal(signal.SIGABRT, ctypes.cast(speak, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)


def leave(message: str, *, lost: bool):
    """Ends this process with status 1, without waiting for others that wait for it.

    Those that fail alike come here within seconds, and part in order; not if one is `lost`.
    """
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # Not an orderly exit: unfinished reads and writes of orbax would bury the message under their tracebacks.
    if jax.distributed.is_initialized() and not lost:
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING_SECONDS)
    os._exit(1)


def is_first() -> bool:
    """Whether this process writes what the run has but one of."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others(name: str):
    """Runs the block in process 0, then, even if that raised, in all others: they find the files that it wrote."""
    several = jax.process_count() > 1
    if several and not is_first():
        multihost_utils.sync_global_devices(name)
    try:
        yield
    finally:
        if several and is_first():
            multihost_utils.sync_global_devices(name)


def largest(number: int) -> int:
    """The largest of the numbers of all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def gather(value) -> list:
    """The JSON values of all processes, by process index."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    room = -(-largest(len(text)) // _CHUNK_BYTES) * _CHUNK_BYTES
    padded = np.full(room, ord(" "), np.uint8)  # which JSON ignores
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
