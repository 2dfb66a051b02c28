"""What the processes of one run settle among themselves; all of it is nothing where there is but one process.

Every process must come to each of these calls, in the same order.
"""

import contextlib
import json
import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

_JOIN_SECONDS = 300
_CHUNK_BYTES = 4096  # texts are padded to a multiple, so that few sizes are compiled


def join(address: str):
    """Joins the processes of one run, before anything else asks jax for devices.

    Args:
      address: "auto", or "HOST:PORT,COUNT,INDEX".

    Raises:
      RuntimeError: process 0 is not reached, or nothing says how many processes there are.
    """
    settings = {}
    if address != "auto":
        coordinator, count, index = address.rsplit(",", 2)
        if int(index) > 0:
            _await(coordinator)
        settings = dict(coordinator_address=coordinator, num_processes=int(count), process_id=int(index))
    try:
        jax.distributed.initialize(**settings, initialization_timeout=_JOIN_SECONDS)
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
