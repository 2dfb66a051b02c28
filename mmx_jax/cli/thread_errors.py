"""Errors of threads, on the standard error of a command whose own errors take one line."""

import sys
import threading


def report_in_one_line(program: str) -> None:
    """Shortens errors of threads to one line from now on: what concerns the run is raised in the main thread too.

    Tensorstore's threads report the reads that a failed one cancels ("Event loop is closed"): these are dropped.
    """
    of_main_thread = sys.excepthook

    def report(failed):
        text = (str(failed.exc_value).strip().splitlines() or [""])[0]
        print(f"{program}: in the background: {failed.exc_type.__name__}: {text[:300]}", file=sys.stderr, flush=True)

    def drop_of_native_threads(kind, error, trace):
        # Python's own threads report to `threading.excepthook`.
        if threading.current_thread() is threading.main_thread():
            of_main_thread(kind, error, trace)

    threading.excepthook = report
    sys.excepthook = drop_of_native_threads
    sys.unraisablehook = lambda failed: None  # destructors and callbacks of what was given up
