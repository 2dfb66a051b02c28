"""Lightning attention against the float64 recurrence, for the backends that serve every shape and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.lightning_attention import (
    default_implementation,
    end_state,
    lightning_attention,
    recurrent_step,
)
from pallas_kernels.segments import number_segments
from tests.support import oracles

BATCH, HEADS, DIM = 2, 3, 8
SLOPES = np.array([0.917, 0.25, 0.004], np.float32)
BACKENDS = ("chunked_xla", "reference")  # the kernels have files of their own

attend = jax.jit(lightning_attention, static_argnames=("implementation", "chunk_size", "reverse"))


def random_qkv(length, seed=0, dim=DIM):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, BATCH, length, HEADS, dim)).astype(np.float32)


def merged(x):
    return jnp.asarray(x).reshape(x.shape[0], x.shape[1], -1)


def initial_state(seed=7):
    return np.random.default_rng(seed).normal(size=(BATCH, HEADS, DIM, DIM)).astype(np.float32)


SEGMENTS = {
    "none": None,
    "packed": [[1] * 5 + [2] * 1 + [3] * 11 + [7] * 13, [4] * 30],
    "left_padded": [[0] * 9 + [1] * 21, [1] * 30],
    "right_padded": [[1] * 9 + [0] * 21, [1] * 30],
    "interior": [[1] * 4 + [0] * 3 + [1] * 10 + [0] * 8 + [1] * 5, [0] * 8 + [1] * 8 + [0] * 6 + [2] * 8],
    "repeated_id": [[1] * 8 + [2] * 8 + [1] * 14, [0] * 30],
}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("segments", sorted(SEGMENTS))
def test_matches_the_recurrence(implementation, segments):
    segment_ids = SEGMENTS[segments] and np.array(SEGMENTS[segments])
    q, k, v = random_qkv(30)
    state = initial_state()
    want, want_state = oracles.lightning_attention(q, k, v, SLOPES, segment_ids, state)
    got, got_state = attend(
        *map(merged, (q, k, v)),
        SLOPES,
        segment_ids=segment_ids,
        initial_state=state,
        implementation=implementation,
        chunk_size=8,
    )
    np.testing.assert_allclose(got, want.reshape(BATCH, 30, -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_state, want_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65])
def test_any_length(implementation, length):
    q, k, v = random_qkv(length)
    want, want_state = oracles.lightning_attention(q, k, v, SLOPES)
    got, got_state = attend(*map(merged, (q, k, v)), SLOPES, implementation=implementation, chunk_size=8)
    np.testing.assert_allclose(got, want.reshape(BATCH, length, -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_state, want_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 100, 256])
def test_chunk_sizes_agree(chunk_size):
    q, k, v = random_qkv(100)
    want, want_state = oracles.lightning_attention(q, k, v, SLOPES)
    got, got_state = attend(*map(merged, (q, k, v)), SLOPES, implementation="chunked_xla", chunk_size=chunk_size)
    np.testing.assert_allclose(got, want.reshape(BATCH, 100, -1), rtol=1e-5, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(got_state, want_state, rtol=1e-5, atol=1e-6 * np.abs(want_state).max())


@pytest.mark.parametrize("implementation", BACKENDS)
def test_reverse_is_the_flipped_problem(implementation):
    segment_ids = np.array(SEGMENTS["packed"])
    q, k, v = random_qkv(30)
    state = initial_state()
    flip = lambda x: x[:, ::-1]  # noqa: E731
    want, want_state = oracles.lightning_attention(*map(flip, (q, k, v)), SLOPES, flip(segment_ids), state)
    got, got_state = attend(
        *map(merged, (q, k, v)),
        SLOPES,
        segment_ids=segment_ids,
        initial_state=state,
        reverse=True,
        implementation=implementation,
        chunk_size=8,
    )
    np.testing.assert_allclose(got, flip(want).reshape(BATCH, 30, -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got_state, want_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("segments", ["none", "packed", "interior", "left_padded"])
def test_end_states_alone(implementation, segments):
    segment_ids = SEGMENTS[segments] and np.array(SEGMENTS[segments])
    runs = None if segment_ids is None else number_segments(segment_ids)
    q, k, v = random_qkv(30)
    options = dict(chunk_size=8, implementation=implementation)
    none = np.zeros_like(initial_state())
    _, want = oracles.lightning_attention(q, k, v, SLOPES, segment_ids, none)
    for first in (0, 4):  # documents may be numbered as parts of a longer row
        shifted = None if runs is None else jnp.where(runs > 0, runs + first, 0)
        last = end_state(merged(k), merged(v), SLOPES, shifted, **options)
        np.testing.assert_allclose(last, want, rtol=1e-5, atol=1e-5)
    # Outputs are linear in the initial state, and this is the transposed map of v.
    first = end_state(merged(q), merged(v), SLOPES, runs, reverse=True, **options)
    outputs = [oracles.lightning_attention(q, k, v, SLOPES, segment_ids, x)[0] for x in (initial_state(), none)]
    np.testing.assert_allclose((first * initial_state()).sum(), ((outputs[0] - outputs[1]) * v).sum(), rtol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("segments", ["none", "packed", "interior", "right_padded"])
def test_gradients_match_central_differences(implementation, segments):
    segment_ids = SEGMENTS[segments] and np.array(SEGMENTS[segments])
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(30)
    state = initial_state()
    weight_o, weight_s = rng.normal(size=q.shape), rng.normal(size=state.shape)

    def oracle_loss(q, k, v, state):
        output, final = oracles.lightning_attention(q, k, v, SLOPES, segment_ids, state)
        return (output * weight_o).sum() + (final * weight_s).sum()

    def loss(q, k, v, state):
        output, final = lightning_attention(
            *map(merged, (q, k, v)),
            SLOPES,
            segment_ids=segment_ids,
            initial_state=state,
            implementation=implementation,
            chunk_size=8,
        )
        return (output * merged(weight_o)).sum() + (final * weight_s).sum()

    inputs = [x.astype(np.float64) for x in (q, k, v, state)]
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, jnp.asarray(state))
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=inputs[i].shape)

        def moved(step, i=i, direction=direction):
            return oracle_loss(*inputs[:i], inputs[i] + step * direction, *inputs[i + 1 :])

        want = moved(0.5) - moved(-0.5)  # every term is linear in each input: no truncation error
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(direction.size)
        np.testing.assert_allclose(np.sum(gradient * direction), want, atol=1e-4 * scale)


def test_packed_equals_separate_with_gradients():
    lengths = [5, 17, 1, 20]
    q, k, v = random_qkv(sum(lengths))
    segment_ids = np.repeat([3, 1, 9, 4], lengths)[None].repeat(BATCH, 0)
    weight = np.random.default_rng(3).normal(size=q.shape).astype(np.float32)

    def loss(q, k, v, w, segment_ids=None):
        output, _ = lightning_attention(q, k, v, SLOPES, segment_ids=segment_ids, chunk_size=8)
        return jnp.sum(output * w), output

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, packed), packed_gradients = grad(*map(merged, (q, k, v, weight)), segment_ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        (_, alone), gradients = grad(*(merged(x[:, part]) for x in (q, k, v, weight)))
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-5, atol=1e-5)
        for a, b in zip(packed_gradients, gradients, strict=True):
            np.testing.assert_allclose(a[:, part], b, rtol=1e-5, atol=1e-5)
        start += length


def test_padded_positions_do_not_matter():
    segment_ids = np.array(SEGMENTS["interior"])
    q, k, v = (merged(x) for x in random_qkv(30))
    base, state = attend(q, k, v, SLOPES, segment_ids=segment_ids, chunk_size=8)
    pad = (segment_ids == 0)[..., None]
    noisy, noisy_state = attend(
        *(jnp.where(pad, 1e6, x) for x in (q, k, v)), SLOPES, segment_ids=segment_ids, chunk_size=8
    )
    np.testing.assert_array_equal(base, noisy)
    np.testing.assert_array_equal(state, noisy_state)
    assert not np.any(np.where(pad, base, 0))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_split_sequence_continues_from_the_state(implementation):
    q, k, v = (merged(x) for x in random_qkv(40))
    whole, final = attend(q, k, v, SLOPES, implementation=implementation, chunk_size=8)
    first, state = attend(q[:, :13], k[:, :13], v[:, :13], SLOPES, implementation=implementation, chunk_size=8)
    second, state = attend(
        q[:, 13:], k[:, 13:], v[:, 13:], SLOPES, initial_state=state, implementation=implementation, chunk_size=8
    )
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)


def test_recurrent_step_equals_the_scan():
    q, k, v = (merged(x) for x in random_qkv(12))
    want, final = attend(q, k, v, SLOPES, chunk_size=8)
    state = jnp.zeros((BATCH, HEADS, DIM, DIM))
    for t in range(12):
        output, state = recurrent_step(q[:, t], k[:, t], v[:, t], SLOPES, state)
        np.testing.assert_allclose(output, want[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)
    _, kept = recurrent_step(q[:, 0], k[:, 0], v[:, 0], SLOPES, state, token_mask=np.array([False, True]))
    np.testing.assert_array_equal(kept[0], state[0])
    assert np.any(kept[1] != state[1])


def test_extreme_decay_neither_overflows_nor_poisons_gradients():
    q, k, v = (merged(x) for x in random_qkv(300))
    steep = np.array([5.0, 0.917, 4.95e-5], np.float32)
    loss = lambda q, k, v: lightning_attention(q, k, v, steep, chunk_size=256)[0].sum()  # noqa: E731
    gradients = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    want, _ = oracles.lightning_attention(*random_qkv(300), steep)
    np.testing.assert_allclose(
        attend(q, k, v, steep, chunk_size=256)[0], want.reshape(BATCH, 300, -1), rtol=1e-4, atol=1e-4
    )
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_inputs_stay_near_float64():
    q, k, v = random_qkv(512, dim=32)
    q, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, k, v))
    want, want_state = oracles.lightning_attention(q, k, v, SLOPES)
    got, state = attend(*(merged(x).astype(jnp.bfloat16) for x in (q, k, v)), SLOPES, chunk_size=64)
    assert got.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(got, np.float64) - want.reshape(got.shape)) / np.linalg.norm(want)
    state_error = np.linalg.norm(state - want_state) / np.linalg.norm(want_state)
    assert error < 4e-3 and state_error < 2.5e-3, (error, state_error)


def test_nan_in_is_nan_out():
    q, k, v = (merged(x) for x in random_qkv(20))
    output, state = attend(q, k.at[0, 3, 0].set(jnp.nan), v, SLOPES, chunk_size=8)
    assert np.isnan(output[0, 3:, :DIM]).all() and np.isnan(state[0, 0]).any()
    assert np.isfinite(output[1]).all()


def test_number_segments():
    ids = np.array([[0, 5, 5, 0, 5, 2, 2, 5, 0], [0] * 9])
    np.testing.assert_array_equal(number_segments(ids), [[0, 1, 1, 0, 1, 2, 2, 3, 0], [0] * 9])


def test_graph_does_not_grow_with_length():
    def operations(length):
        q = jnp.zeros((1, length, HEADS * DIM))
        lowered = jax.jit(lambda q: jax.grad(lambda q: lightning_attention(q, q, q, SLOPES)[0].sum())(q)).lower(q)
        return lowered.as_text().count(" = ")

    assert operations(2048) == operations(1 << 20)


def test_backward_keeps_no_attention_matrix():
    q = jnp.zeros((1, 4096, HEADS * DIM))
    _, vjp = jax.vjp(lambda q: lightning_attention(q, q, q, SLOPES, chunk_size=256)[0], q)
    saved = sum(x.size for x in jax.tree.leaves(vjp) if hasattr(x, "size"))
    states = 4096 // 256 * HEADS * DIM * DIM
    assert saved <= 3 * q.size + states + 1000, saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=jnp.zeros((2, 4, 9))), "must be"),
        (dict(v=jnp.zeros((2, 4, 24), jnp.bfloat16)), "share a floating dtype"),
        (dict(slopes=jnp.zeros(5)), "not multiples of the 5 heads"),
        (dict(slopes=jnp.zeros((3, 1))), r"float32 \[H\]"),
        (dict(segment_ids=jnp.zeros((2, 5), jnp.int32)), "segment_ids"),
        (dict(initial_state=jnp.zeros((2, 3, 8, 4))), "initial_state"),
        (dict(implementation="flash"), "'flash' is not one of"),
        (dict(chunk_size=0), "chunk_size"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(
        q=jnp.zeros((2, 4, 24)), k=jnp.zeros((2, 4, 24)), v=jnp.zeros((2, 4, 24)), slopes=jnp.asarray(SLOPES)
    )
    with pytest.raises(ValueError, match=message):
        lightning_attention(**(arguments | change))


def test_auto_takes_the_kernel_where_it_serves_and_one_device_runs_it():
    def choice(dim, devices):
        x, slopes = jnp.zeros((1, 16, 2 * dim), jnp.bfloat16), jnp.ones(2)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("data",))):
            return default_implementation(x, x, x, slopes, segmented=False, chunk_size=64)

    assert choice(dim=64, devices=1) == "chunked_xla"  # a CPU has no kernel
    with platform.target("tpu"):
        assert choice(dim=64, devices=1) == "mosaic_tpu"
        assert choice(dim=8, devices=1) == "chunked_xla"
        assert choice(dim=64, devices=2) == "chunked_xla"
