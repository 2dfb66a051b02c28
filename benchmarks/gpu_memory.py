"""Memory of `configs/small_1b.py` and of variants of it on one GPU: planned, compiled, and used.

    python benchmarks/gpu_memory.py [--json=FILE] [--only="NAME;..."] [--compile_only] [--parallel=N]

Three figures a program. "planned" is what `--plan` says of the device at hand; "compiled" is the peak of
`memory_analysis()`; "used" is the allocator's highest `peak_bytes_in_use` while three training steps run, which need
the card alone (`--parallel=1`). XLA recomputes to stay within the memory that the process may take: with
`XLA_FLAGS=--xla_gpu_memory_limit_slop_factor=300` it does not.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
CONFIG = REPOSITORY / "configs/small_1b.py"
RESULT = "RESULT "

# name -> overrides of the config. Rows have 8,192 tokens where nothing else is said.
TRAINING = {
    "2 rows, nothing recomputed": (),
    "2 rows, remat=dots": ("runtime.remat=dots",),
    "2 rows, remat=attention_out": ("runtime.remat=attention_out",),
    "2 rows, remat=full": ("runtime.remat=full",),
    "1 row, nothing recomputed": ("training.batch_tokens=8192",),
    "4 rows, remat=dots": ("runtime.remat=dots", "training.batch_tokens=32768"),
    "8 rows, remat=full": ("runtime.remat=full", "training.batch_tokens=65536"),
    "8 rows in micro-batches of 2, remat=full": (
        "runtime.remat=full",
        "training.batch_tokens=65536",
        "training.microbatch_rows=2",
    ),
    "8 rows of 2048 tokens, nothing recomputed": ("training.sequence_length=2048",),
    "hidden size 1024, 4 rows, nothing recomputed": ("model.hidden_size=1024", "training.batch_tokens=32768"),
    "two blocks of 8 layers, 2 rows, remat=full": (
        "runtime.remat=full",
        "model.layer_pattern=" + ",".join(["lightning"] * 7 + ["softmax"]),
    ),
    "dense, width 8448, 2 rows, nothing recomputed": (
        "model.num_experts=1",
        "model.experts_per_token=1",
        "model.mlp_dim=8448",
    ),
}
# name -> (sequences, tokens of each prompt, context, tokens of a piece)
INFERENCE = {
    "prompt of 8,192 in one piece": (1, 8192, 8192, 8192),
    "prompt of 131,072 in pieces of 8,192": (1, 131072, 131072, 8192),
    "32 sequences of 8,192": (32, 8192, 8192, 1024),
}


def load(overrides):
    from mmx_jax.config import io as config_io

    return config_io.apply_overrides(config_io.load_config(CONFIG), overrides)


def compiled_bytes(program) -> dict:
    from mmx_jax.analysis import aot

    memory = program.memory_analysis()
    return {
        "compiled": aot.peak_bytes(memory),
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def training_child(name, compile_only):
    """Compiles, then runs three steps."""
    import jax
    import numpy as np

    from mmx_jax import sharding
    from mmx_jax.analysis import aot_training, plan
    from mmx_jax.data import device_batch
    from mmx_jax.training import train_step

    config = load(TRAINING[name])
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    planned = plan.training_plan(config)[0]
    result = {"program": name, "planned": planned.peak, "planned parts": dict(planned.memory)}
    with jax.set_mesh(mesh):
        step = aot_training.lower_step(config, mesh).compile()
        result |= compiled_bytes(step)
        if compile_only:
            print(RESULT + json.dumps(result), flush=True)
            return
        length = config.training.sequence_length
        rows = config.training.batch_tokens // length
        draw = np.random.default_rng(0)
        tokens = draw.integers(0, config.model.vocab_size, (2, rows, length)).astype(np.int32)
        segments = np.broadcast_to(np.repeat(np.arange(1, 9, dtype=np.int32), length // 8), (rows, length))
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        batch = dict(tokens=tokens[0], targets=tokens[1], segment_ids=segments, positions=positions)
        batch = jax.device_put(batch, device_batch.batch_sharding(mesh))
        device = jax.devices()[0]
        try:
            state = train_step.init_state(config, mesh)
            jax.block_until_ready(state)
            result["used by init"] = device.memory_stats()["peak_bytes_in_use"]
            for _ in range(3):
                state, metrics = step(state, batch, np.float32(1e-4))
            result["loss"] = float(metrics["loss"])
            result["used"] = device.memory_stats()["peak_bytes_in_use"]
        except jax.errors.JaxRuntimeError as error:
            result["error"] = str(error).splitlines()[0][:300]
    print(RESULT + json.dumps(result), flush=True)


def inference_child(name, compile_only):
    """Compiles the largest piece of a prompt and a decoding step; nothing is run."""
    import jax

    from mmx_jax import sharding
    from mmx_jax.analysis import aot_inference, plan
    from mmx_jax.analysis.workload import InferenceWorkload
    from mmx_jax.inference import generate

    batch, prompt, context, chunk = INFERENCE[name]
    workload = InferenceWorkload(
        dtype="bfloat16", batch=batch, prompt_length=prompt, context=context, prefill_chunk=chunk
    )
    config = load(())
    decoder = generate.inference_decoder(config.model, workload.dtype, config.runtime)
    model = decoder.config
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    bucket, cache_len = max(workload.pieces), workload.cache_len
    params = aot_inference.abstract_params(model, mesh)
    state = aot_inference.abstract_state(model, mesh, batch, cache_len)
    with jax.set_mesh(mesh):
        piece = compiled_bytes(aot_inference.lower_prefill(decoder, mesh, params, state, bucket).compile())
        step = compiled_bytes(aot_inference.lower_decode(decoder, mesh, params, state).compile())
    for unit, length, found in (("a piece", bucket, piece), ("a decoding step", 1, step)):
        planned = plan.inference(
            decoder,
            dict(mesh.shape),
            batch=batch,
            length=length,
            cache_len=cache_len,
            platform=jax.devices()[0].platform,
        )
        parts = {"planned": planned.peak, "planned parts": dict(planned.memory)}
        print(RESULT + json.dumps({"program": f"{name}: {unit}"} | parts | found), flush=True)


def device_line() -> str:
    code = "import jax; d = jax.devices()[0]; print(d.device_kind, jax.__version__, d.memory_stats()['bytes_limit'])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def measure(name, compile_only) -> list[dict]:
    """Rows of one program, measured in a process of its own."""
    began = time.monotonic()
    command = [sys.executable, __file__, f"--child={name}", *["--compile_only"] * compile_only]
    process = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line[len(RESULT) :]) for line in process.stdout.splitlines() if line.startswith(RESULT)]
    rows = rows or [{"program": name, "error": process.stderr[-400:]}]
    for row in rows:
        row["seconds"] = time.monotonic() - began
        shown = {key: f"{row[key] / 2**30:.2f}" for key in ("planned", "compiled", "temporaries", "used") if key in row}
        print(f"{row['program']:<50} {shown} {row['seconds']:.0f} s {row.get('error', '')}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--only", default="")
    parser.add_argument("--compile_only", action="store_true")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if name := arguments.child:
        (training_child if name in TRAINING else inference_child)(name, arguments.compile_only)
        return
    results = {"device": device_line(), "flags": os.environ.get("XLA_FLAGS", ""), "programs": []}
    print(results["device"], flush=True)
    names = [n for n in (*TRAINING, *INFERENCE) if not arguments.only or n in arguments.only.split(";")]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        futures = [pool.submit(measure, name, arguments.compile_only) for name in names]
        for future in as_completed(futures):
            results["programs"] += future.result()
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
