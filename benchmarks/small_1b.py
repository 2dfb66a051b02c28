"""Training, prefill and decode of `configs/small_1b.py` on one accelerator.

    python benchmarks/small_1b.py [--json=FILE] [--only=train,unsharded,prefill,decode] [--set a.b=c ...]

Checks the numbers before it times: logits in the compute dtype against float32 on the same device. Times are medians of
whole calls that end in `block_until_ready`; AdamW is part of the training step, which runs on a mesh of one device, and
"unsharded" without any mesh.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmx_jax.config import MeshConfig
from mmx_jax.config import io as config_io
from mmx_jax.models import flops
from mmx_jax.models.cache import init_state
from mmx_jax.models.decoder import Decoder
from mmx_jax.models.params import init_params
from mmx_jax.sharding import make_mesh
from mmx_jax.training import train_step as training_step
from pallas_kernels import platform

CONFIG = Path(__file__).resolve().parent.parent / "configs/small_1b.py"


def median_seconds(function, repeats):
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def random_params(model):
    return jax.jit(lambda key: init_params(model, key))(jax.random.key(0, impl="unsafe_rbg"))


def random_tokens(model, rows, length):
    return np.random.default_rng(0).integers(0, model.vocab_size, (rows, length)).astype(np.int32)


def check_numerics(model):
    """Relative error (root mean square) of the logits of 8 layers in the compute dtype, against float32."""
    model = dataclasses.replace(model, num_layers=8, layer_pattern=model.layer_pattern[:8], param_dtype="float32")
    params, tokens = random_params(model), random_tokens(model, 1, 1024)

    def logits(dtype):
        variant = dataclasses.replace(model, dtype=dtype)
        return np.asarray(jax.jit(lambda p, t: Decoder(variant).apply({"params": p}, t).logits)(params, tokens))

    want = logits("float32")
    return float(np.linalg.norm(logits(model.dtype) - want) / np.linalg.norm(want))


def time_training(config, packed, on_mesh=True):
    """With `on_mesh` the sharded step on a mesh of one device, as train.py runs it; else no mesh and no shardings."""
    rows, length = config.training.batch_tokens // config.training.sequence_length, config.training.sequence_length
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shape = (rows, length)
    segments = np.repeat(np.arange(1, 9, dtype=np.int32), length // 8) if packed else np.ones(length, np.int32)
    batch = {
        "tokens": random_tokens(config.model, *shape),
        "targets": random_tokens(config.model, *shape),
        "segment_ids": np.broadcast_to(segments, shape),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    }
    holder = [training_step.init_state(config, mesh)]
    step = training_step.make_train_step(config, mesh)
    if not on_mesh:
        options = platform.compiler_options()
        step = jax.jit(step.__wrapped__, donate_argnums=0, compiler_options=options)
        holder = [jax.device_put(holder[0], jax.devices()[0])]
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        start = time.perf_counter()
        batch = jax.device_put(batch)
        run = step.lower(holder[0], batch, jnp.float32(1e-4)).compile()
        compile_s = time.perf_counter() - start
        memory = run.memory_analysis()

        def once():
            holder[0], metrics = run(holder[0], batch, jnp.float32(1e-4))
            return metrics["loss"], holder[0]["step"]

        seconds = median_seconds(once, 5)
    return dict(
        tokens_per_s=rows * length / seconds,
        step_s=seconds,
        compile_s=compile_s,
        temp_gb=memory.temp_size_in_bytes / 1e9,
        arguments_gb=memory.argument_size_in_bytes / 1e9,
    )


def time_prefill(model, params, length, chunk):
    """One prompt in chunks of `chunk`; one chunk is a forward pass without cache reads behind it."""
    tokens = random_tokens(model, 1, length)

    def forward(params, tokens, state):
        last = jnp.full(tokens.shape[0], tokens.shape[1] - 1)
        out = Decoder(model).apply({"params": params}, tokens, state=state, last=last)
        return out.logits[:, 0], out.state

    forward = jax.jit(forward, donate_argnums=2)
    empty = jax.jit(lambda: init_state(model, 1, length))

    def once():
        state = empty()
        for start in range(0, length, chunk):
            logits, state = forward(params, tokens[:, start : start + chunk], state)
        return logits

    return length / median_seconds(once, 3)


def time_decode(model, params, batch, steps=32, context=1024):
    tokens = random_tokens(model, batch, context)
    prefill = jax.jit(
        lambda p, t: Decoder(model).apply({"params": p}, t, state=init_state(model, batch, 2048), logits=False).state
    )

    def decode(params, token, state):
        def one(carry, _):
            token, state = carry
            out = Decoder(model).apply({"params": params}, token[:, None], state=state)
            return (jnp.argmax(out.logits[:, -1], -1).astype(jnp.int32), out.state), None

        return jax.lax.scan(one, (token, state), length=steps)[0]

    decode = jax.jit(decode)
    state = prefill(params, tokens)
    return median_seconds(lambda: decode(params, tokens[:, -1], state), 5) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--only", default="train,unsharded,prefill,decode")
    parser.add_argument("--set", action="append", default=[], help="override of the config, as in train.py")
    arguments = parser.parse_args()
    config = config_io.apply_overrides(config_io.load_config(CONFIG), arguments.set)
    model = config.model
    device = jax.devices()[0].device_kind
    results = dict(device=device, jax=jax.__version__, overrides=arguments.set, error=check_numerics(model))
    print(
        f"{device}, jax {jax.__version__}: logits in {model.dtype} are within {results['error']:.2e} of float32",
        flush=True,
    )

    def report(name, **figures):
        results[name] = figures
        print(name, json.dumps({k: v and round(v, 4) for k, v in figures.items()}), flush=True)

    if "train" in arguments.only:
        for packed in (False, True):
            figures = time_training(config, packed)
            figures["mfu"] = flops.mfu(
                figures["tokens_per_s"] * flops.training_flops_per_token(model, config.training.sequence_length),
                device,
                1,
            )
            report("train_packed" if packed else "train", **figures)
    if "unsharded" in arguments.only:
        report("train_unsharded", **time_training(config, packed=True, on_mesh=False))
    model = dataclasses.replace(model, param_dtype=model.dtype)
    params = random_params(model) if {"prefill", "decode"} & set(arguments.only.split(",")) else None
    if "prefill" in arguments.only:
        report("prefill_8k", tokens_per_s=time_prefill(model, params, 8192, 8192))
        report("prefill_131k", tokens_per_s=time_prefill(model, params, 131072, 8192))
    if "decode" in arguments.only:
        for batch in (1, 32):
            seconds = time_decode(model, params, batch)
            report(f"decode_batch_{batch}", step_ms=seconds * 1e3, tokens_per_s=batch / seconds)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
