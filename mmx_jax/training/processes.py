"""What the processes of one run settle among themselves; all of it is nothing where there is but one process.

Every process must come to each of these calls, in the same order.
"""

import contextlib
import json

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
      RuntimeError: the processes do not find each other, or nothing says how many there are.
    """
    settings = {}
    if address != "auto":
        coordinator, count, index = address.rsplit(",", 2)
        settings = dict(coordinator_address=coordinator, num_processes=int(count), process_id=int(index))
    try:
        jax.distributed.initialize(**settings, initialization_timeout=_JOIN_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"--distributed={address}: the processes of the run did not join within {_JOIN_SECONDS} s; start all of "
            f"them, with one address that all can reach ({str(error).splitlines()[0]})"
        ) from error


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
