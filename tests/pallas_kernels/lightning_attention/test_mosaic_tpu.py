"""The Mosaic TPU kernel of lightning attention: interpreted against the float64 recurrence, compiled for real chips.

No TPU is needed: libtpu compiles for a named topology on any host. That shows that the kernels compile, fit and move
no more bytes than they have to; that they compute the right thing is shown by interpretation.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import platform
from pallas_kernels.lightning_attention import end_state, lightning_attention, mosaic_tpu
from pallas_kernels.segments import number_segments
from tests.support import ahead_of_time, oracles

BATCH = 2
SLOPES = np.array([0.917, 0.25, 0.004], np.float32)
NAMES = ("output", "final state", "dq", "dk", "dv", "d initial state")


def runs_of(*rows):
    """Rows as (id, length) pairs."""
    return np.array([np.repeat(*zip(*row, strict=True)) for row in rows])


# Name: (segment ids or length, chunk size). Boundaries and lengths lie on and off the chunks of 48 and 64.
CASES = {
    "whole": (128, 64),
    "one_chunk": (40, 256),
    "ragged": (150, 48),
    "packed": (runs_of([(1, 5), (2, 1), (3, 91), (7, 31)], [(4, 64), (5, 64)]), 64),
    "padded_inside": (runs_of([(1, 40), (0, 30), (1, 20), (0, 8), (2, 52)], [(0, 70), (3, 20), (0, 9), (3, 51)]), 48),
    "padded_ends": (runs_of([(0, 70), (1, 80)], [(1, 60), (2, 10), (0, 80)]), 64),
    "all_padding": (runs_of([(0, 100)], [(1, 100)]), 48),
}


def oracle_gradients(q, k, v, slopes, segment_ids, state, d_output, d_state):
    """The recurrence backwards, token by token in float64; tensors are [B, T, H, D]."""
    # o_t = q_t S_t is linear in q, so dq is the recurrence itself with other roles.
    dq, _ = oracles.lightning_attention(d_output, v, k, slopes, segment_ids, np.swapaxes(state, 2, 3))
    dk, dv, d_initial = np.zeros(k.shape), np.zeros(v.shape), np.zeros(state.shape)
    decay = np.exp(-np.asarray(slopes, np.float64))[:, None, None]
    for b in range(q.shape[0]):
        flow = np.array(d_state[b], np.float64)
        real = [t for t in range(q.shape[1]) if segment_ids is None or segment_ids[b, t]]
        for place in reversed(range(len(real))):
            t = real[place]
            flow = flow + q[b, t, :, :, None] * d_output[b, t, :, None, :]
            dk[b, t] = np.einsum("hde,he->hd", flow, v[b, t])
            dv[b, t] = np.einsum("hde,hd->he", flow, k[b, t])
            flow = decay * flow
            if place and segment_ids is not None and segment_ids[b, t] != segment_ids[b, real[place - 1]]:
                flow = np.zeros_like(flow)
        d_initial[b] = flow
    return dq, dk, dv, d_initial


def random_inputs(length, heads, dim, dtype):
    """q, k, v, d_output [B, T, H, D], rounded to `dtype`, and two states; all as float64."""
    rng = np.random.default_rng(0)
    tensors = jnp.asarray(rng.normal(size=(4, BATCH, length, heads, dim)), dtype)
    states = rng.normal(size=(2, BATCH, heads, dim, dim)).astype(np.float32)
    return *np.asarray(tensors, np.float64), *states.astype(np.float64)


def errors(segments, chunk_size, *, dim, dtype, slopes=SLOPES):
    """Relative errors of outputs and gradients against float64, by name."""
    segment_ids, length = (None, segments) if isinstance(segments, int) else (segments, segments.shape[1])
    q, k, v, d_output, state, d_state = random_inputs(length, len(slopes), dim, dtype)

    @jax.jit
    def run(q, k, v, state, cotangents):
        def attend(q, k, v, state):
            return lightning_attention(
                q,
                k,
                v,
                slopes,
                segment_ids=segment_ids,
                initial_state=state,
                chunk_size=chunk_size,
                implementation="mosaic_tpu",
            )

        results, vjp = jax.vjp(attend, q, k, v, state)
        return *results, *vjp(cotangents)

    merged = [jnp.asarray(x.reshape(BATCH, length, -1), dtype) for x in (q, k, v, d_output)]
    got = run(*merged[:3], jnp.float32(state), (merged[3], jnp.float32(d_state)))
    want = oracles.lightning_attention(q, k, v, slopes, segment_ids, state)
    want += oracle_gradients(q, k, v, slopes, segment_ids, state, d_output, d_state)
    return {
        name: oracles.relative_error(np.reshape(x, exact.shape), exact)
        for name, x, exact in zip(NAMES, got, want, strict=True)
    }


def test_gradients_of_the_oracle():
    segment_ids = runs_of([(1, 3), (0, 2), (1, 2), (2, 5)], [(0, 1), (1, 9), (0, 2)])
    q, k, v, d_output, state, d_state = random_inputs(12, 3, 4, jnp.float32)
    gradients = oracle_gradients(q, k, v, SLOPES, segment_ids, state, d_output, d_state)

    def loss(q, k, v, state):
        output, final = oracles.lightning_attention(q, k, v, SLOPES, segment_ids, state)
        return (output * d_output).sum() + (final * d_state).sum()

    inputs = q, k, v, state
    rng = np.random.default_rng(1)
    for i, gradient in enumerate(gradients):
        step = rng.normal(size=gradient.shape)
        moved = [loss(*inputs[:i], inputs[i] + sign * step, *inputs[i + 1 :]) for sign in (0.5, -0.5)]
        np.testing.assert_allclose((gradient * step).sum(), moved[0] - moved[1], rtol=1e-9)  # linear in each input


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize(("dim", "heads"), [(64, 3), (128, 2)])
def test_float32_matches_the_recurrence(case, dim, heads):
    assert max(errors(*CASES[case], dim=dim, dtype=jnp.float32, slopes=SLOPES[:heads]).values()) < 2e-6


@pytest.mark.parametrize("case", ["whole", "ragged", "packed", "padded_inside"])
def test_end_states_alone(case):
    segments, chunk_size = CASES[case]
    segment_ids, length = (None, segments) if isinstance(segments, int) else (segments, segments.shape[1])
    q, k, v, d_output, state, d_state = random_inputs(length, 3, 64, jnp.float32)
    _, last = oracles.lightning_attention(q, k, v, SLOPES, segment_ids)
    *_, first = oracle_gradients(q, k, v, SLOPES, segment_ids, state, d_output, np.zeros_like(d_state))
    runs = None if segment_ids is None else number_segments(segment_ids)
    for inputs, want, reverse in (((k, v), last, False), ((q, d_output), first, True)):
        merged = (jnp.asarray(x.reshape(BATCH, length, -1), jnp.float32) for x in inputs)
        got = end_state(*merged, SLOPES, runs, reverse=reverse, chunk_size=chunk_size, implementation="mosaic_tpu")
        assert oracles.relative_error(got, want) < 2e-6


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize(("dim", "heads"), [(64, 3), (128, 2)])
def test_bfloat16_stays_near_float64(case, dim, heads):
    found = errors(*CASES[case], dim=dim, dtype=jnp.bfloat16, slopes=SLOPES[:heads])
    limits = {name: 2e-3 if "state" in name else 4e-3 for name in NAMES}
    assert all(found[name] < limits[name] for name in NAMES), found


@pytest.mark.parametrize("chunk_size", [1, 100, 1000])
def test_chunk_size_changes_no_result(chunk_size):
    segments = runs_of([(1, 100), (2, 160), (0, 40)], [(1, 300)])
    assert max(errors(segments, chunk_size, dim=64, dtype=jnp.float32).values()) < 2e-6


def test_several_blocks_of_heads():
    slopes = np.geomspace(0.9, 0.004, 8).astype(np.float32)
    segments = runs_of([(1, 100), (2, 172)], [(1, 272)])
    assert mosaic_tpu._heads_per_block(8, 128, 256, 4, mosaic_tpu._FORWARD) < 8
    assert max(errors(segments, 256, dim=128, dtype=jnp.float32, slopes=slopes).values()) < 2e-6


def test_extreme_decay_neither_overflows_nor_poisons_gradients():
    steep = np.array([5.0, 0.917, 4.95e-5], np.float32)
    segments = runs_of([(1, 130), (2, 100), (0, 70)], [(1, 300)])
    assert max(errors(segments, 256, dim=64, dtype=jnp.float32, slopes=steep).values()) < 2e-6


def test_padded_positions_do_not_matter():
    segment_ids, chunk_size = CASES["padded_inside"]
    q, k, v, *_, state, _ = random_inputs(segment_ids.shape[1], 3, 64, jnp.float32)
    pad = (segment_ids == 0)[..., None]

    @jax.jit
    def attend(*tensors):
        return lightning_attention(
            *tensors,
            SLOPES,
            segment_ids=segment_ids,
            initial_state=jnp.float32(state),
            chunk_size=chunk_size,
            implementation="mosaic_tpu",
        )

    tensors = [jnp.float32(x.reshape(*segment_ids.shape, -1)) for x in (q, k, v)]
    output, final = attend(*tensors)
    noisy, noisy_final = attend(*(jnp.where(pad, 1e6, x) for x in tensors))
    np.testing.assert_array_equal(output, noisy)
    np.testing.assert_array_equal(final, noisy_final)
    assert not np.any(np.where(pad, output, 0))


def test_a_residual_is_no_larger_than_a_state():
    q = jnp.zeros((1, 1024, 2 * 64))
    _, vjp = jax.vjp(lambda q: lightning_attention(q, q, q, SLOPES[:2], implementation="mosaic_tpu")[0], q)
    saved = sum(x.size for x in jax.tree.leaves(vjp) if hasattr(x, "size"))
    assert saved <= 3 * q.size + 2 * 64 * 64 + 1000, saved


@pytest.mark.parametrize(
    ("shape", "heads", "dtype", "message"),
    [
        ((2, 4, 24), 3, jnp.float32, "head dims 8 and 8.*64 or 128.*chunked_xla"),
        ((2, 4, 192), 3, jnp.float16, "float16.*bfloat16 and float32.*chunked_xla"),
        ((1, 256, 63 * 64), 63, jnp.bfloat16, "63 heads of 64.*even number.*chunked_xla"),
    ],
)
def test_what_is_not_served_is_named(shape, heads, dtype, message):
    x = jnp.zeros(shape, dtype)
    with pytest.raises(NotImplementedError, match=message):
        lightning_attention(x, x, x, jnp.ones(heads), implementation="mosaic_tpu")


def test_another_platform_is_refused():
    x = jnp.zeros((1, 16, 64))
    with platform.target("gpu"), pytest.raises(NotImplementedError, match="platform gpu.*chunked_xla"):
        lightning_attention(x, x, x, jnp.ones(1), implementation="mosaic_tpu")
    assert platform.platform() == jax.default_backend()


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SMALL = "small"  # shapes that share no tile size with the large ones, all on one chip
LENGTH, HEADS, DIM = 8192, 64, 128
TENSOR_BYTES, STATE_BYTES = 2 * LENGTH * HEADS * DIM, 4 * HEADS * DIM * DIM


def compiled(
    topology, *, gradients, segmented, length=LENGTH, heads=HEADS, dim=DIM, dtype=jnp.bfloat16, chunk_size=256
):
    """Compiles attention, or attention and its gradients, for one chip; what XLA says of the program."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("chip",)), P())

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tensor, state = array(1, length, heads * dim, dtype=dtype), array(1, heads, dim, dim)
    segment_ids = array(1, length, dtype=jnp.int32) if segmented else None

    def attend(q, k, v, slopes, segment_ids, state):
        return lightning_attention(
            q,
            k,
            v,
            slopes,
            segment_ids=segment_ids,
            initial_state=state,
            chunk_size=chunk_size,
            implementation="mosaic_tpu",
        )

    def attend_and_back(q, k, v, slopes, segment_ids, state, cotangents):
        results, vjp = jax.vjp(lambda q, k, v, s: attend(q, k, v, slopes, segment_ids, s), q, k, v, state)
        return results, vjp(cotangents)

    arguments = [tensor, tensor, tensor, array(heads), segment_ids, state]
    if gradients:
        arguments.append((tensor, state))
    with platform.target("tpu"):
        program = jax.jit(attend_and_back if gradients else attend).lower(*arguments).compile()
    hlo_name = {jnp.bfloat16: "bf16", jnp.float32: "f32"}[dtype]
    copies = re.findall(rf"{hlo_name}\[1,{length},\S+ (?:copy|transpose)\(", program.as_text())
    return {
        "bytes": program.cost_analysis()["bytes accessed"],
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "copies": len(copies),
    }


