"""The Mosaic GPU kernel of lightning attention, interpreted on the CPU and lowered for CUDA."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.lightning_attention import end_state, lightning_attention
from pallas_kernels.lightning_attention.mosaic_gpu import api as mosaic_gpu
from pallas_kernels.lightning_attention.mosaic_gpu import segment_table_kernel as facts
from pallas_kernels.lightning_attention.mosaic_gpu import time_split
from pallas_kernels.segments import number_segments
from tests.support import interpreter, oracles

STEEP = mosaic_gpu.MAX_EXPONENT / mosaic_gpu.CHUNK  # the slope from which on the kernel cannot split the decay
CASES = {
    "whole": dict(length=192, dim=64),
    "head_dim_128": dict(length=128, dim=128),
    "one_chunk": dict(length=64, dim=64),
    "ragged": dict(length=150, dim=64),
    "short": dict(length=5, dim=64),
    "packed": dict(length=200, dim=64, segments=[(0, 3), (1, 37), (2, 60), (0, 5), (2, 25), (0, 5), (3, 55), (0, 10)]),
    "packed_128": dict(length=130, dim=128, segments=[(1, 64), (2, 1), (3, 65)]),
    "repeated_id": dict(length=100, dim=64, segments=[(1, 30), (2, 1), (1, 69)]),
    "padding_only": dict(length=70, dim=64, segments=[(0, 70)]),
    "below_the_guard": dict(length=128, dim=64, slopes=(0.99 * STEEP, 0.1)),
    "above_the_guard": dict(length=128, dim=64, slopes=(1.01 * STEEP, 0.1)),
    "far_above_the_guard": dict(length=64, dim=64, slopes=(100.0, 0.1)),
    "reverse": dict(length=100, dim=64, segments=[(1, 30), (2, 70)], reverse=True),
    "borders_of_chunks": dict(length=256, dim=64, segments=[(1, 64), (2, 128), (3, 64)]),
    "no_numbers_at_padding": dict(length=128, dim=64, segments=[(0, 9), (1, 40), (0, 20), (1, 59)], poisoned=True),
    # In as many segments of time.
    "in_time": dict(length=192, dim=64, in_time=3),
    "in_time_128": dict(length=128, dim=128, in_time=2),
    "in_time_ragged": dict(length=230, dim=64, in_time=2),
    "in_time_packed": dict(
        length=384,
        dim=64,
        in_time=3,
        segments=[(0, 74), (1, 54), (2, 64), (3, 100), (0, 20), (3, 30), (0, 42)],
    ),
    "in_time_padding": dict(length=256, dim=64, in_time=4, segments=[(1, 70), (0, 64), (1, 58), (2, 64)]),
}
END_STATES = "packed", "above_the_guard", "in_time", "in_time_packed"  # of these the end states alone are computed too
TABLES = {  # ids of whole chunks; whether they are runs already, of which 1 goes on from the left
    "far_back": ([(1, 10), (0, 1500), (1, 30), (2, 60), (0, 64), (1, 64)], False),  # looks back more than once
    "one_for_all": ([(7, 128)], False),
    "padding_first": ([(0, 70), (3, 58), (4, 64)], False),
    "goes_on": ([(1, 64), (2, 64)], True),
    "begins": ([(2, 40), (3, 88)], True),
}
NAMES = ("output", "state", "dq", "dk", "dv", "d_initial")


def inputs(case):
    """(q, k, v, d_output bfloat16 [1, T, 2 D], initial state and its final cotangent [1, 2, D, D], slopes, ids)."""
    rng = np.random.default_rng(len(case))
    length, dim = CASES[case]["length"], CASES[case]["dim"]
    tokens = [jnp.asarray(rng.normal(size=(1, length, 2 * dim)), jnp.bfloat16) for _ in range(4)]
    states = [rng.normal(size=(1, 2, dim, dim)).astype(np.float32) for _ in range(2)]
    slopes = np.array(CASES[case].get("slopes", (0.917, 0.004)), np.float32)
    segments = CASES[case].get("segments")
    ids = None if segments is None else np.concatenate([np.full(n, i, np.int32) for i, n in segments])[None]
    return *tokens, *states, slopes, ids


def results(case, implementation, dtype):
    q, k, v, do, initial, d_state, slopes, ids = inputs(case)
    if CASES[case].get("poisoned") and implementation == "mosaic_gpu":
        q, k, v, do = (jnp.where(ids[..., None] > 0, x, jnp.nan) for x in (q, k, v, do))

    def attend(q, k, v, initial):
        return lightning_attention(
            q,
            k,
            v,
            jnp.asarray(slopes),
            segment_ids=ids,
            initial_state=initial,
            implementation=implementation,
            reverse=CASES[case].get("reverse", False),
        )

    @jax.jit
    def run(q, k, v, initial, do, d_state):
        outputs, vjp = jax.vjp(attend, q, k, v, initial)
        return *outputs, *vjp((do, d_state))

    return run(*(x.astype(dtype) for x in (q, k, v)), initial, do.astype(dtype), d_state)


def end_states(case, implementation, dtype):
    """(of k and v, of q and d_output from the right)."""
    q, k, v, do, _, _, slopes, ids = inputs(case)
    runs = None if ids is None else number_segments(ids)
    pairs = ((k, v), False), ((q, do), True)
    return [
        end_state(*(x.astype(dtype) for x in pair), slopes, runs, reverse=reverse, implementation=implementation)
        for pair, reverse in pairs
    ]


def ids_of(segments):
    return np.concatenate([np.full(n, i, np.int32) for i, n in segments])


def table_by_hand(segments, numbered):
    """(runs [N, C], real tokens up to and including each [N, C], documents that start [N], whether its first does).

    Runs are those of each chunk, 1 the document that comes in from the left, and 0 at padding.
    """
    last = 1 if numbered else None
    runs, counts, started, fresh = [], [], [], []
    for chunk in ids_of(segments).reshape(-1, mosaic_gpu.CHUNK):
        own, starts = [], []
        for token in chunk:
            starts.append(bool(token and last not in (None, token)))
            last = token or last
            own.append(1 + sum(starts) if token else 0)
        runs.append(own)
        counts.append(np.cumsum(chunk > 0))
        started.append(sum(starts))
        fresh.append(starts[0])
    return np.array(runs), np.array(counts), np.array(started), np.array(fresh)


def compute_all(path):
    arrays = {}
    for name, (segments, numbered) in TABLES.items():
        ids = jnp.asarray(ids_of(segments)[None])
        documents = facts.Documents(ids, numbered)
        tables = facts.tables(documents, ids.shape[1] // mosaic_gpu.CHUNK, interpreted=True)
        arrays[f"table_{name}"] = np.concatenate(tables)
    chosen = time_split.segments
    for case in CASES:
        in_time = CASES[case].get("in_time")
        time_split.segments = chosen if in_time is None else lambda *_, count=in_time: count
        for name, x in zip(NAMES, results(case, "mosaic_gpu", jnp.bfloat16), strict=True):
            arrays[f"{case}/{name}"] = np.asarray(x, np.float32)
        for i, x in enumerate(end_states(case, "mosaic_gpu", jnp.bfloat16) if case in END_STATES else ()):
            arrays[f"{case}/end_state_{i}"] = np.asarray(x)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return interpreter.arrays_of(
        "tests.pallas_kernels.lightning_attention.test_mosaic_gpu", tmp_path_factory.mktemp("kernel")
    )


@interpreter.needed
@pytest.mark.parametrize("case", [case for case in CASES if case != "reverse"])
def test_matches_the_float64_recurrence(computed, case):
    q, k, v, _, initial, _, slopes, ids = inputs(case)
    split = (1, q.shape[1], 2, CASES[case]["dim"])
    output, state = oracles.lightning_attention(
        *(np.asarray(x, np.float32).reshape(split) for x in (q, k, v)), slopes, ids, initial
    )
    assert oracles.relative_error(computed[f"{case}/output"], output.reshape(q.shape)) < 4e-3
    assert oracles.relative_error(computed[f"{case}/state"], state) < 2e-3


@interpreter.needed
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_definition(computed, case):
    want = dict(zip(NAMES, results(case, "reference", jnp.float32), strict=True))
    for name in NAMES:
        assert oracles.relative_error(computed[f"{case}/{name}"], want[name]) < 4e-3, name


@interpreter.needed
@pytest.mark.parametrize("name", TABLES)
def test_documents_are_numbered_in_each_chunk(computed, name):
    forward, reverse = computed[f"table_{name}"]
    runs, counts, started, fresh = table_by_hand(*TABLES[name])
    tokens, half = counts[:, -1:], mosaic_gpu.CHUNK // 2
    for table, count in ((forward, counts), (reverse, tokens - counts + 1)):
        np.testing.assert_array_equal(table[:, facts.RUNS], np.hstack([runs, np.where(runs > 0, runs, -1)]))
        exponents = np.hstack([np.where(runs > 0, x, facts.PADDING) for x in (count - half, half - count)])
        np.testing.assert_array_equal(table[:, facts.EXPONENTS], exponents)
        np.testing.assert_array_equal(table[:, facts.SCALARS, facts.TOKENS], tokens[:, 0])
    ones, scalars = np.ones_like(started), [table[:, facts.SCALARS] for table in (forward, reverse)]
    for own, entry, leave in zip(scalars, (ones, 1 + started), (1 + started, ones), strict=True):
        np.testing.assert_array_equal(own[:, facts.ENTRY], entry)
        np.testing.assert_array_equal(own[:, facts.EXIT], leave)
    np.testing.assert_array_equal(scalars[0][:, facts.FRESH], fresh)
    np.testing.assert_array_equal(scalars[1][:, facts.DROPPED], fresh)
    # A chunk that is not MIXED is served without masks: it is full, and the state before it is dropped if it starts.
    kinds = scalars[0][:, facts.KIND]
    plain = kinds != facts.MIXED
    assert np.all((tokens[:, 0] == mosaic_gpu.CHUNK)[plain]) and np.all((started == fresh)[plain])
    np.testing.assert_array_equal(plain[0], (tokens[0, 0] == mosaic_gpu.CHUNK) & (started[0] == fresh[0]))
    dropped = np.append(False, scalars[0][:-1, facts.DROPPED] > 0)
    assert np.all((kinds == facts.STARTS)[1:] <= dropped[1:]) and np.all(dropped <= fresh)


@interpreter.needed
@pytest.mark.parametrize("case", END_STATES)
def test_end_states_are_those_of_the_definition(computed, case):
    for i, want in enumerate(end_states(case, "reference", jnp.float32)):
        assert oracles.relative_error(computed[f"{case}/end_state_{i}"], want) < 2e-3


@interpreter.needed
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("segmented", [False, True])
def test_forward_and_backward_lower_for_cuda(dim, segmented):
    """Layout inference and lowering to the GPU dialect need no GPU; the search for layouts once did not end."""
    tokens = jax.ShapeDtypeStruct((1, 256, 2 * dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32) if segmented else None
    with platform.target("gpu"):

        def loss(q, k, v, slopes, ids):
            output, state = lightning_attention(q, k, v, slopes, segment_ids=ids)
            return jnp.sum(output.astype(jnp.float32)) + jnp.sum(state)

        slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(tokens, tokens, tokens, slopes, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"call @_jitted_scans", text)) == 3  # forward, dq, and dk with dv
    kernels = text.count("custom_call @mosaic_gpu") - segmented  # one numbers the documents
    assert 2 <= kernels <= 3  # calls in one direction can share a kernel


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 64, 2 * 48), jnp.bfloat16, "head_dim 64 and 128"), ((1, 64, 2 * 64), jnp.float32, "bfloat16")],
)
def test_what_is_not_served_names_what_serves_it(monkeypatch, shape, dtype, message):
    if jax.__version_info__ < (0, 11):
        message = "jax 0.11"
    monkeypatch.setenv("NPROC", "8")
    x = jnp.zeros(shape, dtype)
    with pytest.raises(NotImplementedError, match=message) as raised:
        lightning_attention(x, x, x, jnp.ones(2), implementation="mosaic_gpu")
    assert "chunked_xla" in str(raised.value)


@interpreter.needed
def test_too_few_threads_for_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    x = jnp.zeros((1, 64, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="NPROC=8"):
        lightning_attention(x, x, x, jnp.ones(2), implementation="mosaic_gpu")


if __name__ == "__main__":
    compute_all(sys.argv[1])
