"""How long a test waits for a process. A busy machine may take any time: this only ends what would hang for ever."""

import time
from collections.abc import Callable

HANG_SECONDS = 3600


def wait_until(happened: Callable[[], bool], alive: Callable[[], bool] = lambda: True):
    """Returns when `happened()`; fails where what it waits for ended before that, or hangs."""
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert alive(), "what this waits for has ended"
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.05)
