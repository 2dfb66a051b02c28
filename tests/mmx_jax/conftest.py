"""Checkpoints that the tests of checkpoints and of conversion share."""

import shutil

import pytest

from mmx_jax.convert import import_hf
from tests.support.checkpoint_files import BF16


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """tiny_bf16, imported once; not to be changed."""
    folder = tmp_path_factory.mktemp("imported") / "weights"
    import_hf.import_checkpoint(BF16, folder)
    return folder


@pytest.fixture
def source(tmp_path):
    """A copy of tiny_bf16 to damage."""
    shutil.copytree(BF16, tmp_path / "source")
    return tmp_path / "source"
