"""Runs programs on several CPU devices, in a process of their own: the number of devices is fixed when jax starts."""

import json
import os
import subprocess
import sys

from tests.support.paths import REPOSITORY
from tests.support.patience import HANG_SECONDS


def environment(count):
    """Of a program that sees `count` CPU devices, and compiles as the tests do (conftest.py)."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}


def answer_of(module, count=8):
    """What `python -m module` prints on `count` devices, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module],
        env=environment(count),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
