"""The Mosaic GPU kernels of decoding, interpreted on the CPU and lowered for CUDA."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.lightning_attention import gated_step
from tests import interpreter, oracles

STEPS = {  # batch, heads, head_dim
    "one": (1, 3, 64),
    "one_128": (1, 5, 128),
    "one_of_two_rows": (1, 2, 128),
    "many": (32, 1, 64),
    "many_128": (3, 2, 128),
    "without_a_token": (3, 2, 64),
    "no_number": (2, 2, 64),
}


def step_inputs(case):
    """(projected bfloat16 [R, 4 H D], slopes [H], state float32 [B, H, D, D], scale bfloat16 [H D], real [B])."""
    batch, heads, dim = STEPS[case]
    rng = np.random.default_rng(len(case))
    rows = 2 if case == "one_of_two_rows" else batch
    projected = jnp.asarray(2 * rng.normal(size=(rows, 4 * heads * dim)), jnp.bfloat16)
    state = rng.normal(size=(batch, heads, dim, dim)).astype(np.float32)
    scale = jnp.asarray(1 + 0.1 * rng.normal(size=heads * dim), jnp.bfloat16)
    slopes = np.geomspace(0.9, 0.004, heads).astype(np.float32)
    real = np.arange(batch) % 2 == 0 if case == "without_a_token" else None
    if case == "no_number":
        projected = projected.at[0, 5].set(jnp.nan)  # of the query
    return projected, slopes, state, scale, real


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def compute_all(path):
    arrays = {}
    for case in STEPS:
        for name, x in zip(("output", "squares", "state"), jax.jit(gated_step)(*step_inputs(case)), strict=True):
            arrays[f"step/{case}/{name}"] = np.asarray(x, np.float32)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return interpreter.arrays_of("tests.test_decode_gpu", tmp_path_factory.mktemp("kernel"))


@interpreter.needed
@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_the_recurrence_with_its_gate(computed, case):
    batch, heads, dim = STEPS[case]
    projected, slopes, state, scale, real = step_inputs(case)
    *qkv, gate = np.split(np.asarray(projected[:batch], np.float64), 4, axis=1)
    q, k, v = (np.asarray(jnp.asarray(x * sigmoid(x), jnp.bfloat16), np.float64) for x in qkv)
    split = (x.reshape(batch, 1, heads, dim) for x in (q, k, v))
    ids = None if real is None else real[:, None].astype(int)
    output, want_state = oracles.lightning_attention(*split, slopes, ids, state)
    output = output.reshape(batch, -1)
    want = output * sigmoid(gate) * np.asarray(scale, np.float64)
    got, squares, got_state = (computed[f"step/{case}/{name}"] for name in ("output", "squares", "state"))
    real = np.ones(batch, bool) if real is None else real
    if case == "no_number":  # the query of one head, which the output of that head alone is made of
        bad = np.isnan(got)
        assert np.all(bad[0, :dim]) and not np.any(bad[0, dim:]) and not np.any(bad[1])
        assert np.all(np.isnan(squares[0, : dim // 64])) and not np.any(np.isnan(got_state))
        got, want, squares, output = got[1:], want[1:], squares[1:], output[1:]
        real = real[1:]
    np.testing.assert_allclose(got_state, want_state, rtol=2e-6, atol=2e-6)
    # One rounding to bfloat16.
    assert oracles.relative_error(got[real], want[real]) < 3e-3
    np.testing.assert_allclose(np.sum(squares, axis=1)[real], np.sum(output**2, axis=1)[real], rtol=1e-5)
    np.testing.assert_array_equal(computed[f"step/{case}/state"][-1:][~real[-1:]], state[-1:][~real[-1:]])


@interpreter.needed
@pytest.mark.parametrize("case", STEPS)
def test_a_step_lowers_for_cuda_as_one_kernel_in_place(case):
    inputs = step_inputs(case)
    with platform.target("gpu"):
        text = jax.jit(lambda *x: gated_step(*x)).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert "output_operand_alias<output_tuple_indices = [2]" in call


if __name__ == "__main__":
    compute_all(sys.argv[1])
