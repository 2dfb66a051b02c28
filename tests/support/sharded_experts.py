"""Runs a mixture of experts on 8 CPU devices under several meshes and prints what came of it, as JSON.

A program of its own, because the number of devices is fixed when jax starts;
tests/mmx_jax/parallel/test_expert_parallel.py runs it.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.config import ConfigError, MeshConfig, ModelConfig, RuntimeConfig
from mmx_jax.layers.moe import MixtureOfExperts
from mmx_jax.sharding import axes_size, logical_to_spec, make_mesh, mesh_axes
from tests.support import oracles

EMBED, INNER, EXPERTS = 8, 12, 8
MESHES = {
    "expert=8": dict(expert=8),
    "expert=4 expert_tensor=2": dict(expert=4, expert_tensor=2),
    "expert=2 tensor=2 expert_tensor=2": dict(expert=2, tensor=2, expert_tensor=2),
    "data=2 fsdp=2 expert=2": dict(data=2, fsdp=2, expert=2),
    "fsdp=2 seq=2 tensor=2": dict(fsdp=2, seq=2, tensor=2),
    "data=4 seq=2": dict(data=4, seq=2),
}
# (mesh, (rows, length), token groups, capacity factor)
CASES = [
    ("expert=8", (8, 8), 1, None),
    ("expert=8", (8, 8), 2, 0.75),
    ("expert=8", (3, 1), 1, None),  # fewer rows than devices
    ("expert=4 expert_tensor=2", (8, 8), 4, None),
    ("expert=2 tensor=2 expert_tensor=2", (8, 8), 2, 0.75),
    ("expert=2 tensor=2 expert_tensor=2", (8, 1), 1, None),  # a step of decoding: `tensor` divides rows
    ("data=2 fsdp=2 expert=2", (8, 8), 2, None),
    ("data=2 fsdp=2 expert=2", (16, 3), 3, 0.75),  # groups that end inside a row
    ("fsdp=2 seq=2 tensor=2", (8, 8), 4, 0.75),
    ("fsdp=2 seq=2 tensor=2", (4, 3), 1, None),  # nothing divides the length
    ("data=4 seq=2", (8, 8), 1, 0.75),
]


def config(**changes):
    return ModelConfig(
        vocab_size=8,
        hidden_size=EMBED,
        num_layers=1,
        layer_pattern=("softmax",),
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rotary_dim=2,
        mlp_dim=INNER,
        num_experts=EXPERTS,
        experts_per_token=2,
        dtype="float32",
        **changes,
    )


def inputs(shape, *, skewed, padded):
    """(params, x [B, T, M], segment_ids [B, T]); skewed: every token's first choice is expert 5."""
    rng = np.random.default_rng(0)
    params = {
        "router": rng.normal(size=(EMBED, EXPERTS)),
        "gate": rng.normal(size=(EXPERTS, EMBED, INNER)),
        "up": rng.normal(size=(EXPERTS, EMBED, INNER)),
        "down": rng.normal(size=(EXPERTS, INNER, EMBED)),
    }
    x = rng.normal(size=(*shape, EMBED))
    if skewed:
        x[..., 0] = 4
        params["router"][0] = np.where(np.arange(EXPERTS) == 5, 5, 0)
    segment_ids = np.ones(shape, np.int32)
    if padded:
        segment_ids[rng.random(shape) < 0.3] = 0
    return jax.tree.map(np.float32, params), np.float32(x), segment_ids


def place(mesh, params, x, segment_ids):
    """On the devices by the rules; tokens everywhere if the mesh does not divide them."""
    up, down = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    axes = {"router": ("embed", "router_experts"), "gate": up, "up": up, "down": down}
    params = {name: jax.device_put(w, NamedSharding(mesh, logical_to_spec(axes[name]))) for name, w in params.items()}
    rows = logical_to_spec(("batch", "length"))
    sizes = zip(segment_ids.shape, ("batch", "length"), strict=True)
    divided = all(size % axes_size(mesh, mesh_axes(axis)) == 0 for size, axis in sizes)
    return params, *jax.device_put((x, segment_ids), NamedSharding(mesh, rows if divided else P()))


@functools.cache
def gradient_function(model_config, runtime=RuntimeConfig()):
    def objective(params, x, segment_ids):
        output, stats, _ = MixtureOfExperts(model_config, runtime).apply({"params": params}, x, segment_ids)
        real = (segment_ids > 0)[..., None]
        output = jnp.where(real, output, 0)
        weights = jnp.sin(jnp.arange(output.size)).reshape(output.shape)
        balance = jnp.sum(stats.probability * jnp.arange(EXPERTS)) + stats.tokens
        return jnp.sum(weights * output) + balance, (output, stats)

    return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))


def error(got, want):
    """Largest deviation of a leaf, relative to the leaf's largest value."""

    def leaf_error(got, want):
        got, want = np.asarray(got), np.asarray(want)
        return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(leaf_error, got, want)))


