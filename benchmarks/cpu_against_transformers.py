"""Training step, prefill and decode on the CPU, beside transformers' MiniMax holding the same weights.

    python benchmarks/cpu_against_transformers.py [--model=debug|wide] [--json=FILE]

Needs the `parity` extra. Both sides run in float32 with two threads, each in a process of its own, and take turns, so
that a machine that slows down slows both; the medians are reported, after their logits have been compared.
"debug" is the model of `make demo`, where what lies between the products counts; "wide" has four times its width and
mostly measures the matrix products of both libraries. They rotate all of their head dimensions, because stock
transformers cannot do otherwise. Both processes may use huge pages (see BUILD.md) unless GLIBC_TUNABLES says else.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mmx_jax.checkpoints.load import save_huggingface
from mmx_jax.config import Config, MeshConfig, ModelConfig, RuntimeConfig, TrainingConfig
from mmx_jax.config import io as config_io
from mmx_jax.models.cache import init_state
from mmx_jax.models.decoder import Decoder
from mmx_jax.models.params import init_params
from mmx_jax.sharding import make_mesh
from mmx_jax.training import train_step as training_step
from pallas_kernels import platform

WIDE = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=64,
    mlp_dim=768,
    num_experts=8,
    experts_per_token=2,
    max_position_embeddings=16384,
    dtype="float32",
)
_demo = config_io.load_config(Path(__file__).resolve().parent.parent / "configs/debug.py")
DEBUG = _demo.training
DEBUG_MODEL = dataclasses.replace(_demo.model, rotary_dim=_demo.model.head_dim)


class Case(NamedTuple):
    model: ModelConfig
    runtime: RuntimeConfig
    rows: int  # of the training step
    length: int


CASES = {
    "debug": Case(
        DEBUG_MODEL, _demo.runtime, rows=DEBUG.batch_tokens // DEBUG.sequence_length, length=DEBUG.sequence_length
    ),
    "wide": Case(WIDE, RuntimeConfig(lightning_chunk=64, softmax_block=256), rows=2, length=1024),
}
PREFILL, DECODE_STEPS, COMPARED = 4096, 32, 300
TURNS, RUNS = 4, 2


def serve(connection, make):
    """The loop of a process: answers "logits" with an array, other names with the seconds of one run."""
    runs = make()
    while (name := connection.recv()) is not None:
        start = time.perf_counter()
        answer = runs[name]()
        connection.send(time.perf_counter() - start if answer is None else answer)


def ask(connection, name):
    connection.send(name)
    return connection.recv()


def race(mine, other, name):
    """Median seconds of both, in turn. A turn begins with a run that does not count: the side has idled until then."""
    seconds = [], []
    for _ in range(TURNS):
        for connection, found in zip((mine, other), seconds, strict=True):
            found += [ask(connection, name) for _ in range(1 + RUNS)][1:]
    return [statistics.median(found) for found in seconds]


def random_tokens(model, rows, length):
    return np.random.default_rng(0).integers(0, model.vocab_size, (rows, length)).astype(np.int32)


def random_params(model):
    return jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


def our_runs(case):
    params, prompt = random_params(case.model), random_tokens(case.model, 1, PREFILL)
    logits = jax.jit(lambda p, t: Decoder(case.model, case.runtime).apply({"params": p}, t).logits)
    prefill, decode = our_inference(case, params, prompt)
    return {
        "logits": lambda: np.asarray(logits(params, prompt[:, :COMPARED])),
        "prefill": prefill,
        "decode": decode,
        "train": our_train_step(case, random_tokens(case.model, case.rows, case.length)),
    }


def peer_runs(case, folder):
    torch.set_num_threads(2)
    peer = transformers.MiniMaxForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = random_tokens(case.model, 1, PREFILL)
    prefill, decode = peer_inference(peer, prompt)

    @torch.no_grad()
    def logits():
        return peer(torch.tensor(prompt[:, :COMPARED], dtype=torch.long)).logits.numpy()

    train = peer_train_step(peer, random_tokens(case.model, case.rows, case.length))
    return {"logits": logits, "prefill": prefill, "decode": decode, "train": train}


def our_train_step(case, tokens):
    rows, length = tokens.shape
    config = Config(
        model=case.model,
        runtime=case.runtime,
        training=TrainingConfig(sequence_length=length, batch_tokens=rows * length, z_loss_coef=0.0),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = training_step.init_state(config, mesh)
        run = training_step.make_train_step(config, mesh)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    }
    holder = [state]

    def once():
        with jax.set_mesh(mesh):
            holder[0], metrics = run(holder[0], batch, np.float32(1e-4))
            jax.block_until_ready((holder[0], metrics))

    return once


def peer_train_step(peer, tokens):
    ids = torch.tensor(tokens, dtype=torch.long)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def once():
        peer.train()
        loss = peer(ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def our_inference(case, params, prompt):
    model = Decoder(case.model, case.runtime)

    @functools.partial(jax.jit, compiler_options=platform.compiler_options())
    def prefill(params, tokens):
        state = init_state(case.model, 1, PREFILL + 64)
        last = jnp.full(1, PREFILL - 1)
        out = model.apply({"params": params}, tokens, state=state, last=last)
        return jnp.argmax(out.logits[:, 0], -1), out.state

    def decode(params, token, state):
        def one(carry, _):
            token, state = carry
            out = model.apply({"params": params}, token[:, None], state=state)
            return (jnp.argmax(out.logits[:, -1], -1).astype(jnp.int32), out.state), None

        return jax.lax.scan(one, (token, state), length=DECODE_STEPS)[0]

    decode = jax.jit(decode)
    token, state = prefill(params, prompt)

    def run_prefill():
        jax.block_until_ready(prefill(params, prompt))

    def run_decode():
        jax.block_until_ready(decode(params, token.astype(jnp.int32), state))

    return run_prefill, run_decode


def peer_inference(peer, prompt):
    ids = torch.tensor(prompt, dtype=torch.long)

    @torch.no_grad()
    def prefill():
        peer.eval()
        peer(ids, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode():
        peer.eval()
        out = peer(ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        for i in range(DECODE_STEPS):
            position = torch.tensor([[PREFILL + i]])
            out = peer(token, past_key_values=cache, position_ids=position, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - start

    return prefill, decode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="debug")
    parser.add_argument("--json", help="write the figures there")
    arguments = parser.parse_args()
    case = CASES[arguments.model]
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read when a process starts
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(random_params(case.model), case.model, folder + "/model", naming="transformers")
        sides = []
        for make in (functools.partial(our_runs, case), functools.partial(peer_runs, case, folder + "/model")):
            connection, far_end = context.Pipe()
            context.Process(target=serve, args=(far_end, make), daemon=True).start()
            far_end.close()  # held open here, the end of a process that fails would not be noticed
            sides.append(connection)
        ours, theirs = (ask(side, "logits") for side in sides)
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert difference < 1e-4, difference
    counts = {"prefill": PREFILL, "decode": DECODE_STEPS, "train": case.rows * case.length}
    rows = {name: (*race(*sides, name), count) for name, count in counts.items()}
    for side in sides:
        side.send(None)
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{arguments.model}, {versions}, 2 threads, float32, GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}")
    print(f"logits differ by {difference:.1e} of their maximum")
    print(f"{'':8}  {'mmx_jax tok/s':>14}  {'transformers tok/s':>18}  {'ratio':>6}")
    for name, (mine, other, count) in rows.items():
        print(f"{name:8}  {count / mine:14,.1f}  {count / other:18,.1f}  {other / mine:6.2f}")
    if arguments.json:
        figures = {name: dict(mmx_jax_s=a, transformers_s=b, tokens=n) for name, (a, b, n) in rows.items()}
        with open(arguments.json, "w") as file:
            json.dump(dict(figures, logits_difference=difference, model=dataclasses.asdict(case.model)), file, indent=2)


if __name__ == "__main__":
    main()
