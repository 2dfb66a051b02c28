"""Loading parameters, whole or a process's own shards; exporting arrays in memory and training runs."""

import json
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.load import load_params, resolve, save_huggingface
from mmx_jax.cli import convert as cli
from mmx_jax.config import Config
from mmx_jax.config.io import config_to_json
from mmx_jax.convert import import_hf
from tests.support import fake_devices
from tests.support.checkpoint_files import (
    BF16,
    ORIGINAL,
    assert_same,
    expected_parameters,
    flat,
    hf_config,
    read_all,
    verify,
)
from tests.support.paths import REPOSITORY


@pytest.mark.parametrize("kind", ["huggingface", "weights"])
def test_load_params(imported, kind):
    path = BF16 if kind == "huggingface" else imported
    assert resolve(path).kind == kind
    expected = expected_parameters(read_all(BF16), resolve(path).config)
    config, params = load_params(path)
    assert config.param_dtype == "bfloat16"
    assert_same(flat(params), expected)
    config, params = load_params(path, param_dtype="float32")
    assert config.param_dtype == "float32"
    assert_same(flat(params), {name: array.astype(np.float32) for name, array in expected.items()})
    with pytest.raises(ConversionError, match="param_dtype='int8'"):
        load_params(path, param_dtype="int8")


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mmx_jax.config import MeshConfig
from mmx_jax.checkpoints import hf_mapping, load
from mmx_jax.checkpoints.orbax_slices import flatten, unflatten
from mmx_jax.sharding import make_mesh

hf, ours = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
_, whole = load.load_params(hf)
names = {"embedding": P("tensor", "fsdp"), "qkv": P(None, "fsdp", None, "tensor"), "down": P(None, "fsdp", "tensor")}
places = {path: NamedSharding(mesh, names.get(path[-1], P())) for path in flatten(whole)}
mesh4 = make_mesh(MeshConfig(fsdp=4, tensor=2), devices=jax.devices())
for path in (hf, ours):
    _, params = load.load_params(path, mesh=mesh4)
    for leaf, expected in flatten(whole).items():
        got = flatten(params)[leaf]
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), leaf
    assert not flatten(params)["blocks", "layer_0", "mlp", "down"].sharding.is_fully_replicated
    _, params = load.load_params(path, shardings=unflatten(places))
    for leaf, expected in flatten(whole).items():
        got = flatten(params)[leaf]
        assert got.sharding.is_equivalent_to(places[leaf], got.ndim), leaf
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), leaf

# One process of several: only the slices of its own shards are touched.
tensors = load.HuggingFaceTensors(load.resolve(hf))
leaf = ("blocks", "layer_0", "mlp", "down")
slices = {m.index: m for m in tensors.mappings if m.leaf == leaf}
shape = hf_mapping.leaf_shapes(tensors.config, tensors.mappings)[leaf]
opened = []
class Entries(dict):
    def __getitem__(self, name):
        opened.append(name)
        return tensors.folder.entries[name]
read = load._ShardReader(tensors, slices, shape, np.asarray(flatten(whole)[leaf]).dtype)
read._entries = Entries()
region = (slice(None), slice(1, 2), slice(0, 48), slice(None))
assert read(region).tobytes() == np.asarray(flatten(whole)[leaf])[region].tobytes()
assert opened == ["model.layers.0.block_sparse_moe.experts.1.w2.weight"], opened
print("sharded equals whole")
"""


def test_import_onto_a_mesh_reads_only_its_shards(imported):
    process = subprocess.run(
        [sys.executable, "-c", SHARDED, str(BF16), str(imported)],
        cwd=REPOSITORY,
        env=fake_devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert process.stdout == "sharded equals whole\n", process.stderr[-2000:]


def test_arrays_in_memory_are_exported(imported, tmp_path):
    config, params = load_params(imported)
    save_huggingface(params, config, tmp_path / "out", "transformers", shard_size=10**6)
    assert_same(read_all(tmp_path / "out"), read_all(BF16))
    assert hf_config(tmp_path / "out")["dtype"] == "bfloat16"
    with pytest.raises(ConversionError, match="exists already"):
        save_huggingface(params, config, tmp_path / "out")
    del params["lm_head"]
    with pytest.raises(ConversionError, match="lm_head/kernel"):
        save_huggingface(params, config, tmp_path / "out2")


def test_training_run_is_exported_from_its_newest_step(tmp_path, capsys):
    config, params = load_params(ORIGINAL)
    run = tmp_path / "run"
    for step, values in ((5, jax.tree.map(lambda leaf: leaf * 0, params)), (10, params)):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(run.absolute() / "checkpoints" / str(step) / "params", values)
    whole = import_hf.whole_config("run", config)
    assert isinstance(whole, Config)
    (run / "config.json").write_text(config_to_json(whole))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert resolve(run).kind == "run"
    assert cli.main(["mmx-convert", "export", str(run), str(tmp_path / "out"), "--dtype=keep"]) == 0
    assert_same(read_all(tmp_path / "out"), read_all(ORIGINAL))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert verify(run, tmp_path / "out")[0]
    assert not verify(run / "checkpoints" / "5", tmp_path / "out")[0]
    with pytest.raises(ConversionError, match="already a checkpoint of ours"):
        import_hf.import_checkpoint(run, tmp_path / "again")


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A checkpoint of 1 GB in tensors of 16 MB, measured as benchmarks/convert_memory.py does for 8 GB."""
    script = REPOSITORY / "benchmarks" / "convert_memory.py"
    process = subprocess.run(
        [sys.executable, script, "--gigabytes=0.6", f"--folder={tmp_path}", "--largest_megabytes=16"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout.splitlines()[-1])
    for command in ("import", "export", "verify"):
        assert result[command]["peak_megabytes"] < result["bound_megabytes"] == 3 * result["largest_megabytes"] + 500