def collectives(hlo):
    """{kind: [types of the results, such as "f32[8,4]"]} of a compiled program."""
    found = {}
    for result, kind in re.findall(r"= (.*?) (all-gather|all-to-all|reduce-scatter|all-reduce)\(", hlo):
        found.setdefault(kind, []).append(" ".join(re.findall(r"\w+\[[\d,]*\]", result)))
    return found


def barriers(text):
    """[types of the arrays, such as "8x4xf32"] of each barrier of a program that is not compiled yet."""
    lines = re.findall(r"stablehlo.optimization_barrier .* : (.*)", text)
    return [re.findall(r"tensor<(\S*)>", line) for line in lines]


def equality():
    results = []
    for name, shape, groups, capacity_factor in CASES:
        mesh = make_mesh(MeshConfig(**{"data": 1, **MESHES[name]}))
        run = gradient_function(config(capacity_factor=capacity_factor), RuntimeConfig(token_groups=groups))
        alone = gradient_function(config(capacity_factor=capacity_factor))
        batches = [inputs(shape, skewed=skewed, padded=shape[1] > 1) for skewed in (False, True)]
        with jax.set_mesh(mesh):
            lowered = run.lower(*place(mesh, *batches[0]))
        compiled = lowered.compile()
        got = [compiled(*place(mesh, *arguments)) for arguments in batches]
        results.append(
            {
                "errors": [error(found, alone(*arguments)) for found, arguments in zip(got, batches, strict=True)],
                "dropped": float(got[1][1][1].dropped),
                "collectives": collectives(compiled.as_text()),
                "barriers": barriers(lowered.as_text()),
            }
        )
    return results


def scopes():
    """Dropped assignments of skewed routing, by the scope of the capacity."""
    # One device in four has tokens that all want the same expert.
    params, x, segment_ids = inputs((8, 8), skewed=True, padded=False)
    x[np.arange(8) % 4 != 0, :, 0] = 0
    dropped = {}
    for scope in ("global", "local"):
        run = jax.jit(MixtureOfExperts(config(capacity_factor=1.0, capacity_scope=scope)).apply)
        with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
            dropped[scope] = float(run({"params": params}, x, segment_ids)[1].dropped)
    return dropped


def buffer():
    """A buffer for 1.5 times the even share against the definition, with the rule for what is dropped written anew."""
    params, x, segment_ids = inputs((8, 8), skewed=True, padded=True)
    layer = x.reshape(-1, EMBED), *(params[name] for name in ("router", "gate", "up", "down"))
    real = segment_ids.reshape(-1) > 0
    _, experts, _, _ = oracles.mixture_of_experts(*layer, 2)
    device = np.arange(64) // 8  # of each token: one row of the batch
    room = int(1.5 * 8 * 2)
    kept = np.zeros((64, 2), bool)
    for owner in range(4):
        for part in range(2):  # of the mesh: two copies of every expert
            senders = range(part * 4, part * 4 + 4)
            wanted = {}
            for expert in (2 * owner, 2 * owner + 1):
                for sender in senders:
                    wanted[expert, sender] = [
                        (r, choice)
                        for choice in range(2)
                        for r in np.flatnonzero((device == sender) & real)
                        if experts[r, choice] == expert
                    ]
            total = sum(map(len, wanted.values()))
            for assignments in wanted.values():
                count = len(assignments) if total <= room else len(assignments) * room // total
                for r, choice in assignments[:count]:
                    kept[r, choice] = True
    want = oracles.mixture_of_experts(*layer, 2, kept=kept)[0]
    run = jax.jit(MixtureOfExperts(config(expert_buffer=1.5)).apply)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        output, stats, _ = run({"params": params}, x, segment_ids)
    return {
        "error": error(np.asarray(output).reshape(64, EMBED), want),
        "dropped": float(stats.dropped),
        "want_dropped": int(np.sum(~kept[real])),
    }


def errors():
    """Messages for meshes that do not divide the experts."""
    messages = {}
    for name, mesh, changes in (("experts", dict(expert=8), dict(num_experts=4)), ("width", dict(expert_tensor=8), {})):
        layer = MixtureOfExperts(ModelConfig(**{**vars(config()), **changes}))
        x = jnp.zeros((8, 8, EMBED))
        params = jax.eval_shape(layer.init, jax.random.key(0), x, None)["params"]
        with jax.set_mesh(make_mesh(MeshConfig(data=1, **mesh))):
            try:
                jax.eval_shape(layer.apply, {"params": params}, x, None)
            except ConfigError as message:
                messages[name] = str(message)
    return messages


def main():
    print(json.dumps({"equality": equality(), "scopes": scopes(), "buffer": buffer(), "errors": errors()}))


if __name__ == "__main__":
    main()
