"""Errors of threads, on the standard error of a command."""

import subprocess
import sys

from tests.support.paths import REPOSITORY

PROGRAM = """
import asyncio, sys, threading
import tensorstore
from mmx_jax.cli import thread_errors

def of_a_given_up_read():
    # As orbax leaves one behind when another fails: the loop that waits for it is closed, and then it ends.
    promise, future = tensorstore.Promise.new()
    loop = asyncio.new_event_loop()
    async def wait(): await future
    async def begin():
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        return task
    tasks.append(loop.run_until_complete(begin()))
    loop.close()
    in_thread(lambda: promise.set_result(1))

def of_python(): in_thread(lambda: 1 / 0)
def of_a_native_thread(): in_thread(lambda: sys.excepthook(ValueError, ValueError("native"), None))
def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

tasks = []
thread_errors.report_in_one_line("prog")
for case in sys.argv[1:]: globals()[case]()
for task in tasks: task._log_destroy_pending = False
raise RuntimeError("of the main thread")
"""


def standard_error(*cases: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *cases], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stderr.splitlines()


def test_errors_of_threads_take_a_line_or_none_and_those_of_the_main_thread_stay():
    lines = standard_error("of_a_given_up_read", "of_python", "of_a_native_thread")
    assert lines[0] == "prog: in the background: ZeroDivisionError: division by zero"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "RuntimeError: of the main thread"
    assert not any("Event loop" in line or "native" in line for line in lines)
