"""Attention, the loss and a small model with the tokens of rows divided over 8 CPU devices; prints JSON.

A program of its own, because the number of devices is fixed when jax starts; tests/mmx_jax/parallel/test_sequence.py
runs it.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.config import MeshConfig
from mmx_jax.data.device_batch import batch_sharding
from mmx_jax.inference import generate
from mmx_jax.inference.inputs import left_align
from mmx_jax.models.decoder import Decoder
from mmx_jax.models.params import abstract_params, init_params, param_shardings
from mmx_jax.parallel import lasp, ring_attention
from mmx_jax.parallel.methods import METHODS
from mmx_jax.sharding import logical_to_spec, make_mesh
from mmx_jax.training.loss import chunked_cross_entropy
from pallas_kernels.lightning_attention import lightning_attention
from pallas_kernels.segments import number_segments
from pallas_kernels.softmax_attention import blockwise_xla as blocks
from pallas_kernels.softmax_attention import softmax_attention
from tests.support import oracles, sharded_experts, sharded_model

BATCH, HEADS, KV_HEADS, DIM, LENGTH = 2, 4, 2, 4, 32
SLOPES = np.array([0.917, 0.25, 0.05, 0.004], np.float32)
# Parts of 4, 8 and 16 tokens. Row 0: documents over several parts, one that ends at every border, one inside. Row 1:
# whole parts of padding, in front and inside a document.
SEGMENTS = np.array(
    [[1] * 14 + [2] * 2 + [3] * 3 + [1] * 10 + [0] * 3, [0] * 9 + [1] * 5 + [0] * 10 + [1] * 6 + [4] * 2], np.int32
)
_SIZES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
_COLLECTIVE = re.compile(r"= (.*) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
# Name: (devices, method, packed, with a state).
LIGHTNING = {
    "one device": (1, "gather", True, True),
    **{f"{method} {n}": (n, method, True, True) for method in METHODS for n in (2, 4, 8)},
    **{f"{method} whole rows": (8, method, False, False) for method in METHODS},
    "gather 4, no state": (4, "gather", True, False),
}
# Name: (devices, method, packed, block, length); blocks that do and do not divide a half of a part.
SOFTMAX = {
    **{f"ring {n}": (n, "ring", True, block, 32) for n, block in ((2, 3), (4, 2), (8, 512))},
    **{f"gather {n}": (n, "gather", True, block, 32) for n, block in ((2, 3), (8, 512))},
    "ring odd": (3, "ring", False, 2, 27),
}
MODELS = {
    "seq=8": dict(data=1, seq=8),
    "data=2 tensor=2 seq=2": dict(data=2, tensor=2, seq=2),
}


def collectives(compiled) -> dict[str, list[int]]:
    """Kind of collective -> bytes of each result on one device, sorted; what is in a loop counts once."""
    found = {}
    for results, kind in _COLLECTIVE.findall(compiled.as_text()):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results):
            count = int(np.prod([int(n) for n in shape.split(",") if n]))
            found.setdefault(kind, []).append(count * _SIZES[dtype])
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def divided(f, devices, specs, out_specs):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("seq",))
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lightning_problem(attend, packed, with_state, length=LENGTH):
    """(jitted function of results and gradients, its arguments) of attend(q, k, v, slopes, segment_ids, state)."""
    tokens, weight = random(0, 3, BATCH, length, HEADS * DIM), random(1, BATCH, length, HEADS * DIM)
    state, d_state = random(2, 2, BATCH, HEADS, DIM, DIM)
    segment_ids = np.asarray(number_segments(np.tile(SEGMENTS, length // LENGTH))) if packed else None

    def loss(q, k, v, state, segment_ids):
        output, final = attend(q, k, v, jnp.asarray(SLOPES), segment_ids, state)
        objective = jnp.sum(output * weight)
        return (objective + jnp.sum(final * d_state) if with_state else objective), (output, final)

    wanted = (0, 1, 2, 3) if with_state else (0, 1, 2)
    run = jax.jit(jax.value_and_grad(loss, argnums=wanted, has_aux=True))
    return run, (*tokens, state if with_state else None, segment_ids)


def divided_lightning(devices, method):
    rows = P(None, "seq")
    attend = functools.partial(lasp.lightning_attention, spec=lasp.LaspSpec(method=method, chunk_size=4))
    return divided(attend, devices, (rows, rows, rows, P(), rows, P()), (rows, P()))


def lightning_report():
    def whole(q, k, v, slopes, segment_ids, state):
        output, final = lightning_attention(
            q, k, v, slopes, segment_ids=segment_ids, initial_state=state, implementation="reference"
        )
        return output, None if state is None else final

    report, want = {}, {}
    for options in ((True, True), (True, False), (False, False)):
        run, arguments = lightning_problem(whole, *options)
        want[options] = run(*arguments)
        q, k, v = (x.reshape(BATCH, LENGTH, HEADS, DIM) for x in arguments[:3])
        exact, _ = oracles.lightning_attention(q, k, v, SLOPES, arguments[4], arguments[3])
        assert oracles.relative_error(want[options][0][1][0], exact.reshape(BATCH, LENGTH, -1)) < 1e-6
    for name, (devices, method, *options) in LIGHTNING.items():
        run, arguments = lightning_problem(divided_lightning(devices, method), *options)
        compiled = run.lower(*arguments).compile()
        error = sharded_model.error(compiled(*arguments)[0][1], want[tuple(options)][0][1])
        gradient_error = sharded_model.error(compiled(*arguments)[1], want[tuple(options)][1])
        report[name] = {"output": error, "gradients": gradient_error, "collectives": collectives(compiled)}
    # Twice the tokens, and a backward pass that recomputes what `jax.checkpoint` does not keep.
    policy = jax.checkpoint_policies.save_only_these_names("lightning_attention")
    attend = jax.checkpoint(divided_lightning(8, "gather"), policy=policy)
    run, arguments = lightning_problem(attend, True, False, 2 * LENGTH)
    report["longer, recomputed"] = collectives(run.lower(*arguments).compile())
    return report


def softmax_problem(attend, packed, length):
    """As `lightning_problem`, of attend(q, k, v, segment_ids)."""
    q, weight = random(0, 2, BATCH, length, HEADS, DIM)
    k, v = random(1, 2, BATCH, length, KV_HEADS, DIM)
    segment_ids = np.asarray(number_segments(SEGMENTS)) if packed else None

    def loss(q, k, v):
        output = attend(q, k, v, segment_ids)
        return jnp.sum(output * weight), output

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)), (q, k, v, segment_ids)


def softmax_report():
    report, references = {}, {}
    for name, (devices, method, packed, block, length) in SOFTMAX.items():
        if packed not in references:
            run, (*tensors, segment_ids) = softmax_problem(softmax_attention, packed, length)
            references[packed] = oracles.softmax_attention(*tensors, segment_ids), run(*tensors)[1]
        want, want_gradients = references[packed]
        run, (*tensors, _) = softmax_problem(divided_softmax(devices, method, block), packed, length)
        compiled = run.lower(*tensors).compile()
        (_, output), gradients = compiled(*tensors)
        report[name] = {
            "output": oracles.relative_error(output, want),
            "gradients": sharded_model.error(gradients, want_gradients),
            "collectives": collectives(compiled),
        }
    return report


def divided_softmax(devices, method, block):
    rows = P(None, "seq")
    attend = functools.partial(
        ring_attention.softmax_attention, spec=ring_attention.RingSpec(method=method, block=block)
    )
    return divided(attend, devices, (rows,) * 4, rows)


def visits_report():
    """How many pairs of parts each of 4 devices works on, besides each of its own two with itself."""
    counts, original = {}, blocks.attend_earlier

    def counted(*arguments):
        jax.debug.callback(lambda i: counts.update({int(i): counts.get(int(i), 0) + 1}), jax.lax.axis_index("seq"))
        return original(*arguments)

    blocks.attend_earlier = counted
    attend = jax.jit(divided_softmax(4, "ring", 512))
    blocks_of = lambda size: np.repeat(np.arange(1, LENGTH // size + 1, dtype=np.int32), size)[None]  # noqa: E731
    # The last: two documents, of which the second begins in the middle of the row.
    documents = {"one": blocks_of(LENGTH), "one a part": blocks_of(LENGTH // 8), "two": blocks_of(LENGTH // 2)}
    report = {}
    for name, segment_ids in documents.items():
        counts.clear()
        attend(
            random(0, 1, LENGTH, HEADS, DIM), *random(1, 2, 1, LENGTH, KV_HEADS, DIM), segment_ids
        ).block_until_ready()
        jax.effects_barrier()
        report[name] = [counts.get(i, 0) for i in range(4)]
    blocks.attend_earlier = original
    return report


def gradient_function(model, weights):
    def objective(params, tokens, segment_ids):
        output = model.apply({"params": params}, tokens, segment_ids)
        return jnp.sum(weights * output.logits), output.logits

    return jax.jit(jax.grad(objective, has_aux=True))


def model_report():
    tokens = np.random.default_rng(0).integers(0, 64, (BATCH, LENGTH)).astype(np.int32)
    weights = random(1, BATCH, LENGTH, 64) * (SEGMENTS > 0)[..., None]
    report = {}
    config = sharded_model.config()
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    model = Decoder(config, sharded_model.RUNTIME)
    gradient, logits = gradient_function(model, weights)(params, tokens, SEGMENTS)
    for name, sizes in MODELS.items():
        ring = dataclasses.replace(sharded_model.RUNTIME, sequence_lightning="ring", sequence_softmax="gather")
        run = gradient_function(Decoder(config, ring) if name == "seq=8" else model, weights)
        mesh = make_mesh(MeshConfig(**sizes))
        with jax.set_mesh(mesh):
            got, got_logits = run(jax.device_put(params, param_shardings(config, mesh)), tokens, SEGMENTS)
        report[name] = {
            "logits": sharded_model.error(np.asarray(got_logits)[SEGMENTS > 0], np.asarray(logits)[SEGMENTS > 0]),
            "gradients": sharded_model.error(got, gradient),
        }

    def prefill():
        state = generate.new_state(config, params, BATCH, 64)
        logits, state = generate.prefill(model, params, *left_align(tokens, SEGMENTS > 0), state, chunk=16)
        return logits, state.layers["layer_0"]

    want = prefill()
    mesh = make_mesh(MeshConfig(data=4, seq=2))  # 2 rows, which 4 devices do not divide
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(config, mesh))
        report["prefill"] = sharded_model.error(prefill(), want)
    return report


def layers_report():
    """What the gradient of a model of two lightning layers gathers, for rows of two lengths: types in the program."""
    config = dataclasses.replace(sharded_model.config(), layer_pattern=("lightning",) * 2)
    mesh, report = make_mesh(MeshConfig(data=1, seq=8)), {}
    place = lambda tree, shardings: jax.tree.map(  # noqa: E731
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
    )
    params = place(abstract_params(config), param_shardings(config, mesh))
    for length in (LENGTH, 2 * LENGTH):
        rows = jax.ShapeDtypeStruct((BATCH, length), jnp.int32, sharding=batch_sharding(mesh))
        with jax.set_mesh(mesh):
            compiled = (
                gradient_function(Decoder(config, sharded_model.RUNTIME), 1.0).lower(params, rows, rows).compile()
            )
        report[str(length)] = sharded_experts.collectives(compiled.as_text()).get("all-gather", [])
    return report


def loss_report():
    hidden, head = random(0, BATCH, LENGTH, 8), random(1, 16, 8)
    targets = np.random.default_rng(2).integers(-1, 16, (BATCH, LENGTH)).astype(np.int32)

    def run(groups, parts):
        def loss(hidden, head):
            entropy = chunked_cross_entropy(hidden, head, targets, chunk=24, groups=groups, parts=parts)
            return entropy.objective, entropy

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    want = run(1, 1)(hidden, head)
    mesh = make_mesh(MeshConfig(data=2, seq=4))
    spec = logical_to_spec(("batch", "length", None))
    with jax.set_mesh(mesh):
        placed = jax.device_put(hidden, NamedSharding(mesh, spec)), jax.device_put(head, NamedSharding(mesh, P()))
        compiled = run(2, 4).lower(*placed).compile()
        return {"error": sharded_model.error(compiled(*placed), want), "collectives": collectives(compiled)}


if __name__ == "__main__":
    reports = lightning_report, softmax_report, visits_report, model_report, layers_report, loss_report
    print(json.dumps({report.__name__.removesuffix("_report"): report() for report in reports}))