def compile_all(topology):
    """The programs that the tests below ask about, by name."""
    if topology == SMALL:
        small = dict(gradients=True, segmented=True)
        return {
            "odd_heads": compiled(TOPOLOGIES[0], length=1000, heads=3, dim=64, dtype=jnp.float32, **small),
            "float32": compiled(TOPOLOGIES[0], length=1000, heads=8, dtype=jnp.float32, chunk_size=48, **small),
            "one_chunk": compiled(TOPOLOGIES[0], length=30, heads=8, **small),
            "dim_64": compiled(TOPOLOGIES[0], length=2048, dim=64, chunk_size=128, **small),
            "many_heads": compiled(TOPOLOGIES[0], length=2048, chunk_size=128, **small),
        }
    return {
        "forward": compiled(topology, gradients=False, segmented=False),
        "both": compiled(topology, gradients=True, segmented=False),
        "packed": compiled(topology, gradients=True, segmented=True),
    }


@pytest.mark.parametrize("topology", ahead_of_time.each(TOPOLOGIES, subset="v5p:2x2x1"))
def test_compiled_kernels_move_each_tensor_once(topology):
    programs = ahead_of_time.answer_of(__name__, topology)
    forward, both, packed = (programs[name] for name in ("forward", "both", "packed"))
    assert forward["bytes"] <= 4 * TENSOR_BYTES * 1.05
    assert both["bytes"] - forward["bytes"] <= 10 * TENSOR_BYTES * 1.1
    assert packed["bytes"] <= 14 * TENSOR_BYTES * 1.1
    assert forward["temporary"] < STATE_BYTES / 4
    for program in programs.values():
        # The backward transposes a state; a tensor, 32 times as large, is never copied.
        assert program["temporary"] < 3 * STATE_BYTES and program["copies"] == 0, programs


@pytest.mark.topology
def test_all_that_is_served_compiles():
    programs = ahead_of_time.answer_of(__name__, SMALL)
    assert all(program["bytes"] > 0 for program in programs.values())


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
