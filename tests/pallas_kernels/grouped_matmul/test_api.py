"""The grouped product against a loop in float64, for every backend in the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, grouped_swiglu, tiled_xla
from tests.support import oracles

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
    "two_sizes_of_tiles": (1100, [130, 600, 0, 333]),
}
WIDTHS = {"megablox": (128, 256)}  # of others: 12 and 10


def assert_close(got, want, name=""):
    """Up to what float32 loses in sums of terms that are as large as the largest result."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * max(1, np.abs(want).max()), err_msg=name)


@pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - {"mosaic_gpu"}))  # a file of its own
@pytest.mark.parametrize("case", sorted(GROUPS))
def test_matches_the_loop_with_gradients(implementation, case):
    num_rows, sizes = GROUPS[case]
    depth, columns = WIDTHS.get(implementation, (12, 10))
    rng = np.random.default_rng(0)
    lhs = rng.normal(size=(num_rows, depth)).astype(np.float32)
    rhs = rng.normal(size=(4, depth, columns)).astype(np.float32)
    weight = rng.normal(size=(num_rows, columns)).astype(np.float32)
    group_sizes = np.array(sizes, np.int32)
    got = multiply(lhs, rhs, group_sizes, implementation=implementation)
    assert_close(got, oracles.grouped_matmul(lhs, rhs, sizes))

    loss = lambda lhs, rhs: jnp.sum(multiply(lhs, rhs, group_sizes, implementation=implementation) * weight)  # noqa: E731
    d_lhs, d_rhs = jax.grad(loss, argnums=(0, 1))(lhs, rhs)
    assert_close(d_lhs, oracles.grouped_matmul(weight, rhs.swapaxes(1, 2), sizes))
    bounds = np.cumsum([0, *sizes])
    for g in range(4):
        part = slice(bounds[g], bounds[g + 1])
        assert_close(d_rhs[g], lhs[part].astype(np.float64).T @ weight[part])


def dense_swiglu(x, w_gate, w_up, w_down, sizes):
    """Every group's expert for every row, and the rows of the group kept."""
    owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, x.shape[0] - sum(sizes)])
    output = 0.0
    for g in range(len(sizes)):
        expert = (jax.nn.silu(x @ w_gate[g]) * (x @ w_up[g])) @ w_down[g]
        output += jnp.where((owner == g)[:, None], expert, 0.0)
    return output


@pytest.mark.parametrize(
    ("implementation", "platform"),
    # tiled_xla: tiles to the exact number, or a static bound.
    [("reference", "cpu"), ("tiled_xla", "cpu"), ("tiled_xla", "gpu"), ("megablox", "cpu")],
)
@pytest.mark.parametrize("case", sorted(GROUPS))
def test_swiglu_matches_dense_experts_with_gradients(monkeypatch, implementation, case, platform):
    monkeypatch.setattr(tiled_xla, "platform", lambda: platform)
    num_rows, sizes = GROUPS[case]
    width, inner = WIDTHS.get(implementation, (12, 10))
    rng = np.random.default_rng(3)
    shapes = (num_rows, width), (4, width, inner), (4, width, inner), (4, inner, width), (num_rows, width)
    *inputs, d_output = ((0.3 * rng.normal(size=shape)).astype(np.float32) for shape in shapes)

    def both(expert):
        return jax.jit(lambda *inputs: (lambda y, vjp: (y, *vjp(d_output)))(*jax.vjp(expert, *inputs)))(*inputs)

    group_sizes = np.array(sizes, np.int32)
    got = both(lambda *inputs: grouped_swiglu(*inputs, group_sizes, implementation=implementation))
    with jax.default_matmul_precision("highest"):
        want = both(lambda *inputs: dense_swiglu(*inputs, sizes))
    for name, a, b in zip(("output", "x", "w_gate", "w_up", "w_down"), got, want, strict=True):
        assert_close(a, b, name)


def test_static_tile_count_of_accelerators_covers_every_row(monkeypatch):
    """The bound that GPU and TPU use in place of the actual tile count, on the worst splits."""
    monkeypatch.setattr(tiled_xla, "platform", lambda: "gpu")
    rng = np.random.default_rng(1)
    forward = jax.jit(tiled_xla.forward)
    for num_rows, groups in [(1, 4), (3, 8), (70, 3), (333, 16), (64, 1)]:
        for _ in range(5):
            cuts = np.sort(rng.integers(0, num_rows + 1, groups - 1))
            sizes = np.diff([0, *cuts, num_rows]).astype(np.int32)
            lhs = rng.normal(size=(num_rows, 4)).astype(np.float32)
            rhs = rng.normal(size=(groups, 4, 3)).astype(np.float32)
            got = forward(lhs, rhs, sizes)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w_down=jnp.zeros((2, 4, 3))), r"w_down \[G, F, M\]"),
        (dict(group_sizes=jnp.zeros(3, jnp.int32)), r"group_sizes \[G\]"),
        (dict(group_sizes=jnp.zeros(2)), "int32"),
        (dict(w_up=jnp.zeros((2, 4, 3), jnp.bfloat16)), "share a dtype"),
        (dict(implementation="cutlass"), "'cutlass' is not one of"),
    ],
)
def test_bad_arguments_of_swiglu_are_named(change, message):
    up = jnp.zeros((2, 4, 3))
    arguments = dict(
        x=jnp.zeros((6, 4)), w_gate=up, w_up=up, w_down=jnp.zeros((2, 3, 4)), group_sizes=jnp.zeros(2, jnp.int32)
    )
    with pytest.raises(ValueError, match=message):
        grouped_swiglu(**(arguments | change))
