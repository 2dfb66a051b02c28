"""Speed and peak memory of conversion, on a synthetic checkpoint in the released layout.

    python benchmarks/convert_memory.py --gigabytes=8 --folder=/big/disk

The claim: peak resident memory stays under 3 x the largest tensor + 500 MB, whatever the size of the checkpoint. Each
command runs in a process of its own; the peak is ru_maxrss, which counts mapped file pages too. Prints a table, and
one line of JSON last. Exit status 1 where the bound is exceeded or the round trip is not byte-identical.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmx_jax.checkpoints import hf_mapping  # noqa: E402
from mmx_jax.checkpoints.hf_config import model_config_to_hf  # noqa: E402
from mmx_jax.checkpoints.safetensors import TensorSpec, file_order, plan_shards, write_index, write_shard  # noqa: E402
from mmx_jax.config import ModelConfig  # noqa: E402


def synthetic_config(total_bytes: int, largest_bytes: int) -> ModelConfig:
    """Blocks of one lightning and one softmax layer, the embedding of about `largest_bytes`."""
    hidden = 2048 if largest_bytes >= 32 * 10**6 else 1024
    mlp_dim = max(64, largest_bytes // (8 * hidden) // 64 * 64)  # a quarter of the largest tensor, the embedding
    shapes = dict(
        vocab_size=largest_bytes // (2 * hidden) // 64 * 64,
        hidden_size=hidden,
        mlp_dim=mlp_dim,
        num_experts=8,
        num_heads=hidden // 128,
        num_kv_heads=4,
        head_dim=128,
        layer_pattern=("lightning", "softmax"),
    )

    def size(layers):
        mappings = hf_mapping.expand(ModelConfig(num_layers=layers, **shapes))
        return sum(2 * int(np.prod(mapping.hf_shape)) for mapping in mappings)

    block = size(4) - size(2)
    blocks = max(1, round((total_bytes - size(2)) / block) + 1)
    return ModelConfig(num_layers=2 * blocks, **shapes)


def make(folder: Path, config: ModelConfig, shard_size: int) -> list[TensorSpec]:
    """Writes the checkpoint; bytes repeat within a tensor, but no two tensors are the same."""
    folder.mkdir()
    bf16, f32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    specs = [TensorSpec(m.hf, f32 if m.float32 else bf16, m.hf_shape) for m in hf_mapping.expand(config)]
    noise = np.random.default_rng(0).integers(0, 256, 2**20 + 1, np.uint8)

    def tensor(spec, number):
        data = np.resize(np.roll(noise, 977 * number), spec.nbytes)
        return data.view(spec.dtype).reshape(spec.shape)

    numbers = {spec.name: number for number, spec in enumerate(specs)}
    shards = plan_shards(specs, shard_size, "original")
    for file, shard in shards.items():
        write_shard(folder / file, shard, (tensor(spec, numbers[spec.name]) for spec in file_order(shard)))
    if len(shards) > 1:
        write_index(folder / "model.safetensors.index.json", shards)
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config, "original")))
    return specs


def measure(arguments: list[str], total_bytes: int) -> dict[str, float]:
    """Runs one command in a child and reports its own seconds, GB/s and peak resident memory."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        os.execve(sys.executable, [sys.executable, "-m", "mmx_jax.convert", *arguments], environment)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed with status {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - start
    peak = usage.ru_maxrss * 1024 / 1e6
    return {
        "seconds": round(seconds, 2),
        "gigabytes_per_second": round(total_bytes / 1e9 / seconds, 3),
        "peak_megabytes": round(peak, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--largest_megabytes", type=int, default=200)
    parser.add_argument("--shard_megabytes", type=int, default=1000)
    parser.add_argument("--folder", help="where there is room for three copies; default: the temporary folder")
    args = parser.parse_args()
    config = synthetic_config(int(args.gigabytes * 1e9), args.largest_megabytes * 10**6)
    work = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=args.folder))
    try:
        specs = make(work / "source", config, args.shard_megabytes * 10**6)
        total, largest = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
        source, weights, out = (str(work / name) for name in ("source", "weights", "out"))
        result = {
            "gigabytes": round(total / 1e9, 3),
            "tensors": len(specs),
            "largest_megabytes": round(largest / 1e6, 1),
            "bound_megabytes": 3 * round(largest / 1e6, 1) + 500,
            "import": measure(["import", source, weights], total),
            "export": measure(["export", weights, out], total),
            "verify": measure(["verify", source, weights], total),
        }
        files = [file.name for file in Path(source).glob("*.safetensors")]
        result["byte_identical"] = filecmp.cmpfiles(source, out, files, shallow=False)[0] == files
    finally:
        shutil.rmtree(work)
    commands = ("import", "export", "verify")
    print(f"{result['gigabytes']} GB, {len(specs)} tensors, the largest of {result['largest_megabytes']} MB")
    print(f"{'':8}{'seconds':>9}{'GB/s':>8}{'peak MB':>9}   bound {result['bound_megabytes']:.0f} MB")
    for name in commands:
        row = result[name]
        print(f"{name:8}{row['seconds']:9.1f}{row['gigabytes_per_second']:8.2f}{row['peak_megabytes']:9.0f}")
    print(json.dumps(result))
    within = all(result[name]["peak_megabytes"] < result["bound_megabytes"] for name in commands)
    sys.exit(0 if within and result["byte_identical"] else 1)


if __name__ == "__main__":
    main()
