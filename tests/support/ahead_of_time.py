"""Compiles for TPUs that are not there, in a process of its own, for libtpu reads its environment when it is loaded."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


def each(topologies, *, subset):
    """Parameters of a test, marked for .ci/run where they are `subset`, and for `make topology` (pyproject.toml)."""
    marks = {True: pytest.mark.topology_subset, False: pytest.mark.topology}
    return [pytest.param(topology, marks=marks[topology == subset]) for topology in topologies]


def answer_of(module, topology):
    """What `python -m module TOPOLOGY` prints last, as JSON."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing compiles for TPU here")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask which chips this host has
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # nothing but a chip can load a cached program
    }
    command = [sys.executable, "-W", "error", "-m", module, topology]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
