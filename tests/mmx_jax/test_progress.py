"""Progress of training and of conversion, on a terminal and in lines."""

import io
import time

import pytest
import rich.console

from mmx_jax import progress
from mmx_jax.progress import ConversionProgress, TrainingProgress

on_a_terminal_or_not = pytest.mark.parametrize("terminal", [True, False])


def make_console(terminal: bool) -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


@on_a_terminal_or_not
def test_training_says_the_same_on_a_terminal_and_in_lines(terminal):
    console = make_console(terminal)
    with TrainingProgress(1000, 0, console=console) as shown:
        shown.message("[not markup]")
        shown.update(step=1, tokens_seen=100, loss=2.0, tokens_per_second=None, mfu=None)
        shown.update(step=10, tokens_seen=1000, loss=1.25, tokens_per_second=1234.5, mfu=0.5)
    text = console.file.getvalue()
    for part in ("[not markup]", "step 10", "loss 1.2500", "1,234 tokens/s", "ETA 0:00:00", "MFU 50.0%"):
        assert part in text
    assert ("\x1b[" in text) == terminal


@on_a_terminal_or_not
def test_training_counts_toward_the_step_where_the_run_ends(terminal):
    console = make_console(terminal)
    with TrainingProgress(900, 300, step=3, total_steps=6, console=console) as shown:
        shown.update(step=6, tokens_seen=900, loss=2.0, tokens_per_second=100.0, mfu=None)
    text = console.file.getvalue()
    assert "step 6/6" in text and "100" in text and "ETA 0:00:00" in text


def test_training_prints_lines_at_intervals_and_always_the_last(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = make_console(False)
    with TrainingProgress(1000, 0, console=console, seconds_between_lines=5.0) as shown:
        for step in range(1, 11):
            now[0] += 2.0
            shown.update(step=step, tokens_seen=100 * step, loss=1.0, tokens_per_second=None, mfu=None)
    assert [line.split()[1] for line in console.file.getvalue().splitlines()] == ["1", "4", "7", "10"]


def test_conversion_takes_its_rate_from_what_it_converted_now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = make_console(False)
    with ConversionProgress("import", 10**10, console=console, seconds_between_lines=10.0) as shown:
        shown.advance(4 * 10**9, skipped=True)
        now[0] += 10.0
        shown.advance(10**9)
        now[0] += 9.0
        shown.advance(10**9)  # too early for a line
        now[0] += 1.0
    assert console.file.getvalue().splitlines() == [
        "import: 5.00 of 10.00 GB (50 %), 0.10 GB/s, ETA 0:00:50",
        "import: 6.00 of 10.00 GB (60 %), 0.10 GB/s, ETA 0:00:40",
    ]


def test_conversion_shows_a_bar_on_a_terminal():
    console = make_console(True)
    with ConversionProgress("export", 2_000, console=console) as shown:
        shown.advance(1_000)
        shown.advance(1_000)
    text = console.file.getvalue()
    assert "export" in text and "2.0/2.0 kB" in text and "\x1b[" in text


def test_a_failed_conversion_prints_no_last_line():
    console = make_console(False)
    with pytest.raises(RuntimeError), ConversionProgress("export", 10, console=console):
        raise RuntimeError("stop")
    assert not console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (3723, "1:02:03"), (10**6, "277:46:40")]
)
def test_hours_minutes_seconds(seconds, text):
    assert progress.format_seconds(seconds) == text
