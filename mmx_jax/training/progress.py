"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

import time

import rich.console
import rich.progress


class Progress:
    """Shows loss, tokens/s, MFU and the time left. A context manager.

    Args:
      total_tokens: where the run ends; `tokens_seen`: where it starts.
      step: where it starts; `total_steps`: where it ends, shown beside each step; 0: not shown.
      console: a rich console; None: standard output.
      seconds_between_lines: of the plain form; a terminal is redrawn ten times a second.
    """

    def __init__(
        self,
        total_tokens: int,
        tokens_seen: int,
        *,
        step: int = 0,
        total_steps: int = 0,
        console=None,
        seconds_between_lines: float = 5.0,
    ):
        self._console = console or rich.console.Console(highlight=False, soft_wrap=True)
        self._total = total_tokens
        self._of = f"/{total_steps}" if total_steps else ""
        self._seconds_between_lines = seconds_between_lines
        self._last_line = -float("inf")
        self._bar = None
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn(f"step {{task.fields[step]}}{self._of}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_tokens, completed=tokens_seen, step=step, text="compiling")

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def message(self, text: str) -> None:
        """One line that stays, above the bar."""
        self._console.print(text, markup=False)

    def update(
        self, *, step: int, tokens_seen: int, loss: float, tokens_per_second: float | None, mfu: float | None
    ) -> None:
        """Shows the state after `step`; a number that is None is left out."""
        parts = [f"loss {loss:.4f}"]
        if tokens_per_second:
            seconds = (self._total - tokens_seen) / tokens_per_second
            parts += [f"{tokens_per_second:,.0f} tokens/s", f"ETA {format_seconds(seconds)}"]
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=tokens_seen, step=step, text=text)
        elif time.monotonic() - self._last_line >= self._seconds_between_lines or tokens_seen >= self._total:
            self._last_line = time.monotonic()
            self.message(f"step {step}{self._of}  {100 * tokens_seen / self._total:5.1f}%  {text}")


def format_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
