"""Softmax attention as functions: against float64 loops, and in its use of memory."""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from pallas_kernels import platform
from pallas_kernels.segments import number_segments
from pallas_kernels.softmax_attention import (
    IMPLEMENTATIONS,
    blockwise_xla,
    cached_attention,
    cudnn,
    default_implementation,
    softmax_attention,
)
from tests.support import ahead_of_time, oracles

BLOCK = 8
HEADS, KV_HEADS, DIM = 4, 2, 6

attend = jax.jit(softmax_attention, static_argnames=("implementation", "block"))

SEGMENTS = {
    "packed": [[1] * 5 + [2] + [3] * 10 + [5] * 17, [4] * 33],
    "left_padded": [[0] * 9 + [1] * 24, [1] * 33],
    "right_padded": [[1] * 9 + [0] * 24, [0] * 33],
    "interior": [[1] * 4 + [0] * 3 + [2] * 26, [1] * 16 + [0] * 8 + [2] * 9],
    "gap": [[1] * 4 + [0] * 3 + [1] * 11 + [2] * 15, [1] * 33],  # padding inside a document
}


def random_qkv(length, heads=HEADS, kv_heads=KV_HEADS, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shape = lambda n: (2, length, n, DIM)  # noqa: E731
    return [(scale * rng.normal(size=shape(n))).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def naive(q, k, v, segment_ids=None):
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    return softmax_attention(q, k, v, segment_ids, implementation="reference")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_lengths_around_the_block(length, heads, kv_heads):
    q, k, v = random_qkv(length, heads, kv_heads)
    want = oracles.softmax_attention(q, k, v)
    np.testing.assert_allclose(attend(q, k, v, block=BLOCK), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", sorted(SEGMENTS))
def test_documents_and_padding(segments):
    segment_ids = np.array(SEGMENTS[segments])
    q, k, v = random_qkv(33)
    got = attend(q, k, v, segment_ids, block=BLOCK)
    np.testing.assert_allclose(got, oracles.softmax_attention(q, k, v, segment_ids), rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(got)[segment_ids == 0])


def test_large_scores_stay_finite():
    q, k, v = random_qkv(33, scale=100.0)
    got = attend(q, k, v, block=BLOCK)
    np.testing.assert_allclose(got, oracles.softmax_attention(q, k, v), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("segments", [None, "packed", "left_padded", "right_padded", "interior"])
def test_gradients_equal_those_of_the_definition(segments):
    segment_ids = segments and np.array(SEGMENTS[segments])
    qkv = random_qkv(33)
    cotangent = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    got = jax.jit(jax.grad(lambda *x: jnp.vdot(attend(*x, segment_ids, block=BLOCK), cotangent), (0, 1, 2)))(*qkv)
    want = jax.jit(jax.grad(lambda *x: jnp.vdot(naive(*x, segment_ids), cotangent), (0, 1, 2)))(*qkv)
    for got_leaf, want_leaf in zip(got, want, strict=True):
        assert np.abs(want_leaf).max() > 0.1
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_as_the_definition():
    qkv = random_qkv(33)
    want = oracles.softmax_attention(*qkv)
    low = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    got = attend(*low, block=BLOCK)
    assert got.dtype == jnp.bfloat16
    error = lambda x: np.linalg.norm(np.float64(x) - want) / np.linalg.norm(want)  # noqa: E731
    assert error(got) < 2 * error(naive(*low))


# Queries of 1 (a decoding step), 5 and 16 tokens, with caches of one block and of several; rows of two lengths.
@pytest.mark.parametrize(
    ("slots", "lengths", "count"),
    [
        (24, (0, 0), 5),
        (24, (11, 2), 1),
        (24, (0, 23), 1),
        (24, (3, 8), 16),
        (7, (0, 0), 7),
        (23, (4, 0), 19),
        (23, (2, 17), 5),
        (31, (15, 15), 16),
        (55, (1, 20), 35),  # several blocks of queries
    ],
)
def test_cached_attention_matches_the_definition(slots, lengths, count):
    rng = np.random.default_rng(2)
    q = rng.normal(size=(2, count, HEADS, DIM)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, KV_HEADS, slots, DIM)).astype(np.float32)
    for row, length in enumerate(lengths):  # what lies behind the last token must not matter
        key[row, :, length + count :], value[row, :, length + count :] = 1e3, 1e3
    got = jax.jit(functools.partial(cached_attention, block=BLOCK))(q, key, value, np.int32(lengths))
    for row, length in enumerate(lengths):
        filled = length + count
        padded = np.zeros((1, filled, HEADS, DIM), np.float32)
        padded[0, length:] = q[row]
        cache = (x[row : row + 1, :, :filled].swapaxes(1, 2) for x in (key, value))
        want = oracles.softmax_attention(padded, *cache)
        np.testing.assert_allclose(got[row], want[0, length:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_far_below_the_score_matrix(backward):
    length = 8192
    shapes = [jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (2, 1, 1)]

    def run(q, k, v):
        return jnp.sum(softmax_attention(q, k, v, block=256))

    compiled = jax.jit(jax.grad(run, (0, 1, 2)) if backward else run).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < temporary < length * length * 4 / 16  # one [T, T] matrix of one head is 268 MB


def test_layers_that_are_computed_again_keep_no_masks_of_all_blocks():
    """In a scan over layers with remat, documents are known before q, and so would be the mask of every block."""
    length, block = 1024, 64

    def loss(x, segment_ids):
        def layer(x, _):
            q = x.reshape(1, length, 4, 8)
            return softmax_attention(q, q[:, :, :2], q[:, :, :2], segment_ids, block=block).reshape(x.shape), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, length=2)[0])

    shapes = jax.ShapeDtypeStruct((1, length, 32), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    masks = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"pred\[([\d,]+)\]", text)]
    assert 0 < max(masks) <= 4 * length * block  # one block of all heads is 4 * block^2, all of them 4 * length^2 / 2


def test_memory_of_prefill_into_a_cache_is_far_below_the_score_matrix():
    length = 8192
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    cache = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
    arguments = q, cache, cache, jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(functools.partial(cached_attention, block=256)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 4 / 4


def test_bad_arguments_are_named():
    q, k, v = random_qkv(9)
    with pytest.raises(ValueError, match="'flash' is not one of reference, blockwise, cudnn, splash, auto"):
        softmax_attention(q, k, v, implementation="flash")


def assert_same_with_gradients(implementation, q, k, v, segment_ids, cotangent, tolerance):
    """Against "blockwise", which the tests above hold against float64."""

    @functools.partial(jax.jit, static_argnames="implementation")
    def both(q, k, v, implementation):
        attend = lambda *x: softmax_attention(*x, segment_ids, implementation=implementation, block=BLOCK)  # noqa: E731
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(cotangent)

    got, want = both(q, k, v, implementation), both(q, k, v, "blockwise")
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("segments", [None, *sorted(SEGMENTS)])
def test_splash_is_blockwise_with_gradients(segments):
    """jax's kernel for TPU, interpreted."""
    segment_ids = None if segments is None else number_segments(jnp.asarray(SEGMENTS[segments]))
    rng = np.random.default_rng(2)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(2, 33, n, 128)), jnp.float32) for n in (4, 2, 2, 4))
    assert_same_with_gradients("splash", q, k, v, segment_ids, cotangent, 2e-5)


