"""The grouped product against a loop in float64, for every backend in the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from tests import oracles

multiply = jax.jit(grouped_matmul, static_argnames="implementation")

GROUPS = {
    "even": (64, [16, 16, 16, 16]),
    "ragged": (61, [3, 0, 57, 1]),
    "one_holds_all": (40, [0, 0, 40, 0]),
    "first_holds_all": (40, [40, 0, 0, 0]),
    "surplus_rows": (50, [7, 0, 21, 5]),
    "fewer_rows_than_groups": (2, [0, 1, 0, 1]),
    "no_rows_used": (9, [0, 0, 0, 0]),
    "many_tiles": (700, [1, 300, 0, 399]),
}


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", sorted(GROUPS))
def test_matches_the_loop_with_gradients(implementation, case):
    num_rows, sizes = GROUPS[case]
    rng = np.random.default_rng(0)
    lhs = rng.normal(size=(num_rows, 12)).astype(np.float32)
    rhs = rng.normal(size=(4, 12, 10)).astype(np.float32)
    weight = rng.normal(size=(num_rows, 10)).astype(np.float32)
    group_sizes = np.array(sizes, np.int32)
    got = multiply(lhs, rhs, group_sizes, implementation=implementation)
    np.testing.assert_allclose(got, oracles.grouped_matmul(lhs, rhs, sizes), rtol=1e-5, atol=1e-5)

    loss = lambda lhs, rhs: jnp.sum(multiply(lhs, rhs, group_sizes, implementation=implementation) * weight)  # noqa: E731
    d_lhs, d_rhs = jax.grad(loss, argnums=(0, 1))(lhs, rhs)
    np.testing.assert_allclose(d_lhs, oracles.grouped_matmul(weight, rhs.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-5)
    bounds = np.cumsum([0, *sizes])
    for g in range(4):
        part = slice(bounds[g], bounds[g + 1])
        np.testing.assert_allclose(d_rhs[g], lhs[part].astype(np.float64).T @ weight[part], rtol=1e-4, atol=1e-4)


def test_static_tile_count_of_accelerators_covers_every_row(monkeypatch):
    """The bound that GPU and TPU use in place of the actual tile count, on the worst splits."""
    from pallas_kernels.grouped_matmul import tiled_xla

    monkeypatch.setattr(tiled_xla, "platform", lambda: "gpu")
    rng = np.random.default_rng(1)
    for num_rows, groups in [(1, 4), (3, 8), (70, 3), (333, 16), (64, 1)]:
        for _ in range(5):
            cuts = np.sort(rng.integers(0, num_rows + 1, groups - 1))
            sizes = np.diff([0, *cuts, num_rows]).astype(np.int32)
            lhs = rng.normal(size=(num_rows, 4)).astype(np.float32)
            rhs = rng.normal(size=(groups, 4, 3)).astype(np.float32)
            got = tiled_xla.forward(lhs, rhs, jnp.asarray(sizes))
            np.testing.assert_allclose(got, oracles.grouped_matmul(lhs, rhs, sizes), rtol=1e-5, atol=1e-5)


def test_bfloat16_accumulates_in_float32():
    rng = np.random.default_rng(2)
    lhs = jnp.asarray(rng.normal(size=(64, 4096)), jnp.bfloat16)
    rhs = jnp.asarray(rng.normal(size=(2, 4096, 8)), jnp.bfloat16)
    got = multiply(lhs, rhs, np.array([40, 24], np.int32))
    want = oracles.grouped_matmul(np.float64(lhs), np.float64(rhs), [40, 24])
    assert np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want) < 3e-3  # one rounding to bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rhs=jnp.zeros((2, 5, 3))), r"lhs \[R, K\]"),
        (dict(group_sizes=jnp.zeros(3, jnp.int32)), r"group_sizes \[G\]"),
        (dict(group_sizes=jnp.zeros(2)), "int32"),
        (dict(rhs=jnp.zeros((2, 4, 3), jnp.bfloat16)), "share a dtype"),
        (dict(implementation="cutlass"), "'cutlass' is not one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(lhs=jnp.zeros((6, 4)), rhs=jnp.zeros((2, 4, 3)), group_sizes=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | change))
