"""Runs programs on 8 CPU devices, in a process of their own: the number of devices is fixed when jax starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def answer_of(module, timeout=600):
    """What `python -m module` prints, as JSON; it has `timeout` seconds."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Compiling is most of the time, and the optimisation of machine code is not what is tested.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