LENGTH = 32768  # a dq of every key block would take 64 tensors of the size of q, a [T, T] matrix more


def compile_splash(topology):
    """Temporaries of packed attention and its gradients as `auto` compiles them for a chip, in tensors like q."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def both(q, k, v, segment_ids, cotangent):
        output, vjp = jax.vjp(lambda *x: softmax_attention(*x, segment_ids), q, k, v)
        return output, *vjp(cotangent)

    q, k, segment_ids = array(1, LENGTH, 8, 128), array(1, LENGTH, 2, 128), array(1, LENGTH, dtype=jnp.int32)
    with platform.target("tpu"):
        program = jax.jit(both).lower(q, k, k, segment_ids, q).compile()
    assert "tpu_custom_call" in program.as_text()
    return program.memory_analysis().temp_size_in_bytes / (2 * q.size)


@pytest.mark.topology_subset
def test_splash_compiles_for_tpu_in_memory_linear_in_length():
    assert ahead_of_time.answer_of(__name__, "v5e:2x2") < 8


@pytest.mark.parametrize(
    ("target", "dtype", "dim", "chosen"),
    [
        ("cpu", "bfloat16", 128, "blockwise"),
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "float32", 64, "blockwise"),
        ("tpu", "float32", 128, "splash"),
        ("tpu", "bfloat16", 64, "blockwise"),
    ],
)
def test_the_default_is_the_kernel_of_the_platform_where_it_serves(target, dtype, dim, chosen):
    q = jax.ShapeDtypeStruct((1, 16, 2, dim), dtype)
    with platform.target(target):
        assert default_implementation(q, q, q, segmented=True) == chosen
        for backend in {"cudnn", "splash"} - {chosen}:
            if target != "cpu" and backend == {"gpu": "cudnn", "tpu": "splash"}[target]:
                with pytest.raises(NotImplementedError, match="use 'blockwise'"):
                    IMPLEMENTATIONS[backend].check(q, q, q, segmented=True)


@pytest.mark.parametrize("segments", [None, *sorted(SEGMENTS)])
def test_the_reference_is_the_definition(segments):
    q, k, v = random_qkv(33)
    segment_ids = None if segments is None else number_segments(jnp.asarray(SEGMENTS[segments]))
    got = softmax_attention(q, k, v, segment_ids, implementation="reference")
    want = oracles.softmax_attention(q, k, v, segments and np.array(SEGMENTS[segments]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_splash_refuses_other_head_dims():
    q = jnp.zeros((1, 8, 2, 64))
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        softmax_attention(q, q, q, implementation="splash")


@jax.custom_vjp
def gradient_written_inside(x, inside):
    """x, whose gradient is NaN where not `inside`."""
    return x


gradient_written_inside.defvjp(
    lambda x, inside: (x, inside), lambda inside, g: (jnp.where(inside[:, :, None, None], g, jnp.nan), None)
)


class PaddedCudnnByItsContract:
    """Attention over the first keys of each row, or causal attention, in cuDNN's layout [B, H, T, D]."""

    class MaskType:
        CAUSAL, PADDING = "causal", "padding"

    @staticmethod
    def dot_product_attention(q, k, v, *, scale, mask_type, qkv_layout, return_residual, q_seqlen=None, kv_seqlen=None):
        assert qkv_layout == "BNTH" and return_residual and (mask_type == "causal") == (kv_seqlen is None)
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k, precision="highest") * scale
        if mask_type == "causal":
            assert q.shape[2] == k.shape[2]
            seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
        else:
            assert q_seqlen.tolist() == [q.shape[2]] * q.shape[0] and bool(jnp.all(kv_seqlen > 0))
            seen = (jnp.arange(k.shape[2]) < kv_seqlen[:, None])[:, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        output = jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores, axis=-1), v, precision="highest")
        return output, jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize("lengths", [(0, 0), (16, 16), (16, 5), (23, 0)])
