"""Progress of a conversion: a bar on a terminal, a line now and then otherwise."""

import sys
import time

import rich.progress


class Progress:
    """Counts bytes. `advance` says that so many were converted, or found finished (`skipped`)."""

    LINE_SECONDS = 10

    def __init__(self, title: str, total: int):
        self._title, self._total = title, total
        self._done = self._worked = 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.DownloadColumn(),
                rich.progress.TransferSpeedColumn(),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind, error, traceback):
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, count: int, *, skipped: bool = False) -> None:
        self._done += count
        self._worked += 0 if skipped else count
        if self._bar:
            self._bar.advance(self._task, count)
        elif time.monotonic() - self._last >= self.LINE_SECONDS:
            self._line()

    def _line(self):
        self._last = time.monotonic()
        seconds = self._last - self._start
        rate = self._worked / seconds if seconds else 0.0
        eta = f"{(self._total - self._done) / rate:.0f} s" if rate else "unknown"
        share = 100 * self._done / self._total if self._total else 100.0
        print(
            f"{self._title}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB ({share:.0f} %), "
            f"{rate / 1e9:.2f} GB/s, ETA {eta}",
            file=sys.stderr,
            flush=True,
        )
