"""Attention and a small model with the tokens of rows divided over CPU devices; prints what was found as JSON.

A program of its own, because the number of devices is fixed when jax starts; tests/test_sequence.py runs it.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mmx_jax.parallel import sequence
from tests import oracles

BATCH, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 4, 32
SLOPES = np.array([0.917, 0.25, 0.05, 0.004], np.float32)
# Devices of 4, 8, 16 or 32 tokens. Row 0: a document over several devices of 4, one that ends at a border of 16, one
# that ends inside. Row 1: one device of 8 holds padding alone, inside a document and before the first one.
SEGMENTS = np.array(
    [[1] * 14 + [2] * 2 + [3] * 3 + [1] * 10 + [0] * 3, [0] * 9 + [1] * 5 + [0] * 10 + [1] * 6 + [4] * 2], np.int32
)


def collectives(compiled) -> dict[str, list[int]]:
    """Kind of collective -> sorted bytes of the results of each one in the program; bodies of loops count once."""
    found = {}
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    for line in compiled.as_text().splitlines():
        match = re.search(
            r"= \(?(\w+)\[([\d,]*)\][^=]* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(",
            line,
        )
        if match:
            count = int(np.prod([int(n) for n in match[2].split(",") if n]))
            found.setdefault(match[3], []).append(count * sizes[match[1]])
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def divided(f, devices, specs, out_specs):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("seq",))
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


def lightning_case(devices, method, packed, with_state, length=LENGTH):
    """A jitted function (q, k, v, state) -> (results, gradients), and its arguments."""
    from pallas_kernels.lightning_attention import document_runs

    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, BATCH, length, HEADS * DIM)).astype(np.float32)
    state, d_state = rng.normal(size=(2, BATCH, HEADS, DIM, DIM)).astype(np.float32)
    weight = rng.normal(size=tokens.shape[1:]).astype(np.float32)
    rows = P(None, "seq")
    attend = divided(
        functools.partial(sequence.lightning_attention, method=method, chunk_size=4),
        devices, (rows, rows, rows, P(), rows, P()), (rows, P()),
    )  # fmt: skip

    def loss(q, k, v, state):
        runs = document_runs(jnp.asarray(SEGMENTS)) if packed else None
        output, final = attend(q, k, v, jnp.asarray(SLOPES), runs, state)
        return jnp.sum(output * weight) + (0 if final is None else jnp.sum(final * d_state)), (output, final)

    wanted = (0, 1, 2, 3) if with_state else (0, 1, 2)
    run = jax.jit(jax.value_and_grad(loss, argnums=wanted, has_aux=True))
    return run, (*tokens, state if with_state else None)
