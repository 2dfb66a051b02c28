"""A run folder and an export that were written before the configuration had sections for runtime and monitoring."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import rich.console

import mmx_jax
from mmx_jax import metrics
from mmx_jax.config import SourceConfig
from mmx_jax.config import io as config_io
from mmx_jax.training import run
from tests.support.paths import FIXTURES


@pytest.fixture
def earlier(tmp_path):
    """Folder of run/ (stopped at step 4 of 8), export/, text/ and expected.json, what that version computed."""
    with tarfile.open(FIXTURES / "earlier_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def expected(earlier):
    return json.loads((earlier / "expected.json").read_text())


def test_its_config_is_read_into_the_sections_of_today(earlier):
    config = config_io.config_from_json((earlier / "run/config.json").read_text())
    assert (config.runtime.remat, config.runtime.lightning_chunk, config.runtime.softmax_block) == ("full", 16, 32)
    assert config.runtime.loss_chunk == 64
    assert (config.monitoring.eval_every_steps, config.monitoring.eval_batches) == (2, 1)
    assert (config.data.reading.prefetch, config.data.reading.on_bad_row) == (0, "skip")


def test_the_run_goes_on_as_it_would_have(earlier, expected):
    folder = earlier / "run"
    config = config_io.config_from_json((folder / "config.json").read_text())
    sources = (SourceConfig(path=str(earlier / "text")),)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    out = io.StringIO()
    result = run.train(config, folder, console=rich.console.Console(file=out, width=1000))
    assert result.step == 8 and "RESUMED from step 4" in out.getvalue()
    rows = metrics.read_rows(folder / "metrics.jsonl")
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    held_out = {str(row["step"]): row["eval_loss"] for row in rows if "eval_loss" in row}
    assert held_out == pytest.approx(expected["held_out"], rel=1e-5)


@pytest.mark.parametrize("folder", ["run", "export"])
def test_its_checkpoint_and_its_export_generate_the_same(earlier, expected, folder):
    model = mmx_jax.from_pretrained(earlier / folder)
    np.testing.assert_array_equal(model.generate(expected["prompts"], max_new_tokens=12), expected["greedy"])
    np.testing.assert_allclose(model.score(expected["prompts"]), expected["scores"], rtol=1e-4, atol=1e-5)
