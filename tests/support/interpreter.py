"""Runs Mosaic GPU kernels in their interpreter on the CPU.

It runs the thread groups of a program as callbacks that wait for each other, so it needs more threads than a small
machine gives; a process with as many of them as NPROC says computes all cases and hands them back.
"""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu_common
from tests.support.patience import HANG_SECONDS

needed = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter is in jax 0.11")


def arrays_of(module, folder) -> dict[str, np.ndarray]:
    """The arrays that `python -m module PATH` writes to PATH, an npz file."""
    path = folder / "results.npz"
    command = [sys.executable, "-W", "error::DeprecationWarning:pallas_kernels", "-m", module, path]
    environment = os.environ | {"NPROC": str(mosaic_gpu_common.INTERPRETER_THREADS), "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert finished.returncode == 0, finished.stderr
    return dict(np.load(path))
