"""Progress of long work: a live bar on a terminal, plain lines now and then elsewhere."""

import time
from typing import Any, Self

import rich.console
import rich.progress


class _Progress:
    """A bar or lines. A context manager.

    Args:
      total: amount of work; `done`: how much of it is finished at the start.
      columns: of the bar; `fields`: first values of the fields that they show.
      seconds_between_lines: of the plain form; a terminal is redrawn ten times a second.
    """

    def __init__(
        self,
        console: rich.console.Console,
        columns: list[rich.progress.ProgressColumn],
        *,
        total: int,
        done: int = 0,
        seconds_between_lines: float,
        **fields: Any,
    ):
        self._console, self._total = console, total
        self._seconds_between_lines = seconds_between_lines
        self._last_line = -float("inf")
        self._bar = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total, completed=done, **fields)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._bar is not None:
            self._bar.stop()

    def message(self, text: str) -> None:
        """Prints one line that stays, above the bar."""
        self._console.print(text, markup=False)

    def _show(self, done: int, line: str, *, always: bool = False, **fields: Any) -> None:
        """Updates the bar; or prints `line`, if the last one is old enough or `always`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, **fields)
        elif always or time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._last_line = time.monotonic()
            self.message(line)


class TrainingProgress(_Progress):
    """Loss, tokens/s, MFU and the time left of a run.

    Args:
      total_tokens: where the run ends; `tokens_seen`: where it starts.
      step: where it starts; `total_steps`: where it ends, shown after each step; 0: not shown.
      console: a rich console; None: standard output.
    """

    def __init__(
        self,
        total_tokens: int,
        tokens_seen: int,
        *,
        step: int = 0,
        total_steps: int = 0,
        console: rich.console.Console | None = None,
        seconds_between_lines: float = 5.0,
    ):
        self._of = f"/{total_steps}" if total_steps else ""
        columns = [
            rich.progress.TextColumn(f"step {{task.fields[step]}}{self._of}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
        ]
        super().__init__(
            console or rich.console.Console(highlight=False, soft_wrap=True),
            columns,
            total=total_tokens,
            done=tokens_seen,
            seconds_between_lines=seconds_between_lines,
            step=step,
            text="compiling",
        )

    def update(
        self, *, step: int, tokens_seen: int, loss: float, tokens_per_second: float | None, mfu: float | None
    ) -> None:
        """Shows the state after `step`; a number that is None is omitted."""
        parts = [f"loss {loss:.4f}"]
        if tokens_per_second:
            seconds = (self._total - tokens_seen) / tokens_per_second
            parts += [f"{tokens_per_second:,.0f} tokens/s", f"ETA {format_seconds(seconds)}"]
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        text = "  ".join(parts)
        line = f"step {step}{self._of}  {100 * tokens_seen / self._total:5.1f}%  {text}"
        self._show(tokens_seen, line, always=tokens_seen >= self._total, step=step, text=text)


class ConversionProgress(_Progress):
    """Bytes that a conversion has written or found written, and the time left; on standard error.

    Args:
      title: what runs, such as "import".
      total: bytes of the whole.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        console: rich.console.Console | None = None,
        seconds_between_lines: float = 10.0,
    ):
        columns = [
            rich.progress.TextColumn(title),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
        ]
        super().__init__(
            console or rich.console.Console(stderr=True, highlight=False, soft_wrap=True),
            columns,
            total=total,
            seconds_between_lines=seconds_between_lines,
        )
        self._title = title
        self._done = self._worked = 0
        self._start = self._last_line = time.monotonic()

    def __exit__(self, kind, error, traceback) -> None:
        super().__exit__(kind, error, traceback)
        if kind is None and self._bar is None:
            self._show(self._done, self._line(), always=True)

    def advance(self, count: int, *, skipped: bool = False) -> None:
        """Adds `count` bytes: converted now, or `skipped` because they were converted before."""
        self._done += count
        self._worked += 0 if skipped else count
        self._show(self._done, self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        rate = self._worked / seconds if seconds else 0.0
        eta = format_seconds((self._total - self._done) / rate) if rate else "unknown"
        share = 100 * self._done / self._total if self._total else 100.0
        return (
            f"{self._title}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB ({share:.0f} %), "
            f"{rate / 1e9:.2f} GB/s, ETA {eta}"
        )


def format_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
