"""Signals that ask a run to stop: SIGTERM of a scheduler, SIGINT of a user."""

import signal
import threading

from mmx_jax import distributed


class StopSignals:
    """Context manager: SIGTERM and SIGINT ask for a stop after the running step; a second SIGINT interrupts."""

    def __init__(self):
        self.received = ""
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> str:
        """The name of a signal that some process received, or ""; every process gets the same answer."""
        number = distributed.largest(signal.Signals[self.received] if self.received else 0)
        return signal.Signals(number).name if number else ""

    def _handle(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