def test_cache_on_cudnn_by_its_contract(monkeypatch, lengths):
    monkeypatch.setitem(sys.modules, "jax._src.cudnn.fused_attention_stablehlo", PaddedCudnnByItsContract)
    count, slots = 17, 40
    q = random_qkv(count)[0]
    key, value = (x.swapaxes(1, 2) for x in random_qkv(slots, seed=1)[1:])
    lengths = np.int32(lengths)
    want = cached_attention(q, key, value, lengths, implementation="blockwise", block=BLOCK)
    monkeypatch.setattr(blockwise_xla, "cached_forward", None)
    with jax.disable_jit():
        got = cached_attention(q, key, value, lengths, implementation="cudnn", block=BLOCK)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


class CudnnByItsContract:
    """Attention over ragged sequences, as cuDNN's packed layout is documented.

    Outputs and gradients of what belongs to no sequence are never written: NaN here.
    """

    class MaskType:
        PADDING_CAUSAL = "padding causal"

    @staticmethod
    def dot_product_attention(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type == "padding causal" and q_offsets is kv_offsets and q_seqlen is kv_seqlen
        assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
        groups, output = q.shape[2] // k.shape[2], jnp.full(q.shape, jnp.nan, q.dtype)
        at = jnp.arange(q.shape[1])
        starts, lengths = q_offsets[:, :-1, None], q_seqlen[:, :, None]
        served = jnp.any((at >= starts) & (at < starts + lengths) & (starts >= 0), axis=1)
        q, k, v = (gradient_written_inside(x, served) for x in (q, k, v))
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        for document in range(q_seqlen.shape[1]):
            start, length = q_offsets[:, document, None], q_seqlen[:, document, None]
            inside = (at >= start) & (at < start + length) & (start >= 0)
            seen = (inside[:, :, None] & inside[:, None, :] & (at[:, None] >= at))[:, None]
            scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * scale
            weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1), 0.0)
            own = jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")
            output = jnp.where(inside[:, :, None, None], own, output)
        return output


@pytest.mark.parametrize("documents", [4, 2])  # as many as cuDNN is compiled for, and more than that: blockwise
@pytest.mark.parametrize("segments", sorted(SEGMENTS))
def test_packed_rows_on_cudnn_by_its_contract(monkeypatch, segments, documents):
    monkeypatch.setitem(sys.modules, "jax._src.cudnn.fused_attention_stablehlo", CudnnByItsContract)
    monkeypatch.setattr(cudnn, "MAX_DOCUMENTS", documents)
    monkeypatch.setattr(cudnn, "check", lambda q, k, v, *, segmented: None)  # it wants a GPU and bfloat16
    segment_ids = jax.jit(number_segments)(jnp.asarray(SEGMENTS[segments]))
    q, k, v = random_qkv(33)
    cotangent = random_qkv(33, seed=1)[0]
    assert_same_with_gradients("cudnn", q, k, v, segment_ids, cotangent, 1e-5)


if __name__ == "__main__":
    print(json.dumps(compile_splash(sys.argv[1])))
