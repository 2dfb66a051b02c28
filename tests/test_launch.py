"""The files of launch/ call train.py with flags that it has, and configs that are there."""

import re
import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY
from tests.support.patience import HANG_SECONDS

FILES = sorted(path for path in (REPOSITORY / "launch").iterdir())


@pytest.fixture(scope="module")
def flags():
    done = subprocess.run(
        [sys.executable, "train.py", "--helpfull"], cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    return set(re.findall(r"^\s+--(?:\[no\])?(\w+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_flags_and_configs_exist(path, flags):
    text = path.read_text()
    assert "config" in flags and "distributed" in flags
    passed = [re.split(r"train\.py|slurm\.sbatch|mmx_jax:\w+", line)[-1] for line in text.splitlines()]
    lines = [line for line in passed if re.search("--(config|workdir|distributed|data|set)\\b", line)]
    assert {name for line in lines for name in re.findall(r"--(\w+)(?=[=\s])", line)} <= flags
    configs = re.findall(r"configs/\w+\.py", text)
    assert configs and all((REPOSITORY / config).is_file() for config in configs)
    for field in re.findall(r"--set[= ]mesh\.(\w+)", text):
        assert field in {"data", "fsdp", "expert", "expert_tensor", "tensor", "seq"}
