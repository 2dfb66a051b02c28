"""The mains as programs: estimates that they print, and flags that they refuse."""

import subprocess
import sys

from tests.support.paths import REPOSITORY


def test_topology_without_dry_run_is_refused():
    command = [sys.executable, "train.py", "--config=configs/debug.py", "--topology=v5e:2x2"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode and "--topology needs --dry_run or --plan" in finished.stderr


def test_plans_are_printed_by_the_command_line():
    flags = ["--config=configs/small_1b.py", "--plan", "--topology=v5e:4x4", "--set=mesh.data=1", "--set=mesh.fsdp=16"]
    for program in ("train.py", "infer.py"):
        batch = ["--set=training.batch_tokens=131072"] if program == "train.py" else ["--batch=16", "--dtype=bfloat16"]
        finished = subprocess.run(
            [sys.executable, program, *flags, *batch], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        assert "memory of one device: parameters " in finished.stdout and "of 15.750 GiB: " in finished.stdout
